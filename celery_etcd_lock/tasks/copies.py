"""Copies of one message: which of them is to run, and which comes too late.

A broker delivers a message again when it has waited too long for the acknowledgement (Redis: the visibility timeout,
shorter than the task, or than a message's stay in a busy worker) or its worker has died. Beside each other the copies
never run: they have the same task id, and the lock's queue keeps those apart. But one that comes when the other has
finished would run once more, and each that is put back goes on by itself. So what has become of a message is written
down, in one key ``/<namespace>/done/<task id>``, whose `Mark` only ever advances::

    waiting(retries, count) ──▶ ending(retries) ──▶ done(retries) ──▶ waiting(retries + 1, count) ──▶ …
    put back for the            the body has        callbacks, result      the task has retried
    count-th time               returned            and chord are through  itself

*Ending* is put by the very transaction that releases the lock, on the lease of the session: whoever gets the lock
afterwards sees it, and if the process dies before the next link of the chain is sent, it vanishes, and the copy runs.
*Done* is on a lease of its own, for ``etcd_lock_done_ttl`` seconds. A body that failed leaves no mark: who sends such a
message again (from a dead-letter queue) wants it to run.

Only messages of which there may be copies write or ask: those with ``acks_late``, those that say that they were
delivered again, that have been under way for a quarter of the visibility timeout, or lain in a worker's memory (put
back, or with an eta). And a mark counts only for copies of the same publication (`message.nonce_of`): the same id
published anew is a new message. (Who publishes by name does not say which it is. Then the first delivery does; and
one of which there was another before is taken for a copy of whatever has that id.)
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from urllib.parse import quote

from celery import signals as celery_signals
from celery import states

from celery_etcd_lock.etcd.api import Compare, Delete, Operation, Put, Range, Txn, created_at
from celery_etcd_lock.exceptions import EtcdLockError, EtcdUnavailable
from celery_etcd_lock.tasks.message import due_at, nonce_of, was_redelivered

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_etcd_lock.locks.held import HeldLock
    from celery_etcd_lock.locks.session import Session
    from celery_etcd_lock.tasks.message import Waits
    from celery_etcd_lock.tasks.runtime import Runtime
    from celery_etcd_lock.tasks.task import SingletonTask

__all__ = ["Copies", "Mark", "Verdict", "mark_key", "verdict"]

logger = logging.getLogger("celery_etcd_lock")

Verdict: TypeAlias = Literal["run", "again", "drop"]
"""Whether a copy may run, is to come again later, or has been overtaken."""

_json = json.JSONEncoder(separators=(",", ":")).encode
_STAGES = ("waiting", "ending", "done")
_ATTRIBUTE = "_etcd_lock_copies"
_PAUSE = 1.0
"""Seconds between two attempts to finish a mark while etcd does not answer."""


class Mark(NamedTuple):
    """How far the copies of one publication have come. In a copy's own hands: how far it is itself."""

    stage: Literal["waiting", "ending", "done"]
    retries: int
    """Which attempt of the task, as Celery counts."""
    nonce: str = ""
    count: int = 0  # type: ignore[assignment]  # instead of tuple's
    """While it waits: how often it was put back."""

    def to_json(self) -> bytes:
        record: dict[str, Any] = {"state": self.stage, "retries": self.retries}
        record |= {"nonce": self.nonce} if self.nonce else {}
        record |= {"count": self.count} if self.stage == "waiting" else {}
        return _json(record).encode()

    @classmethod
    def parse(cls, value: bytes) -> Mark | None:
        """What `to_json` made; None for anything else."""
        try:
            record = json.loads(value)
            if record["state"] not in _STAGES:
                return None
            return cls(
                record["state"], int(record["retries"]), str(record.get("nonce", "")), int(record.get("count", 0))
            )
        except (ValueError, TypeError, KeyError):
            return None


def verdict(mark: Mark | None, mine: Mark) -> Verdict:
    """What a copy that is at `mine` has to do, the mark saying that one of them is at `mark`."""
    if mark is None or (mine.nonce and mark.nonce != mine.nonce) or mark.retries < mine.retries:
        return "run"
    if mark.retries > mine.retries or mark.stage == "done":
        return "drop"
    if mark.stage == "ending":
        return "again"
    return "drop" if mark.count > mine.count else "run"


def mark_key(namespace: str, task_id: str) -> str:
    """Where the mark of a task id is."""
    return f"/{namespace}/done/{quote(task_id, safe='')}"


class Copies:
    """The copies of the message of one request, as one of them sees them: what its header says, and has waited."""

    def __init__(
        self, runtime: Runtime, task: SingletonTask, request: Context, header: Mapping[str, Any], waits: Waits
    ) -> None:
        self._runtime = runtime
        self._name = task.name
        self._id = str(request.id or "")
        self._ttl = runtime.settings.done_ttl
        self._mine = Mark("waiting", request.retries or 0, nonce_of(header), waits.times)
        possible = bool(self._id) and not request.is_eager
        due = due_at(request, header)
        late = due is not None and time.time() - due > runtime.countdown_ceiling / 2
        self.overdue = possible and (late or was_redelivered(request, header))
        """It has been under way for so long that there may well be another."""
        self.possible = self.overdue or (possible and bool(waits or request.eta))
        """There may be another."""
        self._marks = self.possible or (possible and bool(task.acks_late))
        self._unknown = possible and due is None
        """Nobody knows for how long it lay in a worker's memory."""
        self._ending: Put | None = None

    @cached_property
    def _key(self) -> str:
        """Only where there may be others: all other runs do without."""
        return mark_key(self._runtime.settings.namespace, self._id)

    def look(self, held: HeldLock | None = None) -> Verdict:
        """One request: whether this copy may run, now that it has the lock `held`, or has seen who has it.

        `EtcdUnavailable` if etcd does not answer, or a member that is behind.
        """
        reply = self._runtime.transport().range(Range(self._key))
        if held is not None and reply.header.revision < held.fencing_token:
            raise EtcdUnavailable("an etcd member answered that has not seen our lock yet")
        found = reply.kvs
        mark = Mark.parse(found[0].value) if found else None
        judged = verdict(mark, self._mine)
        if mark is not None and not self._mine.nonce:
            self._mine = self._mine._replace(nonce=mark.nonce)  # it is a copy of that, as far as anybody can tell
        if judged == "drop":
            what = "etcd_lock.copy_dropped: %s[%s] was delivered more than once, and another copy is further: %s"
            logger.info(what, self._name, self._id, found[0].value.decode(errors="replace"))
        return judged

    # -- put back

    def put_back(self) -> None:
        """It has just been published again: copies that are no further than it was are overtaken."""
        if not (self._unknown or self.overdue):
            return
        mine = self._mine
        after = Mark("waiting", mine.retries, mine.nonce, mine.count + 1)
        try:
            self._runtime.leases.put(self._runtime.transport(), self._ttl, lambda lease: self._advance(after, lease))
        except EtcdLockError as error:
            logger.debug("etcd_lock.copy_not_marked: %s[%s]: %s", self._name, self._id, error)

    def _advance(self, after: Mark, lease: int) -> None:
        transport = self._runtime.transport()
        put = Put(self._key, after.to_json(), lease)
        reply = transport.txn(Txn([created_at(self._key, 0)], [put], [Range(self._key)]))
        if reply.succeeded:
            return
        (found,) = reply.range(0).kvs
        if verdict(Mark.parse(found.value), after) == "run":
            transport.txn(Txn([Compare(self._key, "mod", "==", found.mod_revision)], [put]))

    # -- run

    def ending(self, session: Session) -> tuple[Operation, ...]:
        """What to do in the transaction that releases the lock, the body having returned or retried itself."""
        if not self._marks:
            return ()
        self._ending = Put(self._key, Mark("ending", self._mine.retries, self._mine.nonce).to_json(), session.lease)
        self._session = session
        return (self._ending,)

    def released(self, request: Context) -> None:
        """The lock was released, *ending* with it: to be finished when Celery is through with `request`."""
        if self._ending is not None:
            request.__dict__[_ATTRIBUTE] = self

    def finish(self, state: str | None) -> None:
        """Celery is through: *done*, unless what came after the body has failed."""
        if self._finished(state) or self._session.lost:
            return
        # While *ending* stands no copy runs: that must not last for as long as this process does.
        threading.Thread(target=self._insist, args=(state,), name="etcd-lock-done", daemon=True).start()

    def _insist(self, state: str | None) -> None:
        while not self._session.wait_lost(_PAUSE):
            if self._finished(state):
                return

    def _finished(self, state: str | None) -> bool:
        assert self._ending is not None
        ours = Compare(self._key, "value", "==", self._ending.value)
        transport = self._runtime.transport()
        try:
            if state in {states.SUCCESS, states.RETRY}:
                done = Mark("done", self._mine.retries, self._mine.nonce).to_json()
                self._runtime.leases.put(
                    transport, self._ttl, lambda lease: transport.txn(Txn([ours], [Put(self._key, done, lease)]))
                )
            else:
                transport.txn(Txn([ours], [Delete(self._key)]))
        except EtcdLockError as error:
            logger.warning("etcd_lock.not_marked_done: %s[%s]: %s", self._name, self._id, error)
            return False
        return True


def _finish(task: Any = None, state: str | None = None, **_: Any) -> None:
    copies: Copies | None = task.request.__dict__.pop(_ATTRIBUTE, None)
    if copies is not None:
        copies.finish(state)


# The last that Celery does for a task, whatever came of it.
celery_signals.task_postrun.connect(_finish, weak=False)
