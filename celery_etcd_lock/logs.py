"""The log: receivers of the signals, each line beginning with a constant event name, its record in ``extra``.

What Celery itself logs (a retry with its reason, a failure) is not said twice.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from celery_etcd_lock import signals

__all__ = ["connect"]

logger = logging.getLogger("celery_etcd_lock")

_WOULD = {"retry": "be put back", "skip": "be skipped", "wait": "wait", "fail": "fail"}


def connect() -> None:
    """Begin to log. Done once, with the import of `tasks.task`."""
    for receiver in (_acquired, _released):
        signals.hears(receiver, partial(logger.isEnabledFor, logging.DEBUG))
    signals.lock_acquired.connect(_acquired, weak=False)
    signals.lock_contended.connect(_contended, weak=False)
    signals.lock_released.connect(_released, weak=False)
    signals.lock_lost.connect(_lost, weak=False)
    signals.session_opened.connect(_opened, weak=False)
    signals.session_lost.connect(_session_lost, weak=False)
    signals.leader_elected.connect(_elected, weak=False)
    signals.leader_lost.connect(_deposed, weak=False)
    signals.tick_sent.connect(_sent, weak=False)
    signals.tick_fenced.connect(_fenced, weak=False)


def _acquired(record: signals.AcquiredRecord, **_: Any) -> None:
    _log(logging.DEBUG, record, "etcd_lock.acquired: %s[%s] holds %s", record.task, record.task_id, record.lock)


def _released(record: signals.ReleasedRecord, **_: Any) -> None:
    _log(logging.DEBUG, record, "etcd_lock.released: %s[%s] has released %s", record.task, record.task_id, record.lock)


def _contended(record: signals.ContendedRecord, **_: Any) -> None:
    by = f"{record.lock} is held by {record.holder or 'somebody else'}" + (record.since and f" since {record.since}")
    if record.outcome == "skip":
        _log(logging.INFO, record, "etcd_lock.skipped: %s[%s] is skipped: %s", record.task, record.task_id, by)
    elif record.outcome == "observed":
        what = "etcd_lock.observed: %s[%s] runs; with etcd_lock_enabled=True it would %s: %s"
        _log(logging.WARNING, record, what, record.task, record.task_id, _WOULD[record.would], by)
    else:
        what = "etcd_lock.contended: %s[%s]: %s, so: %s"
        _log(logging.DEBUG, record, what, record.task, record.task_id, by, record.outcome)


def _lost(record: signals.LostRecord, **_: Any) -> None:
    what = "etcd_lock.lost: %s[%s] has lost its lock: %s"
    _log(logging.ERROR, record, what, record.task, record.task_id, record.reason)


def _opened(record: signals.SessionOpenedRecord, **_: Any) -> None:
    _log(logging.INFO, record, "etcd_lock.session_opened: %s, for %d s", record.key, record.ttl)


def _session_lost(record: signals.SessionLostRecord, **_: Any) -> None:
    _log(logging.ERROR, record, "etcd_lock.session_lost: %s: %s", record.key, record.reason)


def _elected(record: signals.LeaderElectedRecord, **_: Any) -> None:
    what = "etcd_lock.leader_elected: this beat leads %r, after %.1f s: %s"
    _log(logging.INFO, record, what, record.beat, record.waited, record.key)


def _deposed(record: signals.LeaderLostRecord, **_: Any) -> None:
    what = "etcd_lock.leader_lost: this beat does not lead %r any more and sends nothing until it is elected again: %s"
    _log(logging.WARNING, record, what, record.beat, record.reason)


def _sent(record: signals.TickSentRecord, **_: Any) -> None:
    again = ", perhaps not for the first time" if record.again else ""
    what = "etcd_lock.tick_sent: %s, due at %s: %s[%s]%s"
    _log(logging.DEBUG, record, what, record.entry, record.due.isoformat(), record.task, record.task_id, again)


def _fenced(record: signals.TickFencedRecord, **_: Any) -> None:
    _log(logging.INFO, record, "etcd_lock.tick_fenced: %s was not sent: %s", record.entry, record.reason)


def _log(level: int, record: Any, message: str, *args: object) -> None:
    if logger.isEnabledFor(level):
        logger.log(level, message, *args, extra={"etcd_lock": record._asdict()})
