"""What goes with a lock: operations carried out by the transaction that takes it, or by the one that gives it back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from celery_etcd_lock.etcd.api import Compare, Delete, KeyValue, Operation, Put, Range, Txn, prefix_end
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.exceptions import EtcdUnavailable, LockContended, LockLost, NoSpace
from celery_etcd_lock.locks import HeldLock, Mutex, Session
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.queue import EXCLUSIVE, SHARED, Mode, slot_of
from celery_etcd_lock.locks.rider import Rider
from tests.workers import until

OpenSession = Callable[..., Session]
MODES = pytest.mark.parametrize("mode", [EXCLUSIVE, SHARED, slot_of(2)], ids=lambda mode: mode.kind)


def found(session: Session, prefix: str) -> list[KeyValue]:
    return list(session.transport.range(Range(prefix, prefix_end(prefix), sort="create")).kvs)


def requests(session: Session) -> int:
    count: int = session.transport.requests  # type: ignore[attr-defined]
    return count


class Mark:
    """A key that is deleted by whoever wrote it, when they get their lock."""

    def __init__(self, session: Session, key: str, value: bytes = b"mine") -> None:
        self._session = session
        self.key = key
        session.transport.txn(Txn([], [Put(key, value)]))

    @property
    def rider(self) -> Rider:
        return Rider([Compare(self.key, "value", "==", b"mine")], [Delete(self.key)])

    @property
    def there(self) -> bool:
        return bool(self._session.transport.range(Range(self.key)).kvs)


@pytest.fixture
def session() -> Session:
    """In memory, and nothing happens in its background: the test calls `keep` itself."""
    return Session(MemoryTransport(MemoryEtcd()), ttl=30, background=False)


class TestTry:
    @MODES
    def test_it_rides_in_the_one_request(self, open_session: OpenSession, prefix: str, mode: Mode) -> None:
        """A lock that is free is taken and the rider carried out with one etcd request."""
        session = open_session(ttl=30)
        mark, before = Mark(session, prefix + "mark"), requests(session)
        held = acquire(session, prefix + "a", mode, blocking=False, rider=mark.rider)
        assert requests(session) - before == 1
        assert held.rode
        assert not mark.there
        assert held.release() == "released"

    @MODES
    def test_it_is_dropped_where_its_own_condition_does_not_hold(
        self, open_session: OpenSession, prefix: str, mode: Mode
    ) -> None:
        """The mark is another's: the lock is taken all the same, with one request more, and the mark stays."""
        session = open_session(ttl=30)
        mark, before = Mark(session, prefix + "mark", b"another's"), requests(session)
        held = acquire(session, prefix + "a", mode, blocking=False, rider=mark.rider)
        assert requests(session) - before == 2
        assert held.is_held()
        assert not held.rode
        assert mark.there
        assert held.release() == "released"

    @pytest.mark.parametrize("value", [b"mine", b"another's"])
    def test_a_slot_beside_others_costs_what_it_does_without(
        self, open_session: OpenSession, prefix: str, value: bytes
    ) -> None:
        """Two requests where others are in, and the rider is not dropped because of that; three if it is."""
        session, mode = open_session(ttl=30), slot_of(3)
        mark = Mark(session, prefix + "mark", value)
        with acquire(session, prefix + "a", mode):
            before = requests(session)
            held = acquire(session, prefix + "a", mode, blocking=False, rider=mark.rider)
            assert requests(session) - before == (2 if held.rode else 3)
            assert held.rode is (value == b"mine")
            assert mark.there is not held.rode

    @MODES
    def test_who_does_not_get_in_carries_nothing_out(self, open_session: OpenSession, prefix: str, mode: Mode) -> None:
        """A refused try leaves no trace, the mark neither."""
        session, other = open_session(ttl=30), open_session(ttl=30)
        mark = Mark(session, prefix + "mark")
        with Mutex(other, prefix + "a").acquire():
            before = requests(session)
            with pytest.raises(LockContended):
                acquire(session, prefix + "a", mode, blocking=False, rider=mark.rider)
            assert requests(session) - before == 1
            assert mark.there

    @MODES
    def test_another_epoch_does_not_drop_it(self, session: Session, mode: Mode) -> None:
        """Where only the session's key was put again meanwhile, the second request has the rider again."""
        mark = Mark(session, "/mark")
        session.transport.txn(Txn([], [session.own_key]))
        held = acquire(session, "/a", mode, blocking=False, rider=mark.rider)
        assert held.rode
        assert not mark.there

    def test_what_it_reads_is_no_contender(self, session: Session) -> None:
        """A range among its operations keeps nobody out."""
        mark = Mark(session, "/mark")
        rider = Rider([], [Range(mark.key), Delete(mark.key)])
        held = acquire(session, "/a", SHARED, blocking=False, describe={"task": "t", "task_id": "1"}, rider=rider)
        assert held.rode

    @pytest.mark.parametrize("blocking", [True, False])
    def test_one_that_names_a_lease_that_is_gone_is_dropped(
        self, open_session: OpenSession, prefix: str, blocking: bool
    ) -> None:
        """It is not the session's, which goes on."""
        session = open_session(ttl=30)
        gone = session.transport.lease_grant(30).lease
        session.transport.lease_revoke(gone)
        rider = Rider([], [Put(prefix + "mark", b"", gone)])
        with acquire(session, prefix + "a", blocking=blocking, rider=rider) as held:
            assert not held.rode
            assert not session.lost


class TestWait:
    @pytest.mark.parametrize("value", [b"mine", b"another's"])
    def test_it_rides_before_the_lock_is_ours_to_use(
        self, open_session: OpenSession, prefix: str, value: bytes
    ) -> None:
        """Not while it is waited for, and then with one request more; or not at all, and the lock is held."""
        session, other = open_session(ttl=30), open_session(ttl=30)
        mark, got = Mark(session, prefix + "mark", value), list[HeldLock]()
        with Mutex(other, prefix + "a").acquire():
            thread = threading.Thread(
                target=lambda: got.append(acquire(session, prefix + "a", rider=mark.rider)), daemon=True
            )
            thread.start()
            until(lambda: len(found(other, prefix + "a/")) == 2)
            assert mark.there
        thread.join(20)
        (held,) = got
        assert held.is_held()
        assert held.rode is (value == b"mine")
        assert mark.there is not held.rode

    def test_it_takes_one_request_more_where_nobody_is_ahead(self, open_session: OpenSession, prefix: str) -> None:
        """Joining does not carry it out; being in does."""
        session = open_session(ttl=30)
        mark, before = Mark(session, prefix + "mark"), requests(session)
        assert acquire(session, prefix + "a", rider=mark.rider).rode
        assert requests(session) - before == 2

    def test_who_has_lost_the_key_carries_nothing_out(self, session: Session) -> None:
        """The contender is deleted by hand right before: `LockLost`, and the mark stays."""
        mark = Mark(session, "/mark")
        other = MemoryTransport(session.transport.store)  # type: ignore[attr-defined]

        def delete(verb: str, asked: Any) -> None:
            if verb == "txn" and Delete(mark.key) in asked.success:
                other.delete(Delete(found(session, "/a/")[0].key))

        session.transport.before = delete  # type: ignore[attr-defined]
        with pytest.raises(LockLost, match="deleted while we went in"):
            acquire(session, "/a", rider=mark.rider)
        assert mark.there
        assert len(session.contenders) == 0


class TestUnanswered:
    def test_a_request_carried_out_twice_rides_once(self) -> None:
        """The client's second try finds the key that its first one made: the rider rode with that."""

        class Twice(MemoryTransport):
            def txn(self, request: Txn, *, timeout: float | None = None) -> Any:
                super().txn(request)
                reply = super().txn(request)
                return reply._replace(header=reply.header._replace(unanswered=True))

        session = Session(Twice(MemoryEtcd()), ttl=30, background=False)
        for _ in range(3):
            mark = Mark(session, "/mark")
            with acquire(session, "/a", blocking=False, rider=mark.rider) as held:
                assert held.rode
                assert not mark.there

    def test_after_it_was_dropped_a_key_that_is_there_after_all_decides_nothing(self, session: Session) -> None:
        """Whose first try, the rider's, was answered with no, adopts what a later one made and looks once more."""
        mark, tries = Mark(session, "/mark", b"another's"), list[Txn]()
        transport: Any = session.transport

        def twice(verb: str, asked: Any) -> None:
            if verb != "txn" or not any(isinstance(each, Put) and "/a/" in each.key for each in asked.success):
                return
            tries.append(asked)
            if len(tries) == 2:  # without the rider: made, and its answer lost on the way to the client's next try
                transport.store.txn(asked)

        transport.before = twice
        held = acquire(session, "/a", blocking=False, rider=mark.rider)
        assert held.is_held()
        assert not held.rode
        assert mark.there
        assert len(tries) == 2

    @pytest.mark.parametrize("blocking", [True, False])
    def test_an_answer_that_is_lost_leaves_no_contender(self, session: Session, blocking: bool) -> None:
        """The acquire fails; the rider rode or not; and the contender goes."""
        mark, transport = Mark(session, "/mark"), session.transport

        def lose(verb: str, asked: Any) -> None:
            if verb == "txn" and Delete(mark.key) in asked.success:
                transport.after = None  # type: ignore[attr-defined]
                raise EtcdUnavailable("staged: the answer is lost", True)

        transport.after = lose  # type: ignore[attr-defined]
        with pytest.raises(EtcdUnavailable):
            acquire(session, "/a", blocking=blocking, rider=mark.rider)
        assert not mark.there
        session.keep()
        assert not found(session, "/a/")
        assert not session.contenders.unfinished

    @pytest.mark.parametrize("blocking", [True, False])
    def test_one_that_comes_late_does_nothing(self, session: Session, blocking: bool) -> None:
        """After the acquire was given up, its rider, carried out late, finds that nobody holds the lock for it."""
        mark, late = Mark(session, "/mark"), list[Txn]()

        def keep_back(verb: str, asked: Any) -> None:
            if verb == "txn" and Delete(mark.key) in asked.success and not late:
                late.append(asked)
                raise EtcdUnavailable("staged: stuck on the way", True)

        session.transport.before = keep_back  # type: ignore[attr-defined]
        with pytest.raises(EtcdUnavailable):
            acquire(session, "/a", blocking=blocking, rider=mark.rider)
        session.keep()
        assert not session.transport.txn(late[0]).succeeded
        assert mark.there
        assert not found(session, "/a/")


class TestRelease:
    """``release(also=…)``."""

    @staticmethod
    def done(session: Session, key: str) -> list[Operation]:
        return [Put(key, b"done", session.lease)]

    def test_also_takes_no_request_of_its_own(self, open_session: OpenSession, prefix: str) -> None:
        """Taken, given back and marked as done: two requests, and the mark is there from the release on."""
        session = open_session(ttl=30)
        before = requests(session)
        held = Mutex(session, prefix + "a").acquire()
        assert held.release(self.done(session, prefix + "done")) == "released"
        assert requests(session) - before == 2
        (mark,) = found(session, prefix + "done")
        assert (mark.value, mark.lease) == (b"done", session.lease)
        assert held.release([Delete(prefix + "done")]) == "released"
        assert found(session, prefix + "done") == [mark], "the second call does nothing"

    def test_it_is_not_done_for_a_lock_that_is_gone(self, open_session: OpenSession, prefix: str) -> None:
        """The key was deleted by hand: lost, and nothing is touched."""
        session = open_session(ttl=30)
        held = Mutex(session, prefix + "a").acquire()
        session.transport.delete(Delete(held.key))
        assert held.release(self.done(session, prefix + "done")) == "lost"
        assert not found(session, prefix)

    def test_it_is_not_done_when_the_lease_is_gone(self, open_session: OpenSession, prefix: str) -> None:
        """Revoked under us: lost, for the session too, which the mark was to hang on."""
        session, other = open_session(ttl=30), open_session(ttl=30)
        held = Mutex(session, prefix + "a").acquire()
        other.transport.lease_revoke(session.lease)
        assert held.release(self.done(other, prefix + "done")) == "lost"
        assert not found(other, prefix)
        held = Mutex(other, prefix + "b").acquire()
        session.transport.lease_revoke(other.lease)
        assert held.release(self.done(other, prefix + "done")) == "lost"
        assert not found(session, prefix)

    def test_it_is_not_done_for_a_lock_that_is_lost_by_our_own_account(self, session: Session) -> None:
        """The key is still there, and deleted; but who cannot vouch for the lock has done nothing under it."""
        held = Mutex(session, "/a").acquire()
        session.contenders.lose(session.contenders.existing()[0], "staged")
        assert held.release(self.done(session, "/done")) == "lost"
        assert not found(session, "/a/")
        assert not found(session, "/done")

    def test_a_lease_of_its_own_that_is_gone_drops_it(self, open_session: OpenSession, prefix: str) -> None:
        """The lock is given back without it, and the session goes on."""
        session = open_session(ttl=30)
        gone = session.transport.lease_grant(30).lease
        session.transport.lease_revoke(gone)
        held = Mutex(session, prefix + "a").acquire()
        assert held.release([Put(prefix + "done", b"", gone)]) == "released"
        assert not found(session, prefix)
        assert not session.lost

    def test_it_is_dropped_where_etcd_is_full(self, session: Session) -> None:
        """Puts are refused, the release is not."""

        def refuse(verb: str, asked: Any) -> None:
            if verb == "txn" and any(isinstance(op, Put) for op in asked.success):
                raise NoSpace("staged")

        held = Mutex(session, "/a").acquire()
        session.transport.before = refuse  # type: ignore[attr-defined]
        assert held.release(self.done(session, "/done")) == "released"
        session.transport.before = None  # type: ignore[attr-defined]
        session.keep()
        assert not found(session, "/a/")
        assert not found(session, "/done")

    @pytest.mark.parametrize("carried_out", [True, False])
    def test_without_an_answer_it_is_done_by_that_request_or_never(self, session: Session, carried_out: bool) -> None:
        """The session finishes the release without it; and should the request come later still, it does nothing."""
        late: list[Txn] = []

        def lose(verb: str, asked: Any) -> None:
            if verb == "txn" and not late:
                late.append(asked)
                raise EtcdUnavailable("staged", True)

        held = Mutex(session, "/a").acquire()
        setattr(session.transport, "after" if carried_out else "before", lose)
        assert held.release(self.done(session, "/done")) == "unanswered"
        session.keep()
        assert not session.contenders.unfinished
        assert not found(session, "/a/")
        with Mutex(session, "/a").acquire() as next_:
            assert not session.transport.txn(late[0]).succeeded
            assert next_.key in {kv.key for kv in found(session, "/a/")}
        assert bool(found(session, "/done")) is carried_out
