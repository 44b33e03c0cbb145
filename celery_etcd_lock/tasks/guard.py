"""Running a task's body under its lock: take it, run, give it back; and what to do where that cannot be.

Whatever happens, the message ends as run, as skipped because its author wished so, as FAILURE that says why, or as
the same message put back in its queue. Only this module acts; `conflict` decides, `keys` names.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery_etcd_lock.exceptions import (
    ConfigError,
    EtcdLockError,
    EtcdRejected,
    EtcdUnavailable,
    LockContended,
    LockLost,
    LockTimeout,
)
from celery_etcd_lock.tasks import conflict
from celery_etcd_lock.tasks.abort import Abort
from celery_etcd_lock.tasks.current import Unheld, Unlocked, set_lock
from celery_etcd_lock.tasks.putback import Waits, countdown_ceiling, forget_waits, put_back
from celery_etcd_lock.tasks.runtime import Runtime

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_etcd_lock.locks.held import HeldLock
    from celery_etcd_lock.tasks.task import SingletonTask

__all__ = ["run_alone"]

logger = logging.getLogger("celery_etcd_lock")

_UNAVAILABLE = conflict.Retry(backoff_max=30, max_wait=None)
"""How long a task stays away while etcd does not answer: it counts towards no policy's `max_wait`."""


def run_alone(
    task: SingletonTask, request: Context, args: tuple[Any, ...], kwargs: dict[str, Any], body: Callable[[], Any]
) -> Any:
    """Run `body`, the task's, for `request`, under the lock that `args` and `kwargs` name."""
    runtime = Runtime.of(task.app)
    name = task.lock_name(args, kwargs)
    waits = Waits.of(request)
    if runtime.settings.enabled == "observe":
        return _observe(runtime, name, task, request, body)
    policy = task.conflict_policy()
    try:
        held = _take(runtime, name, policy, task, request, waits)
    except LockContended as contended:
        runtime.outage.over()
        return _refused(task, request, policy, waits, contended)
    except ConfigError:
        raise
    except LockLost as error:
        # Its place in the queue, not etcd: whoever else holds the lock still does.
        if request.is_eager:
            raise
        raise put_back(task, request, waits.unavailable(), error, _pause(task, waits)) from None
    except EtcdLockError as error:
        return _unavailable(runtime, task, request, name, waits, error, body)
    return _run(task, request, held, body)


def _observe(runtime: Runtime, name: str, task: SingletonTask, request: Context, body: Callable[[], Any]) -> Any:
    """Run `body` whatever happens, under the lock if it is free; say what locking would have prevented."""
    held: HeldLock | None = None
    try:
        describe = _description(task, request)
        held = runtime.acquire(name, task._mode, blocking=False, timeout=None, describe=describe)
        set_lock(request, held)
    except EtcdLockError as error:
        set_lock(request, Unlocked(name))
        would = f"meet its on_conflict, {task.conflict_policy()!r}" if isinstance(error, LockContended) else "not lock"
        logger.warning("etcd_lock.observed: %s[%s] would %s: %s", task.name, request.id, would, error)
    try:
        return body()
    finally:
        if held is not None:
            _give_back(task, request, held)


def _description(task: SingletonTask, request: Context) -> dict[str, str | int]:
    return {"task": task.name, "task_id": str(request.id), "retries": request.retries or 0}


def _take(
    runtime: Runtime, name: str, policy: conflict.Conflict, task: SingletonTask, request: Context, waits: Waits
) -> HeldLock:
    describe = _description(task, request)
    try:
        return runtime.acquire(name, task._mode, blocking=False, timeout=None, describe=describe)
    except LockContended as contended:
        action = _decide(policy, contended, request, waits, task)
        if not isinstance(action, conflict.WaitInPlace):
            raise
        return runtime.acquire(name, task._mode, blocking=True, timeout=action.timeout, describe=describe)


def _decide(
    policy: conflict.Conflict, contended: LockContended, request: Context, waits: Waits, task: SingletonTask
) -> conflict.Action:
    return policy.decide(
        waits=waits.count,
        waited=waits.seconds,
        same_task=_is_itself(contended, request),
        timed_out=isinstance(contended, LockTimeout),
        ceiling=countdown_ceiling(task.app),
        random=random.random,
    )


def _is_itself(contended: LockContended, request: Context) -> bool:
    """Whether the holder has the id of `request`, or has replaced itself by it and is about to end."""
    ids = [request.id, request.parent_id if request.replaced_task_nesting else None]
    return contended.task_id in [str(each) for each in ids if each]


def _refused(
    task: SingletonTask, request: Context, policy: conflict.Conflict, waits: Waits, contended: LockContended
) -> Any:
    """Somebody else holds the lock: what the author wants then."""
    action = _decide(policy, contended, request, waits, task)
    if isinstance(action, conflict.PutBack) and not request.is_eager:
        raise put_back(task, request, waits.contended(), contended, action.countdown)
    if isinstance(action, conflict.SkipRun):
        if action.chain == "fail" and request.chain:
            # What comes next in the chain was meant to work on a result that there is not.
            raise contended
        logger.info("etcd_lock.skipped: %s[%s] is skipped: %s", task.name, request.id, contended)
        return action.result
    raise contended


def _unavailable(
    runtime: Runtime,
    task: SingletonTask,
    request: Context,
    name: str,
    waits: Waits,
    error: EtcdLockError,
    body: Callable[[], Any],
) -> Any:
    """There is no lock to be had, because of etcd and not of another holder."""
    consequence = task.on_unavailable or runtime.settings.on_unavailable
    if consequence == "run" and isinstance(error, EtcdRejected):
        # That was meant for an etcd that is away. A wrong password must not switch locking off, unnoticed.
        consequence = "retry"
    if consequence == "retry" and request.is_eager:
        consequence = "fail"  # there is no queue to put it back into
    runtime.outage.affects(task.name, error, consequence)
    if consequence == "run":
        logger.warning("etcd_lock.unlocked: %s[%s] runs without its lock: %s", task.name, request.id, error)
        set_lock(request, Unheld(name, str(error)))
        return body()
    if consequence == "fail":
        raise error
    reason = error if isinstance(error, EtcdUnavailable) else EtcdUnavailable(str(error))
    raise put_back(task, request, waits.unavailable(), reason, _pause(task, waits))


def _pause(task: SingletonTask, waits: Waits) -> float:
    return _UNAVAILABLE.pause(waits.outages, 0.0, countdown_ceiling(task.app), random.random)


def _run(task: SingletonTask, request: Context, held: HeldLock, body: Callable[[], Any]) -> Any:
    on_lost = task.on_lost or Runtime.of(task.app).settings.on_lost
    again = on_lost == "retry" and not request.is_eager
    try:
        try:
            Runtime.of(task.app).outage.over()
            set_lock(request, held)
            forget_waits(request)
            result = body() if on_lost == "warn" else _abortable(held, body)
        finally:
            # On every way out of the body, and before the result is stored and the next in the chain is sent.
            lost = _give_back(task, request, held)
    except LockLost as error:
        if again and held.release() == "lost":
            raise put_back(task, request, Waits(), error, countdown=0.0) from error
        raise
    if lost and on_lost != "warn":
        unsaid = LockLost(lost)
        raise put_back(task, request, Waits(), unsaid, countdown=0.0) if again else unsaid
    return result


def _abortable(held: HeldLock, body: Callable[[], Any]) -> Any:
    abort = Abort()
    held.on_lost(abort.fire)
    return abort.run(body)


def _give_back(task: SingletonTask, request: Context, held: HeldLock) -> str:
    """Release, and say so if there was nothing to release any more. Returns why there was not."""
    why = "" if held.is_held() else held.why_not()
    if held.release() != "lost":
        return ""
    reason = f"{held.name}: {why or 'its key was deleted'}"
    logger.error("etcd_lock.lost: %s[%s] has lost its lock: %s", task.name, request.id, reason)
    return reason
