"""After etcd has failed somebody who publishes, those who publish leave it alone for a while; and say so now and then.

A web request that sends a hundred tasks must not wait for etcd a hundred times.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

__all__ = ["Respite"]

logger = logging.getLogger("celery_etcd_lock")

_LASTS = 5.0
"""Seconds."""

_REMINDER = 60.0
"""Seconds."""


class Respite:
    """One for each process and app; its threads share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._until = 0.0
        self._since: float | None = None
        self._said = 0.0
        self._count = 0

    def may_try(self) -> bool:
        """Whether to ask etcd. When the respite is over one may, and if that fails the next begins."""
        if self._since is None:
            return True
        with self._lock:
            if self._since is None:
                return True
            now = self._clock()
            if now < self._until:
                self._count += 1
                return False
            self._until = now + _LASTS
            return True

    def begins(self, error: BaseException) -> None:
        """etcd has failed somebody, by `error`."""
        with self._lock:
            now = self._clock()
            self._until = now + _LASTS
            self._count += 1
            first = self._since is None
            since = self._since = now if self._since is None else self._since
            if not first and now - self._said < _REMINDER:
                return
            self._said = now
            count = self._count
        if first:
            logger.warning(
                "etcd_lock.unmarked: tasks with unique_queued are published without their marks, duplicates and all, "
                "until etcd serves again: %s",
                error,
            )
        else:
            logger.warning(
                "etcd_lock.unmarked: still, for %.0f s; %d tasks with unique_queued met with it so far: %s",
                now - since, count, error,
            )  # fmt: skip

    def over(self) -> None:
        """etcd has served somebody."""
        if self._since is None:
            return
        with self._lock:
            if self._since is None:
                return
            lasted, count = self._clock() - self._since, self._count
            self._since, self._count, self._until = None, 0, 0.0
        logger.warning(
            "etcd_lock.marked_again: etcd is back after %.0f s; %d tasks with unique_queued met with it", lasted, count
        )
