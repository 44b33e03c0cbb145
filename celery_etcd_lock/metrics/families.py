"""The metrics themselves: their names, labels and types, and the receivers of signals that fill them."""

from __future__ import annotations

import math
import os
import threading
from functools import partial
from typing import Any
from weakref import WeakSet

from celery import signals as celery_signals
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from celery_etcd_lock import signals
from celery_etcd_lock.metrics.processes import Readings, is_multiprocess
from celery_etcd_lock.metrics.tally import Tally
from celery_etcd_lock.tasks.runtime import Runtime

__all__ = ["Families"]

_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 21600)
"""Seconds: from a row in a database to a nightly job."""


class Families:
    """All metrics of `celery_etcd_lock`, in `registry`."""

    def __init__(self, registry: CollectorRegistry, readings: Readings) -> None:
        self.registry = registry
        self._readings = readings
        self._tally = Tally()

        def gauge(name: str, help_: str, mode: Any, label: str = "task") -> Gauge:
            return Gauge(f"celery_etcd_lock_{name}", help_, [label], registry=registry, multiprocess_mode=mode)

        self._held = gauge("held", "Locks held now.", "livesum")
        self._oldest_hold = gauge(
            "oldest_hold_seconds", "For how long the lock has been held that is held longest.", "livemax"
        )
        self._waiting = gauge(
            "waiting", "Messages that wait because of a holder: in a slot, or put back and in their pause.", "livesum"
        )
        self._oldest_wait = gauge(
            "oldest_wait_seconds", "Since the first contention of the message that waits longest.", "livemax"
        )
        self._leader = gauge("beat_leader", "1: this beat leads; 0: it does not any more.", "livesum", "beat")
        self._hold = Histogram(
            "celery_etcd_lock_hold_seconds", "For how long locks were held that were given back or lost.", ["task"],
            registry=registry, buckets=_BUCKETS,
        )  # fmt: skip
        self._conflicts = Counter(
            "celery_etcd_lock_conflicts", "Times that a message met a holder, by what became of it.",
            ["task", "outcome"], registry=registry,
        )  # fmt: skip
        self._lost = Counter("celery_etcd_lock_lost", "Locks lost while they were held.", ["task"], registry=registry)
        self._trust: Gauge | None = None
        self._begin()
        os.register_at_fork(after_in_child=self._after_fork)

    def connect(self) -> None:
        """Begin to receive."""
        signals.lock_acquired.connect(self._on_acquired, weak=False)
        signals.lock_released.connect(self._on_released, weak=False)
        signals.lock_lost.connect(self._on_lost, weak=False)
        signals.lock_contended.connect(self._on_contended, weak=False)
        signals.session_opened.connect(self._on_session, weak=False)
        celery_signals.task_postrun.connect(self._on_run_ended, weak=False)
        celery_signals.worker_process_shutdown.connect(self._on_process_end, weak=False)
        celery_signals.worker_shutdown.connect(self._on_process_end, weak=False)
        signals.leader_elected.connect(partial(self._on_leader, 1), weak=False)
        signals.leader_lost.connect(partial(self._on_leader, 0), weak=False)

    def _begin(self) -> None:
        self._apps: WeakSet[Any] = WeakSet()
        self._seen: set[str] = set()
        self._shows_trust = False
        self._beginning = threading.Lock()

    def _after_fork(self) -> None:
        self._begin()
        self._tally.clear()
        self._readings.clear()

    # -- receivers

    def _on_acquired(self, record: signals.AcquiredRecord, **_: Any) -> None:
        self._tally.acquired(record)
        self._show(record.task)
        self._show_held(record.task)

    def _on_released(self, record: signals.ReleasedRecord, **_: Any) -> None:
        self._tally.given_up(record)
        self._hold.labels(record.task).observe(record.seconds)
        self._show_held(record.task)

    def _on_lost(self, record: signals.LostRecord, **_: Any) -> None:
        self._tally.given_up(record)
        self._hold.labels(record.task).observe(record.seconds)
        self._lost.labels(record.task).inc()
        self._show_held(record.task)

    def _on_contended(self, record: signals.ContendedRecord, **_: Any) -> None:
        self._tally.contended(record)
        self._conflicts.labels(record.task, record.outcome).inc()
        self._show(record.task)

    def _on_run_ended(self, task_id: str = "", task: Any = None, **_: Any) -> None:
        self._tally.run_ended(task.name, task_id)

    def _on_session(self, sender: Any, **_: Any) -> None:
        self._apps.add(sender)
        with self._beginning:
            if self._shows_trust:
                return
            self._shows_trust = True
            if self._trust is None:
                # Not before there is a session: it has no label, and would show 0 from the start. And where other
                # registries are read than those of the children, a child does not touch one that its parent may
                # have locked when it forked.
                self._trust = Gauge(
                    "celery_etcd_lock_session_trust_seconds",
                    "For how long the session in etcd is certain if it is not renewed; 0: it was lost, and there is "
                    "no other yet.",
                    registry=None if is_multiprocess() else self.registry,
                    multiprocess_mode="livemin",
                )
            self._readings.add(self._trust, self._trusted_for)

    def _on_process_end(self, **_: Any) -> None:
        self._readings.end()

    def _on_leader(self, leads: int, /, record: Any, **_: Any) -> None:
        self._leader.labels(record.beat).set(leads)

    # -- what is shown

    def _show(self, task: str) -> None:
        """Have all that there is to say of `task`, from 0 on: of a counter that begins with 1 there is no increase."""
        with self._beginning:
            if task in self._seen:
                return
            self._seen.add(task)
        self._hold.labels(task)
        self._lost.labels(task)
        for gauge, read in (
            (self._held, self._tally.held),
            (self._oldest_hold, self._tally.oldest_hold),
            (self._waiting, self._tally.waiting),
            (self._oldest_wait, self._tally.oldest_wait),
        ):
            self._readings.add(gauge.labels(task), partial(read, task))

    def _show_held(self, task: str) -> None:
        """At once, not in a second: a body may keep the GIL for its whole run."""
        if is_multiprocess():
            self._held.labels(task).set(self._tally.held(task))

    def _trusted_for(self) -> float:
        sessions = [Runtime.of(app).opened for app in tuple(self._apps)]
        return min((0.0 if each is None else each.remaining() for each in sessions), default=math.nan)
