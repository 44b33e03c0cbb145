"""Putting a message back: the same task again, a little later, as if nothing had happened to it.

The same id, arguments, headers, options and `retries`: the author's ``max_retries`` is not used up. (``Task.retry``
would do that, and writes to the task instance, which all threads share.) What we count travels in the message's
header ``etcd_lock``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from celery.exceptions import Retry

if TYPE_CHECKING:
    from celery import Celery, Task
    from celery.app.task import Context

__all__ = ["Waits", "countdown_ceiling", "forget_waits", "put_back"]

HEADER = "etcd_lock"


@dataclass(frozen=True, slots=True)
class Waits:
    """What a message has waited so far."""

    count: int = 0
    """How often it was put back because somebody else held the lock."""
    seconds: float = 0.0
    """How long it has waited for the lock since then; waiting for etcd itself is not counted."""
    at: float = 0.0
    """When it was last put back because of a holder (Unix time), 0 if it last was because of etcd."""
    outages: int = 0
    """How often in a row it was put back because etcd did not answer."""

    @classmethod
    def of(cls, request: Context) -> Waits:
        """As the message says; nothing, if it says nothing or nonsense."""
        header = (request.headers or {}).get(HEADER)
        header = header if isinstance(header, Mapping) else {}
        try:
            at = float(header.get("at", 0))
            seconds = float(header.get("seconds", 0)) + (max(0.0, time.time() - at) if at else 0.0)
            return cls(int(header.get("count", 0)), seconds, at, int(header.get("outages", 0)))
        except (TypeError, ValueError):
            return cls()

    def contended(self) -> Waits:
        return replace(self, count=self.count + 1, at=time.time(), outages=0)

    def unavailable(self) -> Waits:
        return replace(self, at=0.0, outages=self.outages + 1)


def forget_waits(request: Context) -> None:
    """It has the lock: what it waited for that is not to count when the body sends its task again."""
    headers = request.headers or {}
    if HEADER in headers:
        mine = {key: value for key, value in _own(headers).items() if key not in Waits.__dataclass_fields__}
        request.headers = {**headers, HEADER: mine}


def put_back(task: Task[Any, Any], request: Context, waits: Waits, reason: Exception, countdown: float) -> Retry:
    """Send the message of `request` again, to run in `countdown` seconds; returns what the caller has to raise.

    If the broker refuses it that error comes instead, and the task ends as FAILURE with it.
    """
    headers = dict(request.headers or {})
    headers[HEADER] = {**_own(headers), **asdict(waits)}
    signature = task.signature_from_request(
        request,
        countdown=countdown,
        retries=request.retries,
        headers=headers,
        ignore_result=request.ignore_result,  # what was asked for this one message: Celery 5.4 forgets it
    )
    # Celery takes the task that runs for the parent of what has none; but this is no child of itself.
    request.called_directly = True
    try:
        signature.apply_async()
    finally:
        request.called_directly = False
    when: Any = countdown
    return Retry(f"Retry in {countdown:.1f}s: {reason}", exc=reason, when=when, sig=signature)


def _own(headers: Mapping[str, Any]) -> dict[str, Any]:
    header = headers.get(HEADER)
    return dict(header) if isinstance(header, Mapping) else {}


def countdown_ceiling(app: Celery) -> float:
    """The longest countdown, in seconds, that the broker of `app` surely does not deliver twice.

    Half its visibility timeout: a message that waits in a worker for longer is given to another worker, too,
    each of which would put it back in turn. RabbitMQ cuts off a consumer after 30 minutes in much the same way.
    """
    options = app.conf.broker_transport_options or {}
    configured = options.get("visibility_timeout")
    if configured:
        return float(configured) / 2
    redis = str(app.conf.broker_url or "").startswith(("redis", "sentinel"))
    return 1800.0 if redis else 900.0
