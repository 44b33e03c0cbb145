"""Two breaks of naive locks, staged: a request that is stuck in a stopped member and carried out late.

One of three members is stopped (SIGSTOP) with a client's request in its sockets. The client goes on with another
member, and long after, the first one goes on (SIGCONT) and works off what it finds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from celery_etcd_lock.etcd.api import Compare, Delete, Put, Range, Txn, created_at, prefix_end
from celery_etcd_lock.etcd.gateway import GatewayTransport
from celery_etcd_lock.exceptions import EtcdUnavailable
from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.rider import Rider
from celery_etcd_lock.testing import EtcdCluster, EtcdNotFound, EtcdServer
from tests.servers import skip_or_fail
from tests.workers import until

TRIES = 50
TTL = 30


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


def test_a_late_unlock_frees_nobody(cluster: EtcdCluster, follower: EtcdServer, prefix: str) -> None:
    """The holder's unlock is stuck in a stopped member; the next holder's lock survives its coming."""
    with session_at(cluster.leader(), cluster) as next_:
        for number in range(TRIES):
            name = f"{prefix}late-unlock"
            with session_at(follower, cluster) as holder:
                held = Mutex(holder, name).acquire(timeout=10)
                follower.pause()
                try:
                    assert held.release() in ("released", "unanswered")
                    mine = Mutex(next_, name).acquire(timeout=20)
                finally:
                    after_what_was_stuck(follower, next_)
                assert keys(next_, name) == [mine.key], f"try {number}"
                assert mine.release() == "released"


def test_a_late_put_leaves_nobody_behind(cluster: EtcdCluster, follower: EtcdServer, prefix: str) -> None:
    """An acquire is stuck in a stopped member, done over another and released; its late put makes no contender."""
    name = f"{prefix}late-put"
    with session_at(cluster.leader(), cluster) as witness:
        for number in range(TRIES):
            with session_at(follower, cluster) as session:
                follower.pause()
                try:
                    held = Mutex(session, name).acquire(blocking=bool(number % 2))
                    assert held.release() == "released"
                finally:
                    after_what_was_stuck(follower, witness)
                assert keys(witness, name) == [], f"try {number}"
                Mutex(witness, name).acquire(blocking=False).release()


def test_a_late_put_of_an_acquire_given_up_is_taken_back(
    cluster: EtcdCluster, follower: EtcdServer, prefix: str
) -> None:
    """An acquire that no member answered has failed: what it does when it comes late is undone by the session."""
    name = f"{prefix}given-up"
    with session_at(cluster.leader(), cluster) as witness:
        for number in range(10):
            transport = GatewayTransport([follower.url], timeout=0.5)
            with Session(transport, ttl=TTL) as session:
                follower.pause()
                try:
                    with pytest.raises(EtcdUnavailable) as unanswered:
                        Mutex(session, name).acquire(blocking=bool(number % 2))
                    assert unanswered.value.unanswered
                finally:
                    after_what_was_stuck(follower, witness)
                until(lambda: not session.contenders.unfinished, "the removal")
                assert keys(witness, name) == [], f"try {number}"
                Mutex(witness, name).acquire(blocking=False).release()
            transport.close()


def test_what_goes_with_a_lock_does_not_come_late(cluster: EtcdCluster, follower: EtcdServer, prefix: str) -> None:
    """A stuck acquire with a rider and a sibling, done over another member and released: its late copy puts nothing.

    What is left is the sibling that is meant to stay, and the mark that was written again since.
    """
    name, mark = f"{prefix}goes-with", f"{prefix}mark"
    rider = Rider([Compare(mark, "value", "==", b"mine")], [Delete(mark)])
    with session_at(cluster.leader(), cluster) as witness:
        for number in range(10):
            witness.transport.txn(Txn([], [Put(mark, b"mine")]))
            with session_at(follower, cluster) as session:
                follower.pause()
                try:
                    held = acquire(session, name, blocking=bool(number % 2), rider=rider, at_least_for=60)
                    assert held.rode
                    assert held.release() == "released"
                    witness.transport.txn(Txn([], [Put(mark, b"mine")]))
                finally:
                    after_what_was_stuck(follower, witness)
                (left,) = witness.transport.range(Range(name + "/", prefix_end(name + "/"))).kvs
                assert left.create_revision == held.compare().operand, f"try {number}"
                assert left.lease != session.lease
                assert witness.transport.range(Range(mark)).kvs, f"try {number}"
                witness.transport.lease_revoke(left.lease)


class TestTheStagingItself:
    """Control: what a naive lock sends is carried out late, sooner or later, and does its harm."""

    def test_an_unlock_by_name_does_free_somebody(
        self, cluster: EtcdCluster, follower: EtcdServer, prefix: str
    ) -> None:
        """The unlock of one key by its name alone, stuck and then late, deletes the key that is the next holder's."""
        key = f"{prefix}naive-unlock"

        def lock(session: Session) -> bool:
            return session.transport.txn(Txn([created_at(key, 0)], [Put(key, b"", session.lease)])).succeeded

        def broken() -> bool:
            with session_at(cluster.leader(), cluster) as next_, session_at(follower, cluster) as holder:
                assert lock(holder)
                follower.pause()
                try:
                    holder.transport.delete(Delete(key))
                    assert lock(next_)
                finally:
                    after_what_was_stuck(follower, next_)
                return not next_.transport.range(Range(key)).kvs

        assert any(broken() for _ in range(TRIES))

    def test_a_put_without_the_epoch_does_leave_a_contender(
        self, cluster: EtcdCluster, follower: EtcdServer, prefix: str
    ) -> None:
        """A contender's put that compares nothing but its own name, stuck and then late, blocks the lock."""
        key = f"{prefix}naive-put/write/1"

        def broken() -> bool:
            with session_at(cluster.leader(), cluster) as witness, session_at(follower, cluster) as session:
                follower.pause()
                try:
                    session.transport.txn(Txn([created_at(key, 0)], [Put(key, b"", session.lease)]))
                    session.transport.delete(Delete(key))
                finally:
                    after_what_was_stuck(follower, witness)
                return bool(witness.transport.range(Range(key)).kvs)

        assert any(broken() for _ in range(TRIES))
