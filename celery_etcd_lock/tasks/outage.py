"""Saying that etcd is away: three lines when it begins, one a minute while it lasts, one when it is over.

Not a line a task: during an outage there may be thousands. And whoever can do without etcd does, for a while: where
locking only observes, tasks must not wait for it one after the other.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from celery_etcd_lock.exceptions import EtcdRejected, NoSpace

if TYPE_CHECKING:
    from celery_etcd_lock.settings import Settings

__all__ = ["Outage"]

logger = logging.getLogger("celery_etcd_lock")

_REMINDER = 60.0
"""Seconds."""

_CONSEQUENCE = {
    "retry": "put back and not run",
    "fail": "failed and not run",
    "run": "run without a lock",
    "observe": 'run, as every task is under etcd_lock_enabled="observe"',
}
_FROM_NOW_ON = "until etcd {answers} each fares as its on_unavailable says"
_OBSERVED = "with etcd_lock_enabled=True each would fare as its on_unavailable says"

_RESPITE = 30.0
"""Seconds."""


class Outage:
    """Counts the tasks that could not get a lock because etcd did not answer, and speaks of it now and then."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._since = 0.0
        self._said = 0.0
        self._count = 0
        self._spared_until = 0.0

    def may_try(self) -> bool:
        """Whether one who can do without etcd is to ask it: not so soon after it has failed another such one.

        The others are counted. When that time is over one may, and if that fails it begins anew.
        """
        if not self._since:
            return True
        with self._lock:
            now = time.monotonic()
            if not self._since or now >= self._spared_until:
                self._spared_until = now + _RESPITE
                return True
            self._count += 1
            return False

    def affects(self, task: str, error: BaseException, consequence: str) -> None:
        """`task` could not be locked because of `error`; `consequence` is its ``on_unavailable``."""
        with self._lock:
            now = time.monotonic()
            first = not self._since
            if first:
                self._since = now
            self._count += 1
            self._spared_until = now + _RESPITE
            if not first and now - self._said < _REMINDER:
                return
            self._said = now
            count, lasted = self._count, now - self._since
        where = ", ".join(self._settings.endpoints)
        refused = isinstance(error, EtcdRejected | NoSpace)
        if not first:
            what = f"etcd still refuses ({error})" if refused else f"still no etcd at {where}"
            logger.error(
                "etcd_lock.unavailable: %s, for %.0f s; %d singleton tasks met with it so far", what, lasted, count
            )
            return
        observed = consequence == "observe"
        if refused:
            but = "" if observed or isinstance(error, NoSpace) else ", but none runs without its lock"
            logger.error(
                "etcd_lock.unavailable: the etcd at %s refuses: %s\n"
                "  1 singleton task (%s) is %s; %s%s.",
                where, error, task, _CONSEQUENCE[consequence],
                _OBSERVED if observed else _FROM_NOW_ON.format(answers="serves,"), but,
            )  # fmt: skip
            return
        default = " (the default: etcd_lock_endpoints is not set)" if self._settings.default_endpoints else ""
        logger.error(
            "etcd_lock.unavailable: no etcd at %s%s: %s\n"
            "  1 singleton task (%s) is %s; %s.\n"
            "  Set etcd_lock_endpoints, or the environment variable CELERY_ETCD_LOCK_ENDPOINTS, to where your etcd is.",
            where, default, error, task, _CONSEQUENCE[consequence],
            _OBSERVED if observed else _FROM_NOW_ON.format(answers="answers"),
        )  # fmt: skip

    def over(self) -> None:
        """A lock was taken, or refused by its holder: etcd answers."""
        if not self._since:
            return
        with self._lock:
            if not self._since:
                return
            lasted, count = time.monotonic() - self._since, self._count
            self._since, self._count = 0.0, 0
        logger.warning("etcd_lock.available: etcd is back after %.0f s; %d singleton tasks met with it", lasted, count)
