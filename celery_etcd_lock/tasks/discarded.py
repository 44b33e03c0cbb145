"""Messages that end without having had their turn: revoked, expired, or lost with the process that had taken them.

Celery says so where it noticed, in the worker's main process as a rule, whose consumer must not wait for etcd.
"""

from __future__ import annotations

import logging
from typing import Any

from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import signals

from celery_etcd_lock.exceptions import EtcdLockError
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.conflict import Coalesce
from celery_etcd_lock.tasks.current import has_entered

__all__ = ["connect"]

logger = logging.getLogger("celery_etcd_lock")


def connect() -> None:
    """Begin to listen. Done once, with the import of `tasks.task`."""
    signals.task_revoked.connect(_revoked, weak=False)
    signals.task_failure.connect(_failed, weak=False)


def _revoked(sender: Any = None, request: Any = None, **_: Any) -> None:
    _discard(sender, request.id, request.args, request.kwargs)


def _failed(
    sender: Any = None, task_id: Any = None, exception: Any = None, args: Any = None, kwargs: Any = None, **_: Any
) -> None:
    if isinstance(exception, (WorkerLostError, TimeLimitExceeded)) or not has_entered(sender.request):
        _discard(sender, task_id, args, kwargs)


def _discard(task: Any, task_id: Any, args: Any, kwargs: Any) -> None:
    if not _has_marks(task) or not task_id:
        return
    try:
        lock = task.lock_name(tuple(args or ()), dict(kwargs or {}))
    except EtcdLockError as error:
        logger.debug("etcd_lock.not_unmarked: %s[%s]: %s", task.name, task_id, error)
        return
    from celery_etcd_lock.tasks.marks import Mark  # here: few processes ever come to it
    from celery_etcd_lock.tasks.standing import take_away

    marks = [Mark.queued(lock, task.name, str(task_id))] if task.unique_queued else []
    take_away(task, [*marks, Mark.waiting(lock, task.name, str(task_id))] if _coalesces(task) else marks)


def _has_marks(task: Any) -> bool:
    return (
        getattr(task, "_key_rule", None) is not None
        and (bool(task.unique_queued) or _coalesces(task))
        and Settings.from_app(task.app).enabled is not False
    )


def _coalesces(task: Any) -> bool:
    return isinstance(task.on_conflict or Settings.from_app(task.app).on_conflict, Coalesce)
