"""Asking a holder for its lock back: who hears it, when, and who does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from celery_etcd_lock.etcd.api import KeyValue, Put, Range, Transport, Txn, prefix_end
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.exceptions import EtcdUnavailable, LockLost
from celery_etcd_lock.locks import Election, HeldLock, Mutex, Semaphore, Session
from celery_etcd_lock.locks.asked import Asking, Owner, asked_key, owner_of
from tests.clock import Clock
from tests.workers import until

OpenSession = Callable[..., Session]
BY = {"by": "ann@desk", "at": "2026-01-02T03:04:05Z"}


def contender_of(held: HeldLock) -> KeyValue:
    (kv,) = held.session.transport.range(Range(held.key)).kvs
    return kv


def asking(transport: Transport, held: HeldLock) -> Asking:
    owner = owner_of(transport, held.session.lease)
    assert owner is not None
    return Asking(transport, owner, contender_of(held), **BY)


def wishes(transport: Transport) -> tuple[KeyValue, ...]:
    prefix = asked_key("celery", "")
    return transport.range(Range(prefix, prefix_end(prefix))).kvs


def pass_a_ttl(session: Session, clock: Clock) -> None:
    for _ in range(30):
        clock.now += 1
        session.keep()


def requests(session: Session) -> int:
    count: int = session.transport.requests  # type: ignore[attr-defined]
    return count


def test_a_holder_hears_it_within_its_ttl(
    open_session: OpenSession, new_transport: Callable[[], Transport], prefix: str
) -> None:
    """On every transport, from another client: the lock is lost, for a reason that names who asked, and given back
    by whoever held it. Its session goes on, and so do its other locks."""
    session, transport = open_session(ttl=2), new_transport()
    held, other = Mutex(session, prefix + "a").acquire(), Mutex(session, prefix + "b").acquire()
    reasons: list[str] = []
    held.on_lost(reasons.append)
    wish = asking(transport, held)
    assert wish.ask()
    (kv,) = transport.range(Range(wish.key)).kvs
    assert (kv.lease, json.loads(kv.value)) == (session.lease, {**BY, "revision": contender_of(held).create_revision})
    assert wish.look() in {"none", "told"}
    until(lambda: wish.look() == "told", "the hearing", seconds=20)
    assert reasons == ["ann@desk asked for it back"]
    with pytest.raises(LockLost, match="a: ann@desk asked for it back"):
        held.assert_held()
    assert other.is_held()
    assert held.release() == "lost"
    assert wish.look() == "gone"
    with Mutex(session, prefix + "a").acquire(blocking=False) as again:
        assert again.is_held()
        wish.withdraw()
    assert other.release() == "released"


def test_it_costs_nobody_a_request_until_somebody_asks(session: Session, store: MemoryEtcd, clock: Clock) -> None:
    """Then one to read it, and one to delete it."""
    held = Mutex(session, "/a").acquire()

    def a_ttl() -> int:
        before = requests(session)
        pass_a_ttl(session, clock)
        return requests(session) - before

    assert a_ttl() == 4, "three renewals, and one look at the keys"
    assert asking(MemoryTransport(store), held).ask()
    assert a_ttl() == 4 + 2
    assert not held.is_held()
    assert not wishes(session.transport)


def test_the_key_says_whose_it_is(session: Session) -> None:
    """It is part of the public layout."""
    held = Mutex(session, "/a b/%é").acquire()
    assert asked_key("celery", held.key) == f"/celery/asked/%2Fa%20b%2F%25%C3%A9%2Fwrite%2F{session.lease:x}"


def test_one_of_several_holders_is_meant(session: Session, store: MemoryEtcd, clock: Clock) -> None:
    """Of two slots of one session the other stays."""
    one, two = (Semaphore(session, "/a", limit=2).acquire() for _ in range(2))
    assert asking(MemoryTransport(store), two).ask()
    pass_a_ttl(session, clock)
    assert (one.is_held(), two.is_held()) == (True, False)


def test_a_wish_hits_nobody_who_came_later_under_the_same_name(
    session: Session, store: MemoryEtcd, clock: Clock
) -> None:
    """The lock was given back and taken again before it was heard: the wish is deleted, the lock stays."""
    transport = MemoryTransport(store)
    first = Mutex(session, "/a").acquire()
    wish = asking(transport, first)
    assert wish.ask()
    first.release()
    second = Mutex(session, "/a").acquire()
    assert second.key == first.key
    assert wish.look() == "gone"
    pass_a_ttl(session, clock)
    assert second.is_held()
    assert not wishes(transport)


def test_nothing_is_asked_of_one_that_is_gone(session: Session, store: MemoryEtcd) -> None:
    """Neither where the contender is gone, nor where its lease is."""
    transport = MemoryTransport(store)
    held = Mutex(session, "/a").acquire()
    wish = asking(transport, held)
    held.release()
    assert not wish.ask()
    wish.withdraw()
    session.close()
    assert not wish.ask()
    assert wish.look() == "gone"
    assert not wishes(transport)


def test_a_wish_that_is_withdrawn_is_not_heard(session: Session, store: MemoryEtcd, clock: Clock) -> None:
    """But the one that somebody else has put in its place since stays, and is."""
    transport = MemoryTransport(store)
    held = Mutex(session, "/a").acquire()
    first, second = asking(transport, held), asking(transport, held)
    assert first.ask()
    first.withdraw()
    pass_a_ttl(session, clock)
    assert held.is_held()
    assert first.ask()
    assert second.ask()
    first.withdraw()
    assert second.look() == "none"
    pass_a_ttl(session, clock)
    assert second.look() == "told"


def test_a_hearing_whose_deletion_gets_no_answer(session: Session, store: MemoryEtcd, clock: Clock) -> None:
    """The holder is told, once; the wish goes at the next look."""
    transport = MemoryTransport(store)
    held = Mutex(session, "/a").acquire()
    reasons: list[str] = []
    held.on_lost(reasons.append)
    wish = asking(transport, held)
    assert wish.ask()

    def no_txn(verb: str, _request: Any) -> None:
        if verb == "txn":
            raise EtcdUnavailable("staged")

    session.transport.before = no_txn  # type: ignore[attr-defined]
    pass_a_ttl(session, clock)
    assert len(reasons) == 1
    assert wish.look() == "none"
    session.transport.before = None  # type: ignore[attr-defined]
    pass_a_ttl(session, clock)
    assert wish.look() == "told"
    assert len(reasons) == 1


def test_a_leader_can_be_asked_too(session: Session, store: MemoryEtcd, clock: Clock) -> None:
    """Whatever its key says: a leadership is a held lock."""
    leadership = Election(session, "/a").campaign("anything")
    assert asking(MemoryTransport(store), leadership).ask()
    pass_a_ttl(session, clock)
    assert not leadership.is_held()


def test_a_key_that_is_no_wish_does_no_harm(session: Session, clock: Clock) -> None:
    """Whatever somebody has put there by hand goes away."""
    held = Mutex(session, "/a").acquire()
    for number, value in enumerate([b"", b"[]", b'{"by": "x"}', b"\xff"]):
        key = asked_key("celery", held.key if number else "/nobody")
        session.transport.txn(Txn([], [Put(key, value, session.lease)]))
        pass_a_ttl(session, clock)
    assert held.is_held()
    assert not wishes(session.transport)


def test_who_is_behind_a_lease(new_transport: Callable[[], Transport], prefix: str) -> None:
    """A session of ours, with its own namespace and TTL; behind a stranger's lease, a dead one or none, nobody."""
    transport = new_transport()
    with Session(transport, ttl=7, namespace="other") as session:
        assert owner_of(transport, session.lease) == Owner(session.key, "other", 7)
        lease = session.lease
    stranger = transport.lease_grant(60).lease
    transport.txn(Txn([], [Put(f"{prefix}a/{stranger:x}", b"", stranger)]))
    assert [owner_of(transport, each) for each in (lease, stranger, 0)] == [None, None, None]
    transport.lease_revoke(stranger)
