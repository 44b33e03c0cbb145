"""Saying what became of the lock of one delivery of a message: the signals' records, and waits that are long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from celery_etcd_lock import signals
from celery_etcd_lock.tasks.options import mode_name

if TYPE_CHECKING:
    from celery_etcd_lock.exceptions import LockContended
    from celery_etcd_lock.locks.held import HeldLock
    from celery_etcd_lock.tasks.message import Waits
    from celery_etcd_lock.tasks.task import SingletonTask

__all__ = ["Reports"]

logger = logging.getLogger("celery_etcd_lock")

_LONG = 300.0
"""Seconds: a message that has waited for so long is mentioned in the log, once."""


class Reports:
    """Of one delivery of a message of `task`, which has waited for `waited` seconds in all."""

    def __init__(self, task: SingletonTask, task_id: str, waits: Waits, waited: float) -> None:
        self._task = task
        self._id = task_id
        self._waits = waits
        self._waited = waited
        self._taken = 0.0
        self._saying = threading.Lock()
        self._lost = False

    def acquired(self, held: HeldLock, on_lost: str) -> None:
        """It has the lock `held`; its loss will be reported when it happens."""
        self._taken = time.monotonic()
        # In a thread of its own: a receiver that takes its time must not keep other bodies from being told.
        held.on_lost(lambda reason: threading.Thread(target=self.lost, args=(held, reason, on_lost)).start())
        if not signals.heard(signals.lock_acquired):
            return
        record = signals.AcquiredRecord(
            self._task.name, self._id, held.name, mode_name(self._task._mode), held.fencing_token,
            self._waits.count, self._waited,
        )  # fmt: skip
        signals.lock_acquired.send(self._task, record=record)

    def released(self, held: HeldLock, *, answered: bool) -> None:
        if not signals.heard(signals.lock_released):
            return
        lasted = time.monotonic() - self._taken
        record = signals.ReleasedRecord(self._task.name, self._id, held.name, lasted, answered)
        signals.lock_released.send(self._task, record=record)

    def lost(self, held: HeldLock, reason: str, on_lost: str) -> None:
        """`held` is not certain any more, for `reason`. Said once."""
        with self._saying:
            if self._lost:
                return
            self._lost = True
        lasted = time.monotonic() - self._taken
        record = signals.LostRecord(self._task.name, self._id, held.name, f"{held.name}: {reason}", lasted, on_lost)
        signals.lock_lost.send(self._task, record=record)

    def contended(
        self, contended: LockContended, outcome: signals.Outcome, pause: float = 0.0, would: str = ""
    ) -> None:
        """Somebody else holds the lock, and this is what becomes of the message."""
        record = signals.ContendedRecord(
            self._task.name, self._id, contended.key, contended.holder, contended.since, outcome,
            self._waits.count, self._waited, pause, would,
        )  # fmt: skip
        signals.lock_contended.send(self._task, record=record)
        if self._waits.seconds < _LONG <= self._waited:
            self._long(contended)

    @contextmanager
    def waiting(self, contended: LockContended, timeout: float) -> Iterator[None]:
        """Around a wait of `timeout` seconds, in a worker's slot."""
        if not self._waited < _LONG < self._waited + timeout:
            yield
            return
        timer = threading.Timer(_LONG - self._waited, self._long, [contended])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _long(self, contended: LockContended) -> None:
        waited = max(self._waited, _LONG)
        logger.warning(
            "etcd_lock.waits_long: %s[%s] has waited for %.0f s: %s", self._task.name, self._id, waited, contended
        )
