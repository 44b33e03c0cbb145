"""Taking a lock: join the queue, wait behind those who keep us out, be sure, go in.

One request takes a lock that is free. All that is sent is conditional on the session's epoch, so whatever
comes late does nothing; a key that is there already is ours only if it holds what this very acquire puts, a
nonce in it, on our lease, under a name that is given out once at a time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache
from itertools import count
from typing import TypeAlias

from celery_etcd_lock.etcd.api import Compare, KeyValue, Operation, Put, Range, RangeReply, Txn, TxnReply, created_at
from celery_etcd_lock.exceptions import (
    EtcdRejected,
    EtcdUnavailable,
    LeaseNotFound,
    LockContended,
    LockLost,
    LockTimeout,
    NoSpace,
)
from celery_etcd_lock.locks import queue, sibling
from celery_etcd_lock.locks.contender import Contender
from celery_etcd_lock.locks.held import HeldLock
from celery_etcd_lock.locks.rider import Rider, ride
from celery_etcd_lock.locks.session import Session
from celery_etcd_lock.locks.waiting import Bell

__all__ = ["acquire"]

logger = logging.getLogger(__name__)

_PAUSE = 0.2
"""Seconds between two looks while etcd does not answer."""

_PAUSE_WHEN_FULL = 1.0
"""The same while it is full and therefore, before 3.5.7, refuses to look: that lasts until somebody makes room."""

_nonces = count(int.from_bytes(os.urandom(5), "big"))
"""Each acquire of this process takes one. A forked child goes on with the same, on another lease."""

_Found: TypeAlias = tuple[tuple[KeyValue, ...], int]
"""Who keeps us out (empty: nobody), and the revision of which that is true."""


def acquire(
    session: Session,
    name: str,
    mode: queue.Mode = queue.EXCLUSIVE,
    *,
    blocking: bool = True,
    timeout: float | None = None,
    describe: Mapping[str, str | int] | None = None,
    value: bytes | None = None,
    rider: Rider | None = None,
    at_least_for: float = 0.0,
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> HeldLock:
    """Take the lock `name` in `mode`. `describe` is added to what the contender says of itself in etcd.

    Not `blocking`: `LockContended` at once if it cannot be had, and no trace of the attempt is left. Else it waits
    its turn, for `timeout` seconds (None: for ever): `LockTimeout`. Both name one who keeps us out. `LockLost` if
    the session is lost meanwhile, `EtcdUnavailable` if etcd does not answer the first request, `NoSpace` if it
    is full. Whatever exception ends it, one of a signal's handler among them, the contender goes.

    With a ``task_id`` in `describe` it also excludes every other contender that says the same. `value` is put as it
    is, instead of a description (an election's).

    `rider` rides along if its own condition holds, else it is dropped (`HeldLock.rode`): for a try in the transaction
    that takes the lock, for a wait in one right after. It may have ridden though the acquire fails.

    `at_least_for` seconds the lock stays taken once it is held, though it is released before or this process dies.
    (etcd may make more of it: its shortest lease is 2 s by default.) That takes two more requests.

    `waiting` is entered around each blocking wait to be woken, never around a request: an exception that a signal's
    handler raises there ends the acquire as any does.
    """
    session.assert_trusted()
    contender = session.contenders.take(name, mode.kind, f"{next(_nonces):012x}", sibling=at_least_for > 0)
    attempt = _Attempt(session, contender, mode, describe, value, rider, at_least_for, waiting)
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
    attempt.leave_sibling()
    return held


class _Attempt:
    def __init__(
        self,
        session: Session,
        contender: Contender,
        mode: queue.Mode,
        describe: Mapping[str, str | int] | None,
        value: bytes | None,
        rider: Rider | None,
        at_least_for: float,
        waiting: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.session = session
        self.contender = contender
        self.name = contender.name
        self.mode = mode
        self.task_id = str(describe.get("task_id", "")) if describe else ""
        if value is None:
            value = queue.value_of(
                host=session.host,
                pid=session.pid,
                since=_now(),
                nonce=contender.nonce,
                extra=describe,
            )
        self.value = value
        self.rider = rider
        """What has still to ride."""
        self.rode = False
        self.at_least_for = at_least_for
        self.stays_until = 0.0
        self.waiting = waiting

    def run(self, blocking: bool, timeout: float | None) -> HeldLock:
        until = None if timeout is None else time.monotonic() + timeout
        if blocking:
            joined = self.join()
            token = joined if isinstance(joined, int) else self.wait(until, joined)
        else:
            token = self.take()
        if self.at_least_for > 0:
            self.stays_until = sibling.move(self.session, self.contender, self.value, self.at_least_for)
        if self.rider is not None:
            self.rode = ride(self.session, self.contender, self.rider)
        return HeldLock(self.session, self.contender, token, rode=self.rode)

    def leave_sibling(self) -> None:
        """From here on the sibling, if there is one, stays though its contender goes."""
        if self.contender.sibling is not None:
            self.contender.sibling.stays_until = self.stays_until

    def entry(self) -> tuple[list[Compare], list[Operation], list[Operation]]:
        """Of our key, and of its sibling: that it is not there, to put it, and to read it."""
        absent: list[Compare] = []
        puts: list[Operation] = []
        own: list[Operation] = []
        for each in self.contender.leaving:
            absent.append(created_at(each.key, 0))
            puts.append(Put(each.key, self.value, self.session.lease))
            own.append(Range(each.key))
        return absent, puts, own

    def send(
        self,
        compare: Sequence[Compare],
        success: Sequence[Operation],
        failure: Sequence[Operation],
        rider: Rider | None = None,
    ) -> TxnReply | None:
        """Send what may create our key, in the session's epoch; keep account of what is not answered.

        None: it was refused because of a lease, and that may be one of the rider's.
        """
        doubt, epoch = self.contender.unanswered, self.session.epoch
        self.contender.unanswered = True  # until the answer is here, whatever interrupts us
        own_key = self.session.key
        compare = [*compare, Compare(own_key, "mod", "==", epoch)]
        if rider is not None:
            compare, success = [*compare, *rider.compare], [*success, *rider.operations]
        try:
            reply = self.session.txn(Txn(compare, success, [Range(own_key), *failure]))
        except LeaseNotFound:
            if rider is not None and rider.leases - {self.session.lease}:
                self.contender.unanswered = doubt
                return None
            self.session.lease_gone()
            raise LockLost(self.session.reason) from None
        except EtcdUnavailable as error:
            self.contender.unanswered = doubt or error.unanswered
            raise
        except EtcdRejected:
            self.contender.unanswered = doubt  # a definite no: nothing of it is under way
            raise
        if reply.succeeded:  # known to be there before the doubt is gone, whatever interrupts us
            self.session.contenders.created(self.contender, reply.header.revision)
        self.contender.unanswered = doubt or reply.header.unanswered
        if not reply.succeeded:
            self.session.saw_own_key(reply.range(0).kvs, sent_in=epoch)
        return reply

    def take(self) -> int:
        """One request: the lock if nobody keeps us out, and no trace otherwise. (For a slot two, if others are in.)

        One more where the rider is dropped. Returns the fencing token.
        """
        seen, rider = 0, self.rider
        while True:
            epoch, twins = self.session.epoch, self.mode.twins(self.name, self.task_id)
            absent, mine, own = self.entry()
            found = [*own, *self.mode.first(self.name, self.task_id)]
            reply = self.send([*absent, *self.mode.free(self.name, seen)], [*mine, *twins], found, rider)
            if reply is None:
                rider = None
                continue
            if reply.succeeded:
                created, queued = reply.header.revision, _contenders(reply, len(mine), len(twins))
            else:
                created, queued = self.adopt(reply), _contenders(reply, 1 + len(mine))
            if self.keeping_out(queued):
                raise self.contended(LockContended, queued)
            if created:
                if rider is not None:  # whichever try it was that made our key
                    self.rider, self.rode = None, True
                elif reply.succeeded:
                    self.rider = None
                return reply.header.revision
            # Only the epoch was another, or a slot is free as of this revision, or our name was not: once more.
            newest = max((kv.create_revision for kv in queued), default=0)
            named = any(reply.range(number).kvs for number in range(1, 1 + len(mine)))
            if newest <= seen and not named and reply.range(0).kvs[0].mod_revision == epoch:
                rider = None  # it was none of that
            seen = reply.header.revision

    def join(self) -> int | _Found | None:
        """One request: stand in the queue, and hold the lock if nobody ahead keeps us out. None: look who does."""
        while True:
            # In this order: etcd carries them out one after the other, so whoever is found was there before us.
            others = self.mode.before(self.name, self.task_id)
            absent, mine, own = self.entry()
            reply = self.send(absent, [*others, *mine], own)
            assert reply is not None
            if reply.succeeded:
                ahead, created = self.keeping_out(_contenders(reply, 0, len(others))), reply.header.revision
                return (ahead, created) if ahead else created
            if self.adopt(reply):
                return None

    def adopt(self, reply: TxnReply) -> int:
        """The create revision of our key, if it was made by an earlier try of this very acquire; else 0.

        `reply` is what `send` got, with our own keys first among what was asked for.
        """
        mine = reply.range(1).kvs
        if mine and (mine[0].value, mine[0].lease) == (self.value, self.session.lease):
            self.session.contenders.created(self.contender, mine[0].create_revision)
            return mine[0].create_revision
        # Where somebody put a key under a name of ours, queue behind it, under another.
        for number, each in enumerate(self.contender.leaving, 1):
            if reply.range(number).kvs:
                another = self.session.contenders.take_another(each)
                self.contender = another if another.of is None else another.of
        return 0

    def keeping_out(self, queued: Collection[KeyValue]) -> tuple[KeyValue, ...]:
        """Those of `queued` that we have to wait for; our own key and later ones do not count."""
        return queue.keeping_out(self.mode, self.name, self.ahead(queued), self.task_id) if queued else ()

    def ahead(self, queued: Iterable[KeyValue]) -> list[KeyValue]:
        created = self.contender.create_revision
        return [kv for kv in queued if not created or kv.create_revision < created]

    def wait(self, until: float | None, found: _Found | None) -> int:
        """Until nobody keeps us out. `found`: what a look would find now. Each asks for our own key: it may be gone."""
        woken = Bell()
        self.session.contenders.on_lost(self.contender, lambda _reason: woken.set())
        if until is None and self.session.contenders.waits_for_own_thread(self.contender):
            logger.warning("etcd_lock.waits_for_itself: %s is wanted by a thread that is in it already", self.name)
        while True:
            try:
                ahead, revision = found or self.look_anew(woken)
            except EtcdUnavailable as error:
                self.pause(woken, until, _PAUSE_WHEN_FULL if isinstance(error, NoSpace) else _PAUSE)
                continue
            if not ahead:
                return revision
            # As a watch may sit on a member that is cut off, look again once per TTL all the same.
            with (
                self.session.contenders.listening(ahead, woken) as others,
                self.session.wakeups.watching(self.name, others, revision + 1, woken),
            ):
                self.pause(woken, until, self.session.ttl)
                # Before the watch ends: that takes time, and whose turn it is may go in first.
                found = None
                with suppress(EtcdUnavailable):
                    found = self.look_anew(woken)

    def look_anew(self, woken: Bell) -> _Found:
        """Look, and let what happens from here on wake us."""
        woken.clear()
        self.session.assert_trusted()
        return self.look()

    def look(self) -> _Found:
        created = self.contender.create_revision
        queued = self.mode.ahead(self.name, created, self.task_id)
        reply = self.session.txn(Txn([], [Range(self.contender.key, keys_only=True), *queued]))
        revision = reply.header.revision
        if revision < created:
            raise EtcdUnavailable("an etcd member answered that has not seen our own key yet")
        mine = reply.range(0).kvs
        if not mine or mine[0].create_revision != created:
            raise LockLost(f"{self.name}: our key {self.contender.key} was deleted while we waited")
        return self.keeping_out(_contenders(reply, 1)), revision

    def pause(self, woken: Bell, until: float | None, longest: float) -> None:
        """Wait to be woken. `LockTimeout` once the time is over."""
        if until is None:
            with self.waiting():
                woken.wait(longest)
            return
        left = until - time.monotonic()
        if left <= 0:
            raise self.contended(LockTimeout, self.first())
        with self.waiting():
            woken.wait(min(left, longest))

    def first(self) -> list[KeyValue]:
        try:
            return _contenders(self.session.txn(Txn([], self.mode.first(self.name, self.task_id))), 0)
        except EtcdUnavailable:
            return []

    def contended(self, error: type[LockContended], queued: Iterable[KeyValue]) -> LockContended:
        who = queue.blamed(self.mode, self.name, self.ahead(queued), self.task_id)
        contended = error(self.name, who.holder, who.since)
        contended.task_id = who.task_id
        return contended


def _now() -> str:
    """ISO 8601, UTC."""
    now = time.time()
    return f"{_second(int(now))}.{int(now * 1000) % 1000:03d}Z"


@lru_cache(maxsize=1)
def _second(now: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))


def _contenders(reply: TxnReply, since: int, count: int | None = None) -> list[KeyValue]:
    """What the ranges from number `since` on found, all or `count` of them."""
    asked = reply.responses[since : None if count is None else since + count]
    return [kv for found in asked if isinstance(found, RangeReply) for kv in found.kvs]
