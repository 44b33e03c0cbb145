"""A spell in which etcd fails: how long it lasts, who met with it, whom to spare it, and when to speak of it.

Not a line for each who met with it: there may be thousands. One when it begins, one a minute, one when it is over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Spell", "Word"]

_REMINDER = 60.0
"""Seconds."""


class Word(NamedTuple):
    """What there is to say now."""

    first: bool
    lasted: float
    """Seconds."""
    met: int
    """How many met with it so far."""


class Spell:
    """One after the other, of one process; its threads share it.

    `respite`: for how many seconds after a failure those are spared who can do without etcd. When that is over one may
    ask, and if that fails the next begins: such as publish a hundred tasks must not wait a hundred times.
    """

    def __init__(self, respite: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._respite = respite
        self._clock = clock
        self._lock = threading.Lock()
        self._since: float | None = None
        self._said = 0.0
        self._spared_until = 0.0
        self._count = 0

    def may_try(self) -> bool:
        """Whether one who can do without etcd is to ask it. If not, it is counted."""
        if self._since is None:
            return True
        with self._lock:
            if self._since is None:
                return True
            now = self._clock()
            if now < self._spared_until:
                self._count += 1
                return False
            self._spared_until = now + self._respite
            return True

    def fails(self) -> Word | None:
        """etcd has failed somebody. None: of that was spoken a short while ago."""
        with self._lock:
            now = self._clock()
            first = self._since is None
            since = self._since = now if self._since is None else self._since
            self._count += 1
            self._spared_until = now + self._respite
            if not first and now - self._said < _REMINDER:
                return None
            self._said = now
            return Word(first, now - since, self._count)

    def over(self) -> Word | None:
        """etcd has served somebody. None: as ever."""
        if self._since is None:
            return None
        with self._lock:
            if self._since is None:
                return None
            word = Word(False, self._clock() - self._since, self._count)
            self._since, self._count = None, 0
            return word
