"""Locks that nobody vouches for any longer than was said when they were taken, though their session lives on.

At the moment that was said the contender is lost, and whoever asked to be told is told; a grace later its key
goes, whether or not the holder has ended. The session's thread that watches the deadline of trust looks after
them all: it asks `next_due`, and calls `run`.
"""

from __future__ import annotations

import math
import threading

from celery_etcd_lock.locks.contender import Contender, Contenders

__all__ = ["Expiries", "Expiry"]


class Expiry:
    """That `contender` is lost `at` a moment of the session's clock, for `reason`, and goes `grace` seconds after."""

    def __init__(self, contender: Contender, at: float, grace: float, reason: str) -> None:
        self.contender = contender
        self.at = at
        self.grace = grace
        self.reason = reason
        self.said = False

    @property
    def due(self) -> float:
        """When there is next something to do."""
        return self.at + self.grace if self.said else self.at


class Expiries:
    """Those of one session. Thread-safe."""

    def __init__(self, contenders: Contenders) -> None:
        self._contenders = contenders
        self._lock = threading.Lock()
        self._pending: dict[Contender, Expiry] = {}

    def add(self, expiry: Expiry) -> None:
        """In place of what was said of the same contender before."""
        with self._lock:
            self._pending[expiry.contender] = expiry

    def cancel(self, contender: Contender) -> None:
        """It was released."""
        with self._lock:
            self._pending.pop(contender, None)

    def next_due(self) -> float:
        """When `run` has next something to do; infinity: not at all."""
        with self._lock:
            return min((expiry.due for expiry in self._pending.values()), default=math.inf)

    def run(self, now: float) -> None:
        """Do what is due at `now`."""
        with self._lock:
            due = sorted((each for each in self._pending.values() if each.due <= now), key=lambda expiry: expiry.due)
        for expiry in due:
            if expiry.said:
                self.cancel(expiry.contender)
                self._contenders.expel(expiry.contender)
            else:
                expiry.said = True
                self._contenders.lose(expiry.contender, expiry.reason)
