"""What travels in a message's header ``etcd_lock``: plain JSON, which any publisher may write.

* ``of``, ``nonce`` and ``sent``: the task id, which publication of it this is, and when it was made (Unix time). All
  copies of one message say the same: the ones that a broker delivers again, the ones that were put back, the attempts
  of one task that retries itself. A header that speaks of another task's id (somebody handed their own headers on) is
  none.
* ``count``, ``seconds``, ``at``, ``outages``: what the message has waited, and ``times`` how often it was put back
  for whatever reason: see `Waits`; ``again``: there may be copies of it that are as far as it is; ``repeated``: it is
  published a second time, or more often, by somebody who cannot know whether it was before.
* ``queued``: when it was published a mark said that it is queued (see `queued`).
* options for this call, by their names: ``{"on_conflict": "skip"}``.
* a name that begins with ``_`` is of a newer version, and says nothing to this one: a rolling deploy mixes them, and a
  name that is none of the above fails the message as a mistake of its publisher.

What is no dict is a mistake of its publisher, and a `ConfigError`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

from celery_etcd_lock.exceptions import ConfigError

if TYPE_CHECKING:
    from celery.app.task import Context

__all__ = [
    "HEADER",
    "Waits",
    "addressed",
    "due_at",
    "flagged_queued",
    "forget_waits",
    "header_of",
    "is_queued",
    "is_repeated",
    "keep_to_itself",
    "nonce_of",
    "options_in",
    "published_as",
    "unix_time",
    "was_put_back",
    "was_redelivered",
    "with_waits",
]

HEADER = "etcd_lock"
_NOT_OPTIONS = frozenset({
    "of", "nonce", "sent", "count", "seconds", "at", "outages", "times", "again", "queued", "repeated",
})  # fmt: skip


class Waits(NamedTuple):
    """What a message has waited so far."""

    count: int = 0  # type: ignore[assignment]  # instead of tuple's
    """How often it was put back because somebody else held the lock."""
    seconds: float = 0.0
    """How long it had waited for the lock when it was put back; waiting for etcd itself is not counted."""
    at: float = 0.0
    """When that was (Unix time); 0 if it was because of etcd."""
    outages: int = 0
    """How often in a row it was put back because etcd did not answer."""
    times: int = 0
    """How often it was put back at all. Only grows: it tells a copy from a later one."""

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Waits:
        """As the message's `header_of` says; nothing, if it says nothing or nonsense."""
        if _WAITS.isdisjoint(header):  # as in most
            return cls()
        try:
            count, outages, times = (int(header.get(name, 0)) for name in ("count", "outages", "times"))
            seconds, at = (float(header.get(name, 0)) for name in ("seconds", "at"))
        except (TypeError, ValueError, OverflowError):
            return cls()
        sane = math.isfinite(seconds) and math.isfinite(at) and min(count, outages, times, seconds, at) >= 0
        return cls(count, seconds, at, outages, times) if sane else cls()

    def waited(self, now: float) -> float:
        """For how many seconds it has waited at `now` (Unix time)."""
        return self.seconds + (max(0.0, now - self.at) if self.at else 0.0)

    def contended(self, now: float) -> Waits:
        """Put back at `now`, because somebody else holds the lock."""
        return self._replace(count=self.count + 1, seconds=self.waited(now), at=now, outages=0, times=self.times + 1)

    def unavailable(self, now: float) -> Waits:
        """Put back at `now`, because etcd does not answer."""
        return self._replace(seconds=self.waited(now), at=0.0, outages=self.outages + 1, times=self.times + 1)

    def lost(self) -> Waits:
        """It had the lock, and is to begin anew."""
        return Waits(times=self.times + 1)

    def __bool__(self) -> bool:
        return bool(self.count or self.outages)


_WAITS = frozenset(Waits._fields)
_FORGOTTEN = _WAITS - {"times"} | {"again", "repeated"}


def addressed(headers: Mapping[str, Any] | None, task_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`headers` for publishing `task_id` with these options for the call, over those that are in there already."""
    if not headers:  # as in most
        return {HEADER: {**_publication(task_id, _nonce(), time.time()), **options}}
    header = _header(headers, task_id)
    new = {} if "of" in header else _publication(task_id, _nonce(), time.time())
    return {**headers, HEADER: {**header, **new, **options}}


def published_as(task_id: str, nonce: str, now: float, *, repeated: bool = False) -> dict[str, Any]:
    """Our header for a message that may be published more than once: each is a copy of the publication `nonce`.

    `repeated`: this is not the first.
    """
    header = {**_publication(task_id, nonce, now), "again": True}
    return {**header, "repeated": True} if repeated else header


def _publication(task_id: str, nonce: str, now: float) -> dict[str, Any]:
    return {"of": task_id, "nonce": nonce, "sent": round(now, 3)}


def options_in(headers: Mapping[str, Any] | None, task_id: str) -> dict[str, Any]:
    """The options for this call of `task_id`, as they were written. `ConfigError` if that is nothing one could read."""
    header = (headers or {}).get(HEADER)
    if header is not None and not isinstance(header, (dict, Mapping)):
        raise ConfigError(f'the header {HEADER} is {header!r}: write a dict of options, {{"on_conflict": "skip"}}')
    header = _header(headers, task_id)
    if _NOT_OPTIONS.issuperset(header):  # as in most
        return {}
    return {key: header[key] for key in header if key not in _NOT_OPTIONS and not str(key).startswith("_")}


def header_of(request: Context) -> Mapping[str, Any]:
    """Our header in the message of `request`; empty where there is none of its own."""
    return _header(request.headers, str(request.id))


def nonce_of(header: Mapping[str, Any]) -> str:
    """Which publication of its id the message is a copy of; ``""`` if nobody has said."""
    return str(header.get("nonce", ""))


def due_at(request: Context, header: Mapping[str, Any]) -> float | None:
    """From when on the message was to run, in Unix time: its eta, else when it was published. None: nobody said."""
    sent = header.get("sent")
    return unix_time(request.eta) or (float(sent) if isinstance(sent, (int, float)) else None)


def was_redelivered(request: Context, header: Mapping[str, Any]) -> bool:
    """Whether the broker has delivered this message before, or one of which this is a copy that was put back."""
    redelivered = (request.delivery_info or {}).get("redelivered")
    return bool(redelivered) or bool(header.get("again"))


def flagged_queued(headers: Mapping[str, Any]) -> dict[str, Any]:
    """`headers`, `addressed` ones, of a message whose mark says that it is queued."""
    return {**headers, HEADER: {**headers[HEADER], "queued": True}}


def is_queued(header: Mapping[str, Any]) -> bool:
    """Whether there was a mark that said so."""
    return bool(header.get("queued"))


def is_repeated(headers: Mapping[str, Any]) -> bool:
    """Whether these, `addressed` ones, are of a message that may be in its queue already, or have run."""
    return bool(headers[HEADER].get("repeated"))


def was_put_back(headers: Mapping[str, Any]) -> bool:
    """Whether these, `addressed` ones, are of a message that is put back."""
    return bool(headers[HEADER].get("times"))


def unix_time(moment: Any) -> float | None:
    """An eta or expiry as a message has it (ISO 8601, UTC unless it says otherwise), in Unix time; None for none."""
    if moment is None:
        return None
    try:
        when = datetime.fromisoformat(moment.replace("Z", "+00:00")) if isinstance(moment, str) else moment
        return float((when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp())
    except (AttributeError, TypeError, ValueError):
        return None


def with_waits(request: Context, waits: Waits, *, again: bool = False) -> dict[str, Any]:
    """The headers with which the message of `request` is put back. `again`: there may be copies of it."""
    header = {"of": str(request.id), **header_of(request), **waits._asdict()}
    if again:
        header["again"] = True
    return {**(request.headers or {}), HEADER: header}


def keep_to_itself(request: Context) -> Mapping[str, Any]:
    """Before the body runs: the header is this message's, whomever the body hands its headers on to. Returns it.

    And where its publisher has not said which publication it is, this delivery does, unless others came before it.
    """
    header = {"of": str(request.id), **header_of(request)}
    if "nonce" not in header and not was_redelivered(request, header):
        header["nonce"] = _nonce()
    request.headers = {**(request.headers or {}), HEADER: header}
    return header


def forget_waits(request: Context) -> None:
    """It has the lock: what it waited for that is not to count when the body sends its task again."""
    header = header_of(request)
    if not _FORGOTTEN.isdisjoint(header):
        mine = {key: value for key, value in header.items() if key not in _FORGOTTEN}
        request.headers = {**(request.headers or {}), HEADER: mine}


def _nonce() -> str:
    return os.urandom(6).hex()


def _header(headers: Mapping[str, Any] | None, task_id: str) -> Mapping[str, Any]:
    """Empty where there is none, or one that somebody's body has handed on to another task."""
    header = (headers or {}).get(HEADER)
    if not isinstance(header, (dict, Mapping)) or header.get("of", task_id) != task_id:
        return {}
    return header
