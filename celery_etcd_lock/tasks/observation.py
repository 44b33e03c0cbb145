"""``etcd_lock_enabled="observe"``: every body runs, under its lock if that is free; what locking would do is only said.

Nothing of ours may keep a task from running here, or for long: a key that cannot be made, options that cannot be
meant, an etcd that hangs. See `Outage.may_try` for that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery_etcd_lock.exceptions import EtcdLockError, EtcdRejected, EtcdUnavailable, LockContended
from celery_etcd_lock.tasks.current import Unlocked, set_lock
from celery_etcd_lock.tasks.interrupts import allowed

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_etcd_lock.locks.held import HeldLock
    from celery_etcd_lock.tasks.guard import Turn
    from celery_etcd_lock.tasks.task import SingletonTask

__all__ = ["observe", "run_regardless"]

logger = logging.getLogger("celery_etcd_lock")

_WARN = "warn"
"""What comes of a lost lock, whatever the task's ``on_lost``."""


def observe(turn: Turn) -> Any:
    """Run the body of `turn`, and say what locking would have prevented."""
    held = _look(turn)
    set_lock(turn.request, held or Unlocked(turn.name))
    try:
        if held is None:
            turn.standing.begins_unlocked()
        else:
            turn.standing.begins(held, ridden=not turn.copies.possible)
            turn.expire(held)
            turn.reports.acquired(held, _WARN)
        with allowed():
            return turn.body()
    finally:
        if held is not None:
            turn.give_back(held, on_lost=_WARN)


def _look(turn: Turn) -> HeldLock | None:
    """The lock if it is to be had. If it is not, what would have become of the task is said."""
    outage = turn.runtime.outage
    if not outage.may_try():
        return None
    try:
        held = turn.acquire(blocking=False)
    except LockContended as contended:
        outage.over()
        turn.reports.contended(contended, "observed", would=turn.outcome(turn.decide(contended)))
    except (EtcdUnavailable, EtcdRejected) as error:
        outage.affects(turn.task.name, error, "observe")
    except EtcdLockError as error:
        logger.warning("etcd_lock.observed: %s[%s] would not lock: %s", turn.task.name, turn.id, error)
    else:
        outage.over()
        return held
    return None


def run_regardless(task: SingletonTask, request: Context, body: Callable[[], Any], error: Exception) -> Any:
    """Run `body`, though it is not even known how `task` is to lock, because of `error`."""
    what = "etcd_lock.observed: %s[%s] runs; with etcd_lock_enabled=True it would fail: %s: %s"
    logger.warning(what, task.name, request.id, type(error).__name__, error)
    set_lock(request, Unlocked())
    with allowed():
        return body()
