"""Running a task's body under its lock: take it, run, give it back; and what to do where that cannot be.

Whatever happens, the message ends as run, as skipped because its author wished so, as FAILURE that says why, or as
the same message put back in its queue. Only this module acts; `conflict` decides, `keys` names, `options` says what
holds for this call.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from celery.exceptions import Ignore, Retry

from celery_etcd_lock import signals
from celery_etcd_lock.etcd.api import Operation
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
from celery_etcd_lock.tasks.copies import Copies, Verdict
from celery_etcd_lock.tasks.current import Unheld, set_lock
from celery_etcd_lock.tasks.interrupts import allowed, deferred
from celery_etcd_lock.tasks.message import Waits, forget_waits, keep_to_itself, options_in
from celery_etcd_lock.tasks.observation import observe, run_regardless
from celery_etcd_lock.tasks.options import behaviour
from celery_etcd_lock.tasks.putback import expires_within, put_back
from celery_etcd_lock.tasks.reports import Reports
from celery_etcd_lock.tasks.runtime import Runtime
from celery_etcd_lock.tasks.standing import Standing

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_etcd_lock.locks.held import HeldLock
    from celery_etcd_lock.tasks.task import SingletonTask

__all__ = ["run_alone"]

logger = logging.getLogger("celery_etcd_lock")

_UNAVAILABLE = conflict.Retry(backoff_max=30, max_wait=None)
"""How long a task stays away while etcd does not answer: it counts towards no policy's `max_wait`."""

_SOON = 0.1
"""Seconds: a message must not have run again before Celery has stored that it is put back."""

_ON_ITS_WAY = 5.0
"""Seconds that a message may be late: the link of a chain is put back if it has so long before it expires."""

_GRACE = 5.0
"""Seconds between the loss of a lock that was held for too long and its key's end, whatever the body does."""


def run_alone(
    task: SingletonTask,
    request: Context,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    body: Callable[[], Any],
    *,
    observes: bool,
) -> Any:
    """Run `body`, the task's, for `request`, under the lock that `args` and `kwargs` name; `observes`: or without.

    Signals strike in the body, and while it waits for the lock; else they do when all is done.
    """
    with deferred():
        try:
            turn = Turn(task, request, task.lock_name(args, kwargs), body)
        except Exception as error:
            if not observes:
                raise
            return run_regardless(task, request, body, error)
        try:
            result = observe(turn) if observes else turn.run()
        except BaseException as error:
            turn.standing.ends(error)
            raise
        turn.standing.ends(None)
        return result


class Turn:
    """One delivery of one message: its turn to run."""

    def __init__(self, task: SingletonTask, request: Context, name: str, body: Callable[[], Any]) -> None:
        self.task = task
        self.request = request
        self.id = str(request.id or "")
        self.name = name
        self.body = body
        self.runtime = Runtime.of(task.app)
        self.now = time.time()
        self.holds = behaviour(task, self.runtime.settings, options_in(request.headers, self.id))
        header = keep_to_itself(request)
        self.waits = Waits.of(header)
        self.waited = self.waits.waited(self.now)
        """Seconds, since its first contention."""
        self.reports = Reports(task, self.id, self.waits, self.waited)
        self.ceiling = self.runtime.countdown_ceiling
        self.copies = Copies(self.runtime, task, request, header, self.waits)
        coalesces = isinstance(self.holds.on_conflict, conflict.Coalesce)
        self.standing = Standing(self.runtime, task, request, name, coalesces=coalesces)

    def run(self) -> Any:
        try:
            held = self.take()
            self.runtime.outage.over()
            if self.copies.possible:
                self.stand_aside_with(held)
        except LockContended as contended:
            self.runtime.outage.over()
            return self.refused(contended)
        except ConfigError:
            raise
        except LockLost as error:
            # Its place in the queue, not etcd: whoever else holds the lock still does.
            if self.request.is_eager:
                raise
            raise self.put_back(self.waits.unavailable(self.now), error, self.pause()) from None
        except EtcdLockError as error:
            return self.unavailable(error)
        return self.hold(held)

    # -- take it

    def take(self) -> HeldLock:
        try:
            return self.acquire(blocking=False)
        except LockContended as contended:
            action = self.decide(contended)
            if not isinstance(action, conflict.WaitInPlace):
                raise
            self.reports.contended(contended, "wait", action.timeout)
            with self.reports.waiting(contended, action.timeout):
                return self.acquire(blocking=True, timeout=action.timeout)

    def acquire(self, *, blocking: bool, timeout: float | None = None) -> HeldLock:
        describe: dict[str, str | int] = {
            "task": self.task.name,
            "task_id": self.id,
            "retries": self.request.retries or 0,
        }
        return self.runtime.acquire(
            self.name,
            self.task._mode,
            blocking=blocking,
            timeout=timeout,
            describe=describe,
            rider=None if self.copies.possible else self.standing.rider,  # where it may have to stand aside after all
            at_least_for=self.holds.at_least_for,
            waiting=allowed,
        )

    def decide(self, contended: LockContended, *, others_wait: bool = False) -> conflict.Action:
        return self.holds.on_conflict.decide(
            waits=self.waits.count,
            waited=self.waited,
            same_task=self.is_itself(contended),
            timed_out=isinstance(contended, LockTimeout),
            others_wait=others_wait,
            ceiling=self.ceiling,
            random=random.random,
        )

    def is_itself(self, contended: LockContended) -> bool:
        """Whether the holder has the id of this message, or has replaced itself by it and is about to end."""
        ids = [self.id, self.request.parent_id if self.request.replaced_task_nesting else None]
        return contended.task_id in [str(each) for each in ids if each]

    def stand_aside_with(self, held: HeldLock) -> None:
        """Give `held` back and do not run, if another copy of this message has run, or is ending."""
        judged: Verdict | None = None
        try:
            judged = self.copies.look(held)
        finally:
            if judged != "run":
                held.release()
        self.stand_aside(judged, LockContended(self.name, f"another copy of {self.task.name}[{self.id}]"))

    def stand_aside(self, judged: Verdict, reason: LockContended) -> None:
        """`Ignore` or `Retry`, unless this copy may run."""
        if judged == "drop":
            raise Ignore
        if judged == "again":
            pause = conflict.Retry(max_wait=None).pause(self.waits.count, 0.0, self.ceiling, random.random)
            raise self.put_back(self.waits.contended(self.now), reason, pause)

    # -- have it

    def hold(self, held: HeldLock) -> Any:
        """Run the body under `held`, and give it back."""
        on_lost = self.holds.on_lost
        again = on_lost == "retry" and not self.request.is_eager
        also: tuple[Operation, ...] = ()
        try:
            try:
                set_lock(self.request, held)
                forget_waits(self.request)
                self.standing.begins(held, ridden=not self.copies.possible)
                self.expire(held)
                self.reports.acquired(held, on_lost)
                result = _interruptible(self.body) if on_lost == "warn" else _abortable(held, self.body)
                also = self.copies.ending(held.session)
            except Retry:
                also = self.copies.ending(held.session)
                raise
            finally:
                # On every way out of the body, and before the result is stored and the next in the chain is sent.
                lost = self.give_back(held, also, on_lost=on_lost)
        except LockLost as error:
            if again and held.release() == "lost":
                raise self.put_back(self.waits.lost(), error) from error
            raise
        if lost and on_lost != "warn":
            unsaid = LockLost(lost)
            raise self.put_back(self.waits.lost(), unsaid) if again else unsaid
        return result

    def expire(self, held: HeldLock) -> None:
        """Let `held` be lost when its body takes too long."""
        at_most = self.holds.at_most_for
        if at_most is not None:
            held.expire_after(at_most, grace=_GRACE, reason=f"held for longer than lock_at_most_for={at_most} s")

    def give_back(self, held: HeldLock, also: Sequence[Operation] = (), *, on_lost: str) -> str:
        """Release, and say so if there was nothing to release any more. Returns why there was not."""
        with deferred():  # of its own: see `interrupts`
            why = "" if held.is_held() else held.why_not()
            outcome = held.release(also)
        if outcome != "lost":
            self.copies.released(self.request)
            self.reports.released(held, answered=outcome == "released")
            return ""
        why = why or "its key was deleted"
        self.reports.lost(held, why, on_lost)
        return f"{held.name}: {why}"

    # -- do without it

    def refused(self, contended: LockContended) -> Any:
        """Somebody else holds the lock: what the author wants then."""
        if self.copies.overdue:
            try:
                self.stand_aside(self.copies.look(), contended)
            except EtcdLockError as error:
                return self.unavailable(error)
        action = self.decide(contended, others_wait=self.standing.others_wait(contended))
        outcome = self.outcome(action)
        self.reports.contended(contended, outcome, action.countdown if isinstance(action, conflict.PutBack) else 0.0)
        if isinstance(action, conflict.PutBack) and outcome == "retry":
            raise self.put_back(self.waits.contended(self.now), contended, action.countdown)
        if isinstance(action, conflict.SkipRun) and outcome == "skip":
            return action.result
        raise contended

    def outcome(self, action: conflict.Action) -> signals.Outcome:
        """What becomes of the message where that is what its policy says."""
        if isinstance(action, conflict.PutBack) and not self.request.is_eager:
            return "retry"
        if isinstance(action, conflict.SkipRun) and not (action.chain == "fail" and self.request.chain):
            return "skip"  # else what comes next in the chain was meant to work on a result that there is not
        return "wait" if isinstance(action, conflict.WaitInPlace) else "fail"

    def unavailable(self, error: EtcdLockError) -> Any:
        """There is no lock to be had, because of etcd and not of another holder."""
        consequence = self.holds.on_unavailable
        if consequence == "run" and isinstance(error, EtcdRejected):
            # That was meant for an etcd that is away. A wrong password must not switch locking off, unnoticed.
            consequence = "retry"
        if consequence == "retry" and self.request.is_eager:
            consequence = "fail"  # there is no queue to put it back into
        self.runtime.outage.affects(self.task.name, error, consequence)
        if consequence == "run":
            logger.warning("etcd_lock.unlocked: %s[%s] runs without its lock: %s", self.task.name, self.id, error)
            set_lock(self.request, Unheld(self.name, str(error)))
            self.standing.begins_unlocked()
            return _interruptible(self.body)
        if consequence == "fail":
            raise error
        reason = error if isinstance(error, EtcdUnavailable) else EtcdUnavailable(str(error))
        raise self.put_back(self.waits.unavailable(self.now), reason, self.pause())

    def put_back(self, waits: Waits, reason: Exception, countdown: float = _SOON) -> Exception:
        """Send the message again; returns what to raise."""
        if self.request.chain and expires_within(self.request, countdown + _ON_ITS_WAY):
            return reason  # Celery would discard it in silence, and whoever waits for the chain's end would for ever
        retry = put_back(self.task, self.request, waits, reason, countdown, again=self.copies.overdue)
        if not isinstance(reason, EtcdUnavailable):
            self.copies.put_back()
        return retry

    def pause(self) -> float:
        """Seconds until it comes back to look for etcd."""
        return _UNAVAILABLE.pause(self.waits.outages, 0.0, self.ceiling, random.random)


def _interruptible(body: Callable[[], Any]) -> Any:
    with allowed():
        return body()


def _abortable(held: HeldLock, body: Callable[[], Any]) -> Any:
    abort = Abort()
    held.on_lost(abort.fire)
    return abort.run(body)
