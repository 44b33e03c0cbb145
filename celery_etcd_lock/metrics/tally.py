"""What this process knows of its locks at this moment, task by task: held, and waited for.

*Held*: from the start of the body until the lock was given back or lost. *Waiting*: a message that has met a holder and
waits in its worker slot, or that this process has put back and whose pause is not over. When the pause is over the
message belongs to whoever gets it next, and this process counts it no longer: so over all processes no message is
counted twice, and one that is on its way between its pause and its next try is not counted.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from celery_etcd_lock.signals import AcquiredRecord, ContendedRecord, LostRecord, ReleasedRecord

__all__ = ["Tally"]


class _Wait(NamedTuple):
    since: float
    until: float
    """Infinite: it waits in its slot."""


class Tally:
    """Told what happens, by any thread; asked by whoever shows it. All times are of `clock`, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.clear()

    def clear(self) -> None:
        """Know nothing. A forked child holds nothing, and the lock may be one that nobody will release."""
        self._lock = threading.Lock()
        self._held: defaultdict[str, dict[tuple[str, str], float]] = defaultdict(dict)
        self._waits: defaultdict[str, dict[str, _Wait]] = defaultdict(dict)
        self._ends: list[tuple[float, str, str]] = []
        """A heap of the ends of pauses: what nobody asks for must not pile up."""

    # -- told

    def acquired(self, record: AcquiredRecord) -> None:
        with self._lock:
            self._waits[record.task].pop(record.task_id, None)
            self._held[record.task][record.task_id, record.lock] = self._clock()

    def given_up(self, record: ReleasedRecord | LostRecord) -> None:
        """It is held no longer."""
        with self._lock:
            self._held[record.task].pop((record.task_id, record.lock), None)

    def contended(self, record: ContendedRecord) -> None:
        with self._lock:
            now = self._forget_ended()
            waits = self._waits[record.task]
            waits.pop(record.task_id, None)
            if record.outcome == "wait":
                waits[record.task_id] = _Wait(now - record.waited, float("inf"))
            elif record.outcome == "retry":
                wait = waits[record.task_id] = _Wait(now - record.waited, now + record.pause)
                heapq.heappush(self._ends, (wait.until, record.task, record.task_id))

    def run_ended(self, task: str, task_id: str) -> None:
        """The delivery of a message is done with, so that it waits in no slot, whatever ended its wait."""
        with self._lock:
            wait = self._waits[task].get(task_id) if task in self._waits else None
            if wait is not None and wait.until == float("inf"):
                del self._waits[task][task_id]

    # -- asked

    def held(self, task: str) -> int:
        with self._lock:
            return len(self._held[task])

    def oldest_hold(self, task: str) -> float:
        """Seconds for which the lock is held that is held longest; 0 if none is."""
        with self._lock:
            now = self._clock()
            return now - min(self._held[task].values(), default=now)

    def waiting(self, task: str) -> int:
        with self._lock:
            self._forget_ended()
            return len(self._waits[task])

    def oldest_wait(self, task: str) -> float:
        """Seconds since the first contention of the message that waits longest; 0 if none does."""
        with self._lock:
            now = self._forget_ended()
            return now - min((wait.since for wait in self._waits[task].values()), default=now)

    def _forget_ended(self) -> float:
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            until, task, task_id = heapq.heappop(self._ends)
            wait = self._waits[task].get(task_id)
            if wait is not None and wait.until == until:  # else it was put back again, or has its lock
                del self._waits[task][task_id]
        return now
