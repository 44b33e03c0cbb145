"""Comparing clocks: a beat's tick is as right as its host's clock, and the beats of one name have several.

Each says in etcd what its clock showed when it joined the election. Whoever leads watches them join, and reports a
clock that is not its own. Some seconds do no harm: what was sent is not sent again, an interval begins that much later.
"""

from __future__ import annotations

import json
import logging
import threading
from datetime import datetime, timedelta, timezone

from celery_etcd_lock.etcd.api import Event, Transport, Watch, prefix_end
from celery_etcd_lock.exceptions import EtcdLockError

__all__ = ["BELIEVED", "REPORTED", "Clocks"]

logger = logging.getLogger("celery_etcd_lock")

REPORTED = timedelta(seconds=5)
"""A larger difference is reported."""

BELIEVED = timedelta(minutes=1)
"""A last run that is further ahead than this is not waited for."""

_PAUSE = 1.0


class Clocks:
    """Watches who joins the election `name`, in a thread of its own, until it is closed. `ttl`: the session's."""

    def __init__(self, transport: Transport, name: str, since: int, ttl: float) -> None:
        self._transport = transport
        self._prefix = f"{name}/"
        self._late = timedelta(seconds=ttl) + REPORTED
        self._closed = threading.Event()
        self._stream = transport.watch(self._watch(since))
        threading.Thread(target=self._run, name="etcd-lock-clocks", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._stream.close()

    def _watch(self, revision: int) -> Watch:
        return Watch(self._prefix, prefix_end(self._prefix), revision)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                for reply in self._stream:
                    for event in reply.events:
                        self._look(event)
            except EtcdLockError:
                pass  # those who join meanwhile are not compared
            if not self._closed.wait(_PAUSE):
                self._stream = self._transport.watch(self._watch(0))
                if self._closed.is_set():
                    self._stream.close()

    def _look(self, event: Event) -> None:
        if event.kind == "put" and event.kv.create_revision == event.kv.mod_revision:
            text = skew(event.kv.value, datetime.now(timezone.utc), self._late)
            if text:
                logger.warning("etcd_lock.clock_skew: %s", text)


def skew(value: bytes, now: datetime, late: timedelta) -> str:
    """What is wrong with the clock of one who has just joined and says `value`; ``""``: nothing that one could tell.

    That it is behind shows only beyond `late`: the news of it may itself have been under way.
    """
    try:
        said = json.loads(value)
        since, who = datetime.fromisoformat(said["since"].replace("Z", "+00:00")), f"{said['host']}:{said['pid']}"
        ahead = since - now
    except (ValueError, TypeError, KeyError, AttributeError):
        return ""
    if -late <= ahead <= REPORTED:
        return ""
    how = f"{abs(ahead.total_seconds()):.0f} s {'ahead of' if ahead > timedelta(0) else 'behind'}"
    return f"{who} stands by with a clock that is {how} this host's: one of the two is wrong"
