"""Two breaks of naive locks, staged: a request that is stuck in a stopped member and carried out late.

One of three members is stopped (SIGSTOP) with a client's request in its sockets. The client goes on with another
member, and long after, the first one goes on (SIGCONT) and works off what it finds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import TypeVar

import pytest

from celery_etcd_lock.etcd.api import Compare, Delete, Put, Range, Txn, created_at, prefix_end
from celery_etcd_lock.etcd.gateway import GatewayTransport
from celery_etcd_lock.exceptions import EtcdUnavailable
from celery_etcd_lock.locks import HeldLock, Mutex, Session
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.rider import Rider
from celery_etcd_lock.testing import EtcdCluster, EtcdNotFound, EtcdServer
from tests.servers import skip_or_fail
from tests.workers import until

TRIES = 50
BESIDE = 10
"""So many of them at once, each of a lock of its own: a try is above all waiting for the stopped member's answer."""
TTL = 30

T = TypeVar("T")


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    try:
        made = EtcdCluster()
    except EtcdNotFound as missing:
        skip_or_fail(missing)
    with made:
        yield made


@pytest.fixture(scope="module")
def follower(cluster: EtcdCluster) -> EtcdServer:
    leader = cluster.leader()
    return next(member for member in cluster.members if member is not leader)


def session_at(first: EtcdServer, cluster: EtcdCluster) -> Session:
    """A session whose client talks to `first` until that does not answer."""
    others = [member.url for member in cluster.members if member is not first]
    transport = GatewayTransport([first.url, *others], timeout=1.6)
    transport._cluster._current = 0
    return Session(transport, ttl=TTL)


@contextmanager
def sessions_at(first: EtcdServer, cluster: EtcdCluster) -> Iterator[list[Session]]:
    """`BESIDE` of them."""
    with ExitStack() as stack:
        yield [stack.enter_context(session_at(first, cluster)) for _ in range(BESIDE)]


def keys(session: Session, name: str) -> list[str]:
    return [kv.key for kv in session.transport.range(Range(name + "/", prefix_end(name + "/"))).kvs]


def after_what_was_stuck(follower: EtcdServer, witness: Session) -> None:
    """Let the stopped member go on, and wait until it has done what it has, and what comes after that."""
    follower.resume()
    direct = GatewayTransport([follower.url], timeout=30.0)
    revision = witness.transport.range(Range(witness.key)).header.revision
    while direct.range(Range(witness.key)).header.revision < revision:
        pass
    # Its stuck requests are ahead of ours in other connections: give them the time of some round trips.
    settled, last = 0, 0
    while settled < 10:
        now = direct.range(Range(witness.key)).header.revision
        settled, last = (settled + 1 if now == last else 0), now
        time.sleep(0.01)
    direct.close()


def stuck(follower: EtcdServer, witness: Session, attempt: Callable[[int], T]) -> list[T]:
    """What `attempt` of 0, 1, … returns, all at once, while `follower` stands still; it has caught up afterwards."""
    with ThreadPoolExecutor(BESIDE) as pool:
        follower.pause()
        try:
            return list(pool.map(attempt, range(BESIDE)))
        finally:
            after_what_was_stuck(follower, witness)


def test_a_late_unlock_frees_nobody(cluster: EtcdCluster, follower: EtcdServer, prefix: str) -> None:
    """The holder's unlock is stuck in a stopped member; the next holder's lock survives its coming."""
    names = [f"{prefix}late-unlock-{number}" for number in range(BESIDE)]
    with session_at(cluster.leader(), cluster) as next_:
        for _ in range(TRIES // BESIDE):
            with sessions_at(follower, cluster) as holders:
                held = [Mutex(holder, name).acquire(timeout=10) for holder, name in zip(holders, names, strict=True)]

                def pass_on(number: int, held: list[HeldLock] = held) -> HeldLock:
                    assert held[number].release() in ("released", "unanswered")
                    return Mutex(next_, names[number]).acquire(timeout=20)

                for name, mine in zip(names, stuck(follower, next_, pass_on), strict=True):
                    assert keys(next_, name) == [mine.key]
                    assert mine.release() == "released"


def test_a_late_put_leaves_nobody_behind(cluster: EtcdCluster, follower: EtcdServer, prefix: str) -> None:
    """An acquire is stuck in a stopped member, done over another and released; its late put makes no contender."""
    names = [f"{prefix}late-put-{number}" for number in range(BESIDE)]
    with session_at(cluster.leader(), cluster) as witness:
        for _ in range(TRIES // BESIDE):
            with sessions_at(follower, cluster) as sessions:

                def come(number: int, sessions: list[Session] = sessions) -> None:
                    held = Mutex(sessions[number], names[number]).acquire(blocking=bool(number % 2))
                    assert held.release() == "released"

                stuck(follower, witness, come)
                for name in names:
                    assert keys(witness, name) == []
                    Mutex(witness, name).acquire(blocking=False).release()


def test_a_late_put_of_an_acquire_given_up_is_taken_back(
    cluster: EtcdCluster, follower: EtcdServer, prefix: str
) -> None:
    """An acquire that no member answered has failed: what it does when it comes late is undone by the session."""
    names = [f"{prefix}given-up-{number}" for number in range(BESIDE)]
    with session_at(cluster.leader(), cluster) as witness, ExitStack() as stack:
        transports = [
            stack.enter_context(closing(GatewayTransport([follower.url], timeout=0.5))) for _ in range(BESIDE)
        ]
        sessions = [stack.enter_context(Session(transport, ttl=TTL)) for transport in transports]

        def come(number: int) -> None:
            with pytest.raises(EtcdUnavailable) as unanswered:
                Mutex(sessions[number], names[number]).acquire(blocking=bool(number % 2))
            assert unanswered.value.unanswered

        stuck(follower, witness, come)
        for session, name in zip(sessions, names, strict=True):
            until(lambda session=session: not session.contenders.unfinished, "the removal")  # type: ignore[misc]
            assert keys(witness, name) == []
            Mutex(witness, name).acquire(blocking=False).release()


def test_what_goes_with_a_lock_does_not_come_late(cluster: EtcdCluster, follower: EtcdServer, prefix: str) -> None:
    """A stuck acquire with a rider and a sibling, done over another member and released: its late copy puts nothing.

    What is left is the sibling that is meant to stay, and the mark that was written again since.
    """
    names = [f"{prefix}goes-with-{number}" for number in range(BESIDE)]
    with session_at(cluster.leader(), cluster) as witness, sessions_at(follower, cluster) as sessions:
        for name in names:
            witness.transport.txn(Txn([], [Put(f"{name}.mark", b"mine")]))

        def come(number: int) -> HeldLock:
            name, mark = names[number], f"{names[number]}.mark"
            rider = Rider([Compare(mark, "value", "==", b"mine")], [Delete(mark)])
            held = acquire(sessions[number], name, blocking=bool(number % 2), rider=rider, at_least_for=60)
            assert held.rode
            assert held.release() == "released"
            witness.transport.txn(Txn([], [Put(mark, b"mine")]))
            return held

        for session, name, held in zip(sessions, names, stuck(follower, witness, come), strict=True):
            (left,) = witness.transport.range(Range(name + "/", prefix_end(name + "/"))).kvs
            assert left.create_revision == held.compare().operand
            assert left.lease != session.lease
            assert witness.transport.range(Range(f"{name}.mark")).kvs
            witness.transport.lease_revoke(left.lease)


class TestTheStagingItself:
    """Control: what a naive lock sends is carried out late, sooner or later, and does its harm."""

    def test_an_unlock_by_name_does_free_somebody(
        self, cluster: EtcdCluster, follower: EtcdServer, prefix: str
    ) -> None:
        """The unlock of one key by its name alone, stuck and then late, deletes the key that is the next holder's."""
        names = [f"{prefix}naive-unlock-{number}" for number in range(BESIDE)]

        def lock(session: Session, key: str) -> bool:
            return session.transport.txn(Txn([created_at(key, 0)], [Put(key, b"", session.lease)])).succeeded

        def broken() -> bool:
            with session_at(cluster.leader(), cluster) as next_, sessions_at(follower, cluster) as holders:
                assert all(lock(holder, key) for holder, key in zip(holders, names, strict=True))

                def pass_on(number: int) -> None:
                    holders[number].transport.delete(Delete(names[number]))
                    assert lock(next_, names[number])

                stuck(follower, next_, pass_on)
                return not all(next_.transport.range(Range(key)).kvs for key in names)

        assert any(broken() for _ in range(TRIES // BESIDE))

    def test_a_put_without_the_epoch_does_leave_a_contender(
        self, cluster: EtcdCluster, follower: EtcdServer, prefix: str
    ) -> None:
        """A contender's put that compares nothing but its own name, stuck and then late, blocks the lock."""
        names = [f"{prefix}naive-put-{number}/write/1" for number in range(BESIDE)]

        def broken() -> bool:
            with session_at(cluster.leader(), cluster) as witness, sessions_at(follower, cluster) as sessions:

                def come(number: int) -> None:
                    key, session = names[number], sessions[number]
                    session.transport.txn(Txn([created_at(key, 0)], [Put(key, b"", session.lease)]))
                    session.transport.delete(Delete(key))

                stuck(follower, witness, come)
                return any(witness.transport.range(Range(key)).kvs for key in names)

        assert any(broken() for _ in range(TRIES // BESIDE))
