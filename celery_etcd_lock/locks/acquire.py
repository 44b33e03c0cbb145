"""Taking a lock: join the queue, wait behind the nearest contender that keeps us out, be sure, go in.

One request takes a lock that is free. All that is sent is conditional on the session's epoch, so whatever
comes late does nothing; a key that is there already is ours only if it carries the nonce of this very acquire.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from celery_etcd_lock.etcd.api import Compare, KeyValue, Operation, Put, Range, Txn, TxnReply, created_at
from celery_etcd_lock.exceptions import EtcdUnavailable, LeaseNotFound, LockContended, LockLost, LockTimeout
from celery_etcd_lock.locks import queue
from celery_etcd_lock.locks.contender import Contender
from celery_etcd_lock.locks.held import HeldLock
from celery_etcd_lock.locks.session import Session

__all__ = ["acquire"]

_PAUSE = 0.2
"""Seconds between two looks while etcd does not answer."""


def acquire(
    session: Session,
    name: str,
    *,
    blocking: bool = True,
    timeout: float | None = None,
    describe: Mapping[str, str | int] | None = None,
) -> HeldLock:
    """Take the exclusive lock `name`. `describe` is added to what the contender says of itself in etcd.

    Not `blocking`: `LockContended` at once if it is not free, and no trace of the attempt is left. Else it waits
    its turn, for `timeout` seconds (None: for ever): `LockTimeout`. `LockLost` if the session is lost meanwhile,
    `EtcdUnavailable` if etcd does not answer the first request.
    """
    session.assert_trusted()
    attempt = _Attempt(session, session.contenders.take(name, queue.EXCLUSIVE, secrets.token_hex(6)), describe)
    try:
        held = attempt.run(blocking, timeout)
        # The reply may have been long under way: what counts is that the lease is trusted now.
        session.assert_trusted()
    except EtcdUnavailable:
        # No use in asking the same etcd for the removal now: the session does it when it answers again.
        session.contenders.remove_later(attempt.contender)
        raise
    except BaseException:
        session.contenders.remove(attempt.contender)
        raise
    return held


class _Attempt:
    def __init__(self, session: Session, contender: Contender, describe: Mapping[str, str | int] | None) -> None:
        self.session = session
        self.contender = contender
        self.name = contender.name
        self.put = Put(
            contender.key,
            queue.value_of(
                host=session.host,
                pid=session.pid,
                since=datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                nonce=contender.nonce,
                extra=describe,
            ),
            session.lease,
        )

    def run(self, blocking: bool, timeout: float | None) -> HeldLock:
        until = None if timeout is None else time.monotonic() + timeout
        held = self.join() if blocking else self.take()
        return held if held is not None else self.wait(until)

    def send(self, compare: Compare, success: Sequence[Operation], failure: Sequence[Operation]) -> TxnReply:
        """Send what may create our key, in the session's epoch; keep account of what is not answered."""
        doubt, epoch = self.contender.unanswered, self.session.epoch
        self.contender.unanswered = True  # until the answer is here, whatever interrupts us
        own_key = self.session.key
        request = Txn([compare, Compare(own_key, "mod", "==", epoch)], success, [Range(own_key), *failure])
        try:
            reply = self.session.txn(request)
        except LeaseNotFound:
            self.session.lease_gone()
            raise LockLost(self.session.reason) from None
        except EtcdUnavailable as error:
            self.contender.unanswered = doubt or error.unanswered
            raise
        self.contender.unanswered = doubt or reply.header.unanswered
        if not reply.succeeded:
            self.session.saw_own_key(reply.range(0).kvs, sent_in=epoch)
        return reply

    def take(self) -> HeldLock:
        """One request: the lock if nobody is in the queue, and no trace otherwise."""
        asked = [queue.first(self.name), Range(self.contender.key)]
        while True:
            reply = self.send(queue.nobody(self.name), [self.put], asked)
            if reply.succeeded:
                return self.held(reply.header.revision, reply.header.revision)
            first, mine = reply.range(1).kvs, reply.range(2).kvs
            if mine and self.adopt(mine[0]) and first[0].key == mine[0].key:
                return self.held(mine[0].create_revision, reply.header.revision)
            if first:
                raise self.contended(LockContended, first)
            # Only the epoch was another: once more, in the new one.

    def join(self) -> HeldLock | None:
        """One request: stand in the queue, and hold the lock if nobody is ahead."""
        while True:
            join = (self.put, queue.nearest_ahead(self.name, limit=2))
            reply = self.send(created_at(self.contender.key, 0), join, [Range(self.contender.key)])
            if reply.succeeded:
                created = self.contender.create_revision = reply.header.revision
                return self.held(created, created) if len(reply.range(1).kvs) == 1 else None
            mine = reply.range(1).kvs
            if mine and self.adopt(mine[0]):
                return None
            if mine:
                # Somebody put a key under a name of ours: wait behind it, under another.
                self.contender = self.session.contenders.take_another(self.contender)
                self.put = Put(self.contender.key, self.put.value, self.put.lease)

    def adopt(self, kv: KeyValue) -> bool:
        """Whether `kv` was made by an earlier try of this very acquire that got no answer."""
        if queue.describe(kv).nonce != self.contender.nonce:
            return False
        self.contender.create_revision = kv.create_revision
        return True

    def wait(self, until: float | None) -> HeldLock:
        """Until nobody is ahead. Every look asks for our own key, too: it may be gone."""
        woken = threading.Event()
        self.session.contenders.on_lost(self.contender, lambda _reason: woken.set())
        while True:
            self.session.assert_trusted()
            woken.clear()
            try:
                ahead, revision = self.look()
            except EtcdUnavailable:
                self.pause(woken, until, _PAUSE)
                continue
            if ahead is None:
                return self.held(self.contender.create_revision, revision)
            # As a watch may sit on a member that is cut off, look again once per TTL all the same.
            if self.session.contenders.behind(ahead.key, woken):
                self.pause(woken, until, self.session.ttl)
            else:
                with self.session.wakeups.watching(self.name, ahead.key, revision + 1, woken):
                    self.pause(woken, until, self.session.ttl)

    def look(self) -> tuple[KeyValue | None, int]:
        """Who is right ahead of us (None: nobody), and the revision of which that is true."""
        created = self.contender.create_revision
        reply = self.session.txn(Txn([], [Range(self.contender.key), queue.nearest_ahead(self.name, created)]))
        revision = reply.header.revision
        if revision < created:
            raise EtcdUnavailable("an etcd member answered that has not seen our own key yet")
        mine = reply.range(0).kvs
        if not mine or mine[0].create_revision != created:
            raise LockLost(f"{self.name}: our key {self.contender.key} was deleted while we waited")
        ahead = reply.range(1).kvs
        return (ahead[0] if ahead else None), revision

    def pause(self, woken: threading.Event, until: float | None, longest: float) -> None:
        """Wait to be woken. `LockTimeout` once the time is over."""
        if until is None:
            woken.wait(longest)
            return
        left = until - time.monotonic()
        if left <= 0:
            raise self.contended(LockTimeout, self.holders())
        woken.wait(min(left, longest))

    def holders(self) -> tuple[KeyValue, ...]:
        try:
            return self.session.transport.range(queue.first(self.name)).kvs
        except EtcdUnavailable:
            return ()

    def contended(self, error: type[LockContended], holders: tuple[KeyValue, ...]) -> LockContended:
        who = queue.describe(holders[0]) if holders else queue.Description("")
        contended = error(self.name, who.holder, who.since)
        contended.task_id = who.task_id
        return contended

    def held(self, create_revision: int, fencing_token: int) -> HeldLock:
        self.contender.create_revision = create_revision
        return HeldLock(self.session, self.contender, fencing_token)
