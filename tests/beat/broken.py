"""Schedulers that are broken on purpose, in one way each, which the checker must find. Only for other processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from celery_etcd_lock.beat import candidate, fenced, ledger
from celery_etcd_lock.beat.entries import bring
from celery_etcd_lock.beat.record import Record
from celery_etcd_lock.exceptions import EtcdLockError

__all__ = ["BREAKS"]


def _no_fence() -> None:
    """What has led once goes on, whatever etcd says: it trusts what it was told, and marks without asking."""

    def claim(self: Any, entry: str, record: Record) -> bool:
        with suppress(EtcdLockError):
            claimed(self, entry, record)
        return True

    claimed, ledger.Ledger.claim = ledger.Ledger.claim, claim  # type: ignore[method-assign]
    ledger.Ledger.leads = True  # type: ignore[method-assign,assignment]
    candidate.Candidate.leadership = property(lambda self: self._leadership)  # type: ignore[method-assign,assignment]


def _own_last_run() -> None:
    """A new leader begins every interval anew."""
    fenced.Fenced._bring_up_to_date = lambda self: None  # type: ignore[method-assign]
    fenced.Fenced._comes_up = lambda self, entry, reserved: True  # type: ignore[method-assign]


def _at_most_once() -> None:
    """A new leader takes a tick that is *sending* for one that was sent."""
    parse = Record.parse

    def parsed(value: bytes) -> Record:
        record = parse(value)
        if record.state != "sending" or record.slot is None:
            return record
        return record._replace(state="sent", last_run_at=record.slot.due)

    Record.parse = staticmethod(parsed)  # type: ignore[method-assign]


def _no_stepping_down() -> None:
    """A leader that ends leaves it to its lease to say so."""
    candidate.Candidate.close = lambda self: None  # type: ignore[method-assign]


def _all_that_was_missed() -> None:
    """Every tick that fell into a takeover is sent after it, one after the other."""

    def due_time(plan: Any, last_run_at: datetime, now: datetime) -> datetime:
        every = getattr(plan, "run_every", None)
        return last_run_at + every if every else latest(plan, last_run_at, now)

    def write_down(self: Any, entry: Any, reserved: Any, record: Record) -> None:
        if record.slot is not None and getattr(entry.schedule, "run_every", None):
            bring(reserved, record.slot.due, reserved.total_run_count)
        written(self, entry, reserved, record)

    latest = fenced.due_time  # type: ignore[attr-defined]
    fenced.due_time = due_time  # type: ignore[attr-defined]
    written, fenced.Fenced._write_down = fenced.Fenced._write_down, write_down  # type: ignore[method-assign]


BREAKS: Mapping[str, Callable[[], None]] = {
    "fence": _no_fence,
    "last-run": _own_last_run,
    "at-most-once": _at_most_once,
    "stepping-down": _no_stepping_down,
    "missed": _all_that_was_missed,
}
