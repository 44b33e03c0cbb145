"""One in the queue: a task with `unique_queued` is not published while a message of the same key waits, or runs.

    claim ──▶ taken: the existing AsyncResult, or DuplicateTaskError
      │ If the mark does not exist Then Put it, on a short lease
      ▼
    publish ──▶ raised: the mark is deleted if it is still ours
      │
      ▼
    confirm: If it is ours and still on the short lease Then Put it on the long one

The short lease bounds what a publisher leaves behind that dies in the middle; the long one (`etcd_lock_queued_ttl`,
from the eta on, no longer than the message's `expires`) a message that is lost. The worker moves or deletes the mark
under its own id only (see `standing`), so a confirmation that comes late finds nothing to confirm. A claim without an
answer could be carried out later, when its message has begun already, and then make others believe that it still
waits: so its lease is revoked as soon as etcd answers, and with it whatever hangs on it.

A mark only ever keeps a publisher from publishing. No run depends on it: one that has lapsed, or could not be put,
means a message more. And etcd may take `PATIENCE` of a publisher's time, no more, whatever state it is in.

A message that is published once more under its id, by a beat that cannot know whether it was before, makes no mark:
its copy may have run. Then it is dropped, and what its mark kept from being published would be done by nobody.

Not marked, and let through: what somebody may be waiting for under an id that was given out before, and what Celery
publishes by itself: members of chains, groups and chords, callbacks, a signature that was frozen, `Task.replace`, the
task's own retry, a message that was put back. ``send_task`` by name never comes here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from celery.utils.time import maybe_make_aware

from celery_etcd_lock.etcd.api import Compare, Range, Transport, Txn, TxnReply
from celery_etcd_lock.exceptions import (
    ConfigError,
    DuplicateTaskError,
    EtcdLockError,
    EtcdUnavailable,
    UnstableKeyError,
)
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.errands import Errands
from celery_etcd_lock.tasks.marks import Mark, task_id_in
from celery_etcd_lock.tasks.message import HEADER, flagged_queued, is_repeated, was_put_back
from celery_etcd_lock.tasks.runtime import Runtime

if TYPE_CHECKING:
    from types import TracebackType

    from celery import Celery
    from celery.result import AsyncResult

    from celery_etcd_lock.tasks.task import SingletonTask

__all__ = ["PATIENCE", "applies", "long_ttl", "send"]

R = TypeVar("R")

logger = logging.getLogger("celery_etcd_lock")

PATIENCE = 1.0
"""Seconds that etcd may take of one publish, all requests together."""

_PUBLISHING = 30.0
"""Seconds for which a mark stands at least while its message is being published."""

_GRACE = 60.0
"""Seconds for which a mark stands after its message has expired: clocks differ."""

_LONGEST = 10 * 365 * 86_400.0
"""Seconds, however far away the eta is: etcd grants no lease for ever."""

_CANVAS = frozenset({
    "chain", "chord", "group_id", "group_index", "reply_to", "root_id", "parent_id", "replaced_task_nesting",
})  # fmt: skip
"""Options that Celery gives to what is part of something larger. Whatever they say: a chain's last has an empty one."""


def applies(task: SingletonTask, options: Mapping[str, Any]) -> bool:
    """Whether publishing `task`, which has `unique_queued`, with these options asks for a mark.

    Ours among them have gone into the header.
    """
    return (
        isinstance(options.get("headers"), Mapping)  # else Celery says what is wrong with that
        and Settings.from_app(task.app).enabled is not False
        and not task.app.conf.task_always_eager
        and not task.name.startswith("celery.")
        and not options.get("retries")
        and _CANVAS.isdisjoint(options)
        and not was_put_back(options["headers"])
    )


def send(
    task: SingletonTask,
    publish: Callable[..., AsyncResult[Any]],
    args: Any,
    kwargs: Any,
    task_id: str,
    options: Mapping[str, Any],
) -> AsyncResult[Any]:
    """Publish by `publish`, unless a message of the same key is queued: then the result of that.

    `DuplicateTaskError` in its place where ``on_duplicate="raise"``. `UnstableKeyError` where the arguments give no
    key: the worker would fail with it. Never anything because of etcd.
    """
    observes = Settings.from_app(task.app).enabled == "observe"
    try:
        lock = task.lock_name(tuple(args or ()), kwargs)
    except UnstableKeyError:
        if not observes:
            raise
        return publish(args, kwargs, task_id=task_id, **options)
    mark = Mark.queued(lock, task.name, task_id)
    publication = _Publication(task, mark, repeated=is_repeated(options["headers"]))
    existing = publication.claim()
    if existing:
        what = "etcd_lock.observed: %s[%s] is published; with etcd_lock_enabled=True it would not be: %s is queued"
        if not observes:
            what = "etcd_lock.duplicate: %s[%s] is not published: it is queued already, as %s"
        logger.log(logging.WARNING if observes else logging.INFO, what, task.name, task_id, existing)
        if not observes:
            publication.settle()
            if _on_duplicate(task, options) == "raise":
                raise DuplicateTaskError(task.name, existing)
            return task.AsyncResult(existing)
    if publication.claimed:
        options = {**options, "headers": flagged_queued(options["headers"])}
    try:
        result = publish(args, kwargs, task_id=task_id, **options)
    except BaseException:
        publication.withdraw()
        raise
    publication.confirm(long_ttl(task, options))
    return result


def _on_duplicate(task: SingletonTask, options: Mapping[str, Any]) -> str | None:
    for_this_call: str | None = options["headers"][HEADER].get("on_duplicate")
    return for_this_call or task.on_duplicate


def long_ttl(task: SingletonTask, options: Mapping[str, Any]) -> float:
    """Seconds for which the mark of a message published with these options stands, if nobody takes it away."""
    countdown, eta = options.get("countdown"), options.get("eta")
    begins = max(0.0, _seconds_until(task.app, countdown or eta))
    ttl = begins + task._queued_ttl()
    expires = options.get("expires", task.expires)
    if expires is not None:
        ttl = min(ttl, max(0.0, _seconds_until(task.app, expires)) + _GRACE)
    return min(ttl, _LONGEST)


def _seconds_until(app: Celery, moment: Any) -> float:
    """`moment` as Celery takes it: seconds from now, a datetime, or that as text. 0 for what Celery will refuse."""
    try:
        if isinstance(moment, str):
            moment = datetime.fromisoformat(moment.replace("Z", "+00:00"))
        if isinstance(moment, datetime):
            return (maybe_make_aware(moment, app.timezone) - datetime.now(timezone.utc)).total_seconds()
        return float(moment or 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0


class _Patience:
    """Counts the time that is spent within it."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._left, self._since = self.left(), 0.0

    def left(self) -> float:
        """Seconds."""
        spent = time.monotonic() - self._since if self._since else 0.0
        return max(0.0, self._left - spent)


class _Publication:
    """The mark of one message on its way into the queue."""

    def __init__(self, task: SingletonTask, mark: Mark, *, repeated: bool) -> None:
        self._app = task.app
        self._runtime = Runtime.of(task.app)
        self._mark = mark
        self._repeated = repeated
        self._patience = _Patience(PATIENCE)
        self._lease = 0
        """What the mark hangs on."""
        self._is_new = False
        """This publication has made it, not an earlier one of the same id."""
        self._doubtful = False
        """A request that makes it has no answer."""
        self.claimed = False
        """The mark is this message's, or may be."""

    def claim(self) -> str:
        """The id of the message that is queued already; ``""`` if there is none, or nobody knows."""
        if self._repeated:
            return self._look()
        reply = self._ask(self._claim)
        if reply is None:
            self.claimed = self._doubtful
            return ""
        self._doubtful = reply.header.unanswered
        if reply.succeeded:
            self.claimed = self._is_new = True
            return ""
        (found,) = reply.range(0).kvs
        if found.value == self._mark.value:
            # By an earlier try of this request, or by somebody who published this very id before.
            self.claimed, self._is_new = True, self._doubtful
            self._lease = found.lease
            return ""
        return task_id_in(found.value)

    def _look(self) -> str:
        reply = self._ask(lambda transport: transport.range(Range(self._mark.key), timeout=self._patience.left()))
        if reply is None or not reply.kvs:
            return ""
        (found,) = reply.kvs
        self.claimed = found.value == self._mark.value
        return "" if self.claimed else task_id_in(found.value)

    def _claim(self, transport: Transport) -> TxnReply:
        return self._runtime.leases.put(
            transport, _PUBLISHING, lambda lease: self._put(transport, lease), timeout=self._patience.left
        )

    def _put(self, transport: Transport, lease: int) -> TxnReply:
        self._lease = lease
        put = Txn([self._mark.is_absent()], [self._mark.put(lease)], [Range(self._mark.key)])
        try:
            return transport.txn(put, timeout=self._patience.left())
        except EtcdUnavailable as error:
            self._doubtful = error.unanswered
            raise

    def confirm(self, ttl: float) -> None:
        """It is published: let the mark stand for `ttl` seconds."""
        if self.claimed and not (self._doubtful or self._repeated):
            on_that_lease = Compare(self._mark.key, "lease", "==", self._lease)
            condition = [self._mark.is_ours(), on_that_lease]
            self._ask(
                lambda transport: self._runtime.leases.put(
                    transport,
                    ttl,
                    lambda lease: transport.txn(Txn(condition, [self._mark.put(lease)]), timeout=self._patience.left()),
                    timeout=self._patience.left,
                )
            )
        self.settle()

    def withdraw(self) -> None:
        """It could not be published."""
        if self._is_new and not self._doubtful:
            delete = Txn([self._mark.is_ours()], [self._mark.delete()])
            self._ask(lambda transport: transport.txn(delete, timeout=self._patience.left()))
        self.settle()

    def settle(self) -> None:
        """Let nothing come of requests without an answer."""
        if self._doubtful and self._lease:
            lease = self._lease
            self._runtime.leases.forget(lease)
            Errands.of(self._app).later(lambda transport: transport.lease_revoke(lease))

    def _ask(self, request: Callable[[Transport], R]) -> R | None:
        """What etcd answers, if it does; else None, and others are spared."""
        respite = self._runtime.respite
        if not respite.may_try():
            return None
        try:
            with self._patience:
                reply = request(self._runtime.transport())
        except ConfigError:
            raise
        except EtcdLockError as error:
            respite.begins(error)
            return None
        respite.over()
        return reply
