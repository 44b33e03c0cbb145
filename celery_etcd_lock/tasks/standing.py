"""What stands in etcd for the message of one turn: that it is queued (`queued`), that it waits (`Conflict.coalesce`).

**Queued.** ``"until_start"``: the transaction that takes the lock deletes the mark, so that whoever publishes from
then on gets a message of his own, and for whoever was turned away before the run begins after that. ``"until_end"``:
that transaction moves it to the session's lease, for it must go with the process; after the body it is deleted, or put
on a long lease again where the message goes back into the queue.

**Waiting.** Under `coalesce` a message that finds the lock taken claims the waiting mark of its key. Whoever has it is
put back, and claims it again each time it comes in vain; whoever finds another's is skipped, for that one has not begun
and will do his work. That holds because of how the requests can fall:

* the waiter takes the lock, and the mark goes before the body begins. One who finds the mark before that is skipped
  rightly: the body begins after he came. One who comes after it finds no mark, and is the next waiter;
* between the two the holder *is* the waiter: then the mark proves nothing, and is taken over (at worst a run too many);
* two claim at once: one transaction of two puts, the other finds it;
* a claim without an answer, carried out when its message has begun already, would make others believe in a waiter that
  there is not. So it compares the session's epoch, and who got no answer has a new epoch begin;
* a waiter that is lost, or kept off by busy workers for longer than the mark's lease, lets another become the waiter.
  If it comes after all it is the one that is skipped.

etcd away: a claim that fails puts the message back, as if nobody else waited. A mark that cannot be taken away in time
is taken away later, and its lease ends it if that is never.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from celery.exceptions import Ignore, Reject, Retry

from celery_etcd_lock.etcd.api import Compare, Operation, Range, Transport, Txn, TxnReply
from celery_etcd_lock.exceptions import EtcdLockError, EtcdUnavailable, LockContended
from celery_etcd_lock.locks.rider import Rider
from celery_etcd_lock.tasks.errands import Errands
from celery_etcd_lock.tasks.marks import Mark, task_id_in
from celery_etcd_lock.tasks.message import Waits, header_of, is_queued
from celery_etcd_lock.tasks.queued import PATIENCE, long_ttl
from celery_etcd_lock.tasks.runtime import Runtime

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_etcd_lock.locks.held import HeldLock
    from celery_etcd_lock.locks.session import Session
    from celery_etcd_lock.tasks.task import SingletonTask

__all__ = ["WAITS_FOR", "Standing", "take_away"]

WAITS_FOR = 25.0
"""Seconds, at least, for which a waiting mark stands: the longest countdown of `coalesce`, and time to be taken."""

_INSISTS = 600.0
"""Seconds for which a mark is still to be taken away while etcd does not answer."""

_CLAIMS = 4
"""How often one tries to claim, others doing so at the same time."""


class Standing:
    """The marks of one message in one turn. None of it raises because of etcd, but for `rider`'s own transaction."""

    def __init__(self, runtime: Runtime, task: SingletonTask, request: Context, lock: str, *, coalesces: bool) -> None:
        self._runtime = runtime
        self._task = task
        self._request = request
        self._id = str(request.id or "")
        self._until_end = task.unique_queued == "until_end"
        self._coalesces = coalesces and bool(self._id) and not request.is_eager
        self._lock = lock
        header = header_of(request)
        self._waited = self._coalesces and Waits.of(header).count > 0
        """The waiting mark may be this message's."""
        self._queued = Mark.queued(lock, task.name, self._id) if is_queued(header) else None
        self._lease: int | None = None
        """Of the session on which the queued mark is to go."""
        self._began = False

    @cached_property
    def _wait(self) -> Mark:
        """Only where the policy lets one wait: all other runs do without."""
        return Mark.waiting(self._lock, self._task.name, self._id)

    # -- the lock is taken

    def rider(self, session: Session) -> Rider | None:
        """What rides with taking the lock."""
        changes = self._changes(session)
        if not changes:
            return None
        return Rider([compare for compare, _ in changes], [operation for _, operation in changes])

    def begins(self, held: HeldLock, *, ridden: bool) -> None:
        """The body is about to begin. `ridden`: `rider` has been given to the acquire."""
        changes = self._changes(held.session)
        self._began = True
        if held.rode or (ridden and len(changes) == 1):
            return  # done; or the mark is none of ours any more
        for compare, operation in changes:
            try:
                held.session.txn(Txn([compare], [operation]), timeout=PATIENCE)
            except EtcdLockError:
                self.begins_unlocked()
                return

    def begins_unlocked(self) -> None:
        """The body is about to begin, though etcd is away, or does not matter."""
        self._began = True
        marks = [self._wait] if self._waited else []
        if self._queued is not None and not self._until_end:
            marks.append(self._queued)
        take_away(self._task, marks)

    def _changes(self, session: Session) -> list[tuple[Compare, Operation]]:
        changes: list[tuple[Compare, Operation]] = []
        if self._queued is not None:
            self._lease = session.lease
            moved = self._queued.put(session.lease) if self._until_end else self._queued.delete()
            changes.append((self._queued.is_ours(), moved))
        if self._waited:
            changes.append((self._wait.is_ours(), self._wait.delete()))
        return changes

    def _mark(self) -> Mark:
        assert self._queued is not None
        return self._queued

    # -- it is taken by somebody else

    def others_wait(self, contended: LockContended) -> bool:
        """Claim to be the one that waits, where the policy asks for it. True: somebody else is."""
        if not self._coalesces or contended.task_id == self._id:
            return False
        try:
            waits = self._claim(self._runtime.session(), contended.task_id)
        except EtcdLockError:
            return False
        self._waited = not waits
        return waits

    def _claim(self, session: Session, holder: str) -> bool:
        condition = self._wait.is_ours() if self._waited else self._wait.is_absent()
        for _ in range(_CLAIMS):
            epoch = session.epoch
            reply = self._send_claim(session, [condition, Compare(session.key, "mod", "==", epoch)])
            if reply.succeeded:
                return False
            session.saw_own_key(reply.range(1).kvs, sent_in=epoch)
            found = reply.range(0).kvs
            if not found:
                condition = self._wait.is_absent()
            elif found[0].value == self._wait.value:
                condition = self._wait.is_ours()
            elif (waiter := task_id_in(found[0].value)) and waiter != holder:
                return True
            else:
                condition = Compare(self._wait.key, "value", "==", found[0].value)
        return False

    def _send_claim(self, session: Session, compare: Sequence[Compare]) -> TxnReply:
        failure = [Range(self._wait.key), Range(session.key)]
        unanswered = True
        try:
            reply = self._runtime.leases.put(
                session.transport,
                WAITS_FOR,
                lambda lease: session.txn(Txn(compare, [self._wait.put(lease)], failure)),
            )
            unanswered = reply.header.unanswered
        except EtcdUnavailable as error:
            unanswered = error.unanswered
            raise
        except EtcdLockError:
            unanswered = False
            raise
        finally:
            if unanswered:
                session.contenders.begin_epoch()
        return reply

    # -- the end of the turn

    def ends(self, error: BaseException | None) -> None:
        """The turn is over: the body has run or not, and `error` came of it."""
        rejected = isinstance(error, Reject) and getattr(error, "requeue", False) and self._task.acks_late
        stays = isinstance(error, Retry) or bool(rejected)
        if self._began:
            if self._queued is not None and self._until_end:
                if stays:
                    self._go_on_standing(error)
                else:
                    take_away(self._task, [self._queued], within=PATIENCE)
        elif stays:
            if self._queued is not None and self._until_end and self._may_have_ridden(error):
                self._go_on_standing(error)
        elif not isinstance(error, Ignore):  # by another copy, which is further, and may wait under this very mark
            marks = [self._queued] if self._queued is not None else []
            take_away(self._task, [*marks, self._wait] if self._waited else marks, within=PATIENCE)

    def _may_have_ridden(self, error: BaseException | None) -> bool:
        """Whether the acquire may have carried out its rider, though it failed."""
        reason = getattr(error, "exc", None)
        refused = isinstance(reason, LockContended) and reason.task_id != self._id
        return self._lease is not None and not refused

    def _go_on_standing(self, error: BaseException | None) -> None:
        """The message is in its queue again."""
        mark, ours = self._mark(), self._lease
        condition = [mark.is_ours()]
        if ours is not None:  # unless it has begun elsewhere meanwhile
            condition.append(Compare(mark.key, "lease", "==", ours))
        when: Any = getattr(error, "when", None)
        ttl = long_ttl(self._task, {"eta": when, "expires": self._request.expires})

        def put(transport: Transport) -> None:
            self._runtime.leases.put(
                transport,
                ttl,
                lambda lease: transport.txn(Txn(condition, [mark.put(lease)]), timeout=PATIENCE),
                timeout=lambda: PATIENCE,
            )

        try:
            put(self._runtime.transport())
        except EtcdLockError:
            Errands.of(self._task.app).later(put, patience=_INSISTS)


def take_away(task: SingletonTask, marks: Sequence[Mark], *, within: float = 0.0) -> None:
    """Delete those of `marks` that still say so: at once if etcd answers `within` so many seconds, else later."""

    def each(transport: Transport, timeout: float | None = None) -> None:
        for mark in marks:
            transport.txn(Txn([mark.is_ours()], [mark.delete()]), timeout=timeout)

    if not marks:
        return
    if within:
        try:
            each(Runtime.of(task.app).transport(), within)
        except EtcdLockError:
            pass
        else:
            return
    Errands.of(task.app).later(each, patience=_INSISTS)
