"""Locks that stay taken for some time (`at_least_for`), released or not, and whatever becomes of their process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Delete, KeyValue, Put, Range, Txn, prefix_end
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.exceptions import (
    AuthRejected,
    EtcdLockError,
    EtcdUnavailable,
    LockContended,
    LockLost,
    LockTimeout,
    NoSpace,
)
from celery_etcd_lock.locks import HeldLock, Session
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.queue import EXCLUSIVE, SHARED, Mode, slot_of
from celery_etcd_lock.testing import EtcdServer
from tests.clock import Clock
from tests.workers import until

OpenSession = Callable[..., Session]
MODES = pytest.mark.parametrize("mode", [EXCLUSIVE, SHARED, slot_of(2)], ids=lambda mode: mode.kind)


def keys(session: Session, name: str) -> list[KeyValue]:
    return list(session.transport.range(Range(name + "/", prefix_end(name + "/"), sort="create")).kvs)


def requests(session: Session) -> int:
    count: int = session.transport.requests  # type: ignore[attr-defined]
    return count


def end(session: Session, sibling: KeyValue) -> None:
    """End the sibling's lease now, as etcd does when its time is over."""
    assert sibling.lease != session.lease
    session.transport.lease_revoke(sibling.lease)


def sibling_of(held: HeldLock, session: Session) -> KeyValue:
    """The key that is left of `held` beside its own."""
    mine = held.compare().operand
    (found,) = [kv for kv in keys(session, held.name) if kv.create_revision == mine and kv.key != held.key]
    return found


class TestHeld:
    @MODES
    @pytest.mark.parametrize("blocking", [True, False])
    def test_two_keys_of_one_transaction(
        self, open_session: OpenSession, prefix: str, mode: Mode, blocking: bool
    ) -> None:
        """A contender on the session's lease and a sibling on its own: one create revision, one value; 3 requests."""
        session = open_session(ttl=30)
        before = requests(session)
        held = acquire(session, prefix + "a", mode, blocking=blocking, at_least_for=299.5)
        assert requests(session) - before == 3
        contender, sibling = sorted(keys(session, prefix + "a"), key=lambda kv: kv.key)
        assert (contender.key, contender.lease) == (held.key, session.lease)
        assert contender.create_revision == sibling.create_revision == held.compare().operand
        assert contender.value == sibling.value
        assert sibling.key == f"{prefix}a/{mode.kind}/{session.lease:x}-1"
        granted = session.transport.lease_time_to_live(sibling.lease, keys=True)
        assert (granted.granted_ttl, granted.keys) == (300, (sibling.key,))
        assert held.release() == "released"
        assert requests(session) - before == 3 + 2 + 1  # two looks, and the release
        assert keys(session, prefix + "a") == [sibling]
        end(session, sibling)

    def test_released_it_is_taken_until_its_time_is_over(self, open_session: OpenSession, prefix: str) -> None:
        """The next one is told by whom; who waits, in the same process or another, goes in when the lease ends."""
        session, other = open_session(ttl=60), open_session(ttl=60)
        began = time.monotonic()
        held = acquire(session, prefix + "a", at_least_for=2)
        assert held.release() == "released"
        for each in (session, other):
            with pytest.raises(LockContended) as refused:
                acquire(each, prefix + "a", blocking=False)
            assert refused.value.holder.startswith(session.host)
            assert refused.value.since
        came: list[tuple[float, int]] = []

        def come(mine: Session) -> None:
            with acquire(mine, prefix + "a", timeout=40) as next_:
                came.append((time.monotonic() - began, next_.fencing_token))

        threads = [threading.Thread(target=come, args=(each,), daemon=True) for each in (session, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(50)
        assert [2 <= seconds < 30 for seconds, _ in came] == [True, True], "the look once per TTL is after 60 s"
        assert min(token for _, token in came) > held.fencing_token

    @MODES
    def test_who_waits_goes_in_in_order(self, open_session: OpenSession, prefix: str, mode: Mode) -> None:
        """Contenders with siblings are let in one after the other, in the order in which they came."""
        sessions, order = [open_session(ttl=60), open_session(ttl=60)], list[int]()
        first = acquire(sessions[0], prefix + "a", at_least_for=60)

        def come(number: int) -> None:
            held = acquire(sessions[number % 2], prefix + "a", mode, timeout=40, at_least_for=60)
            order.append(number)
            sibling = sibling_of(held, sessions[0])
            held.release()
            end(sessions[0], sibling)

        threads = []
        for number in range(4):
            threads.append(threading.Thread(target=come, args=(number,), daemon=True))
            threads[-1].start()
            until(lambda number=number: len(keys(sessions[0], prefix + "a")) == 2 * (number + 2))  # type: ignore[misc]
        assert not order
        first.release()
        (sibling, *_) = keys(sessions[0], prefix + "a")
        assert not order
        end(sessions[0], sibling)
        for thread in threads:
            thread.join(50)
        if mode == EXCLUSIVE:
            assert order == [0, 1, 2, 3]
        assert sorted(order) == [0, 1, 2, 3]
        assert keys(sessions[0], prefix + "a") == []

    def test_a_killed_process_leaves_it_taken(self, etcd: EtcdServer, prefix: str) -> None:
        """SIGKILL after the acquire: the contender goes with the session's lease, the sibling when its time is over."""
        program = (
            "import sys, time\n"
            "from celery_etcd_lock.locks import Session\n"
            "from celery_etcd_lock.locks.acquire import acquire\n"
            "session = Session.open(sys.argv[1], ttl=2)\n"
            "acquire(session, sys.argv[2], at_least_for=7)\n"
            "print(time.monotonic(), flush=True)\n"
            "time.sleep(600)\n"
        )
        name = prefix + "a"
        with subprocess.Popen(
            [sys.executable, "-c", program, etcd.url, name], stdout=subprocess.PIPE, text=True
        ) as holder:
            assert holder.stdout is not None
            held_at = float(holder.stdout.readline())
            holder.kill()
        transport = connect(etcd.url)
        with Session(transport, ttl=60) as session:
            until(lambda: len(keys(session, name)) == 1, "the end of the dead session")
            with pytest.raises(LockContended, match="pid"):
                acquire(session, name, blocking=False)
            with acquire(session, name, timeout=60):
                assert time.monotonic() - held_at >= 7
        transport.close()


class TestModes:
    def test_slots_count_it_once(self, open_session: OpenSession, prefix: str) -> None:
        """Two of two may be in with their siblings, a third may not; and what is left of one still counts as one."""
        one, other = open_session(ttl=60), open_session(ttl=60)
        mode = slot_of(2)
        first, second = (acquire(each, prefix + "a", mode, blocking=False, at_least_for=60) for each in (one, other))
        with pytest.raises(LockContended):
            acquire(other, prefix + "a", mode, blocking=False)
        with pytest.raises(LockTimeout):
            acquire(one, prefix + "a", mode, timeout=0.2)
        siblings = [sibling_of(each, one) for each in (first, second)]
        first.release()
        with pytest.raises(LockContended):
            acquire(other, prefix + "a", mode, blocking=False)
        got: list[HeldLock] = []
        thread = threading.Thread(
            target=lambda: got.append(acquire(other, prefix + "a", mode, timeout=40, at_least_for=60)), daemon=True
        )
        thread.start()
        until(lambda: len(keys(one, prefix + "a")) == 3 + 2)
        assert not got
        end(one, siblings[0])
        thread.join(50)
        assert got[0].is_held()
        with pytest.raises(LockContended):
            acquire(one, prefix + "a", mode, blocking=False)
        second.release()
        end(one, siblings[1])
        acquire(one, prefix + "a", mode, blocking=False).release()

    def test_readers_come_beside_it_and_writers_do_not(self, session: Session) -> None:
        """What is left of a reader keeps a writer out, no reader."""
        acquire(session, "/a", SHARED, at_least_for=60).release()
        acquire(session, "/a", SHARED, blocking=False).release()
        with pytest.raises(LockContended):
            acquire(session, "/a", blocking=False)

    def test_the_same_task_waits_for_what_it_left(self, session: Session) -> None:
        """Readers of one task id exclude each other, and what is left of one is such a reader."""
        task: dict[str, str | int] = {"task": "t", "task_id": "1"}
        acquire(session, "/a", SHARED, describe=task, at_least_for=60).release()
        with pytest.raises(LockContended) as refused:
            acquire(session, "/a", SHARED, blocking=False, describe=task)
        assert refused.value.task_id == "1"


def refuse_the_lease(verb: str, _asked: Any) -> None:
    if verb == "lease_grant":
        raise AuthRejected("staged: permission denied", 7)


def no_answer_to_the_lease(verb: str, _asked: Any) -> None:
    if verb == "lease_grant":
        raise EtcdUnavailable("staged", True)


def no_answer_to_the_move(verb: str, asked: Any) -> None:
    if verb == "txn" and len(asked.compare) == 2 and len(asked.success) == 1:
        raise EtcdUnavailable("staged", True)


class TestGivenUp:
    def test_who_times_out_takes_both_away_at_once(self, open_session: OpenSession, prefix: str) -> None:
        """One transaction for the contender and its sibling, and their names are used again."""
        session, other = open_session(ttl=30), open_session(ttl=30)
        with acquire(other, prefix + "a") as first:
            revision = session.transport.range(Range(prefix)).header.revision
            for _ in range(2):
                with pytest.raises(LockTimeout):
                    acquire(session, prefix + "a", timeout=0.1, at_least_for=60)
            assert session.transport.range(Range(prefix)).header.revision == revision + 4
            assert [kv.key for kv in keys(session, prefix + "a")] == [first.key]
            assert len(session.contenders) == 0

    def test_a_refused_try_leaves_no_trace(self, open_session: OpenSession, prefix: str) -> None:
        """Neither of a contender nor of a sibling."""
        session, other = open_session(ttl=30), open_session(ttl=30)
        with acquire(other, prefix + "a"):
            revision = session.transport.range(Range(prefix)).header.revision
            with pytest.raises(LockContended):
                acquire(session, prefix + "a", blocking=False, at_least_for=60)
            assert session.transport.range(Range(prefix)).header.revision == revision
        assert len(session.contenders) == 0

    @pytest.mark.parametrize("blocking", [True, False])
    @pytest.mark.parametrize(
        ("before", "after", "error"),
        [
            (refuse_the_lease, None, AuthRejected),
            (no_answer_to_the_lease, None, EtcdUnavailable),
            (None, no_answer_to_the_lease, EtcdUnavailable),
            (no_answer_to_the_move, None, EtcdUnavailable),
            (None, no_answer_to_the_move, EtcdUnavailable),
        ],
    )
    def test_where_it_cannot_stay_the_lock_is_not_taken(
        self, session: Session, blocking: bool, before: Any, after: Any, error: type[EtcdLockError]
    ) -> None:
        """Whatever goes wrong with the sibling's lease, the acquire raises and both keys go."""
        transport: Any = session.transport
        transport.before, transport.after = before, after
        with pytest.raises(error):
            acquire(session, "/a", blocking=blocking, at_least_for=60)
        transport.before = transport.after = None
        session.keep()
        assert keys(session, "/a") == []
        assert not session.contenders.unfinished
        assert len(session.contenders) == 0
        with acquire(session, "/a", blocking=False) as held:
            assert held.is_held()

    def test_a_move_that_comes_late_does_nothing(self, session: Session) -> None:
        """The sibling that it was to keep is gone, and does not come back."""
        late: list[Txn] = []

        def keep_back(verb: str, asked: Any) -> None:
            if verb == "txn" and len(asked.compare) == 2 and len(asked.success) == 1 and not late:
                late.append(asked)
                raise EtcdUnavailable("staged: stuck on the way", True)

        session.transport.before = keep_back  # type: ignore[attr-defined]
        with pytest.raises(EtcdUnavailable):
            acquire(session, "/a", at_least_for=60)
        session.keep()
        assert not session.transport.txn(late[0]).succeeded
        assert keys(session, "/a") == []

    def test_an_acquire_that_comes_late_does_nothing(self, session: Session) -> None:
        """Given up without an answer: neither key is made any more."""
        late: list[Txn] = []

        def keep_back(verb: str, asked: Any) -> None:
            if verb == "txn" and not late:
                late.append(asked)
                raise EtcdUnavailable("staged: stuck on the way", True)

        session.transport.before = keep_back  # type: ignore[attr-defined]
        with pytest.raises(EtcdUnavailable):
            acquire(session, "/a", at_least_for=60)
        session.keep()
        assert not session.transport.txn(late[0]).succeeded
        assert keys(session, "/a") == []
        with acquire(session, "/a", at_least_for=60) as held:
            assert held.key.endswith("-2"), "both names may still be asked for"

    def test_a_reply_that_comes_too_late_leaves_nothing(self, session: Session, clock: Clock) -> None:
        """The session is not trusted any more when the sibling has moved: no lock, and nothing stays taken."""

        def slow(verb: str, asked: Any) -> None:
            if verb == "lease_grant":
                clock.now += 28

        session.transport.after = slow  # type: ignore[attr-defined]
        with pytest.raises(LockLost):
            acquire(session, "/a", at_least_for=60)
        assert keys(session, "/a") == []

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_key_deleted_before_it_has_moved_is_a_loss(self, session: Session, which: int) -> None:
        """The contender or the sibling, by somebody's hand: `LockLost`, and the other one goes, too."""

        def delete(verb: str, _asked: Any) -> None:
            if verb == "lease_grant":
                found = sorted(keys(session, "/a"), key=lambda kv: kv.key)
                session.transport.delete(Delete(found[which].key))

        session.transport.before = delete  # type: ignore[attr-defined]
        with pytest.raises(LockLost, match="deleted while we went in"):
            acquire(session, "/a", at_least_for=60)
        assert keys(session, "/a") == []

    def test_a_waiter_gives_both_up_where_etcd_is_full(self, session: Session, store: MemoryEtcd) -> None:
        """Puts are refused, and before 3.5.7 transactions: both keys go all the same."""
        for transactions in (False, True):
            with acquire(session, "/a"):

                def refuse(verb: str, asked: Any, transactions: bool = transactions) -> None:
                    if verb == "txn" and (transactions or any(isinstance(op, Put) for op in asked.success)):
                        raise NoSpace("staged")

                def come() -> None:
                    with pytest.raises(LockTimeout):
                        acquire(session, "/a", timeout=0.5, at_least_for=60)

                thread = threading.Thread(target=come, daemon=True)
                thread.start()
                until(lambda: len(store.range(Range("/a/", "/a0")).kvs) == 3)
                session.transport.before = refuse  # type: ignore[attr-defined]
                thread.join(20)
                session.transport.before = None  # type: ignore[attr-defined]
                assert len(keys(session, "/a")) == 1


class TestUpkeep:
    def test_its_name_is_not_used_again_before_it_is_gone(self, session: Session, clock: Clock) -> None:
        """While it is there, or may be, the next contender has another; afterwards the old ones do."""
        first = acquire(session, "/a", SHARED, at_least_for=100)
        first.release()
        taken = sibling_of(first, session)
        for _ in range(9):
            clock.now += 10
            session.keep()
            with acquire(session, "/a", SHARED) as held:
                assert held.key == first.key != taken.key
            with acquire(session, "/a", SHARED, at_least_for=1) as held:
                pass
            assert taken in keys(session, "/a")
        for _ in range(9):
            clock.now += 10
            session.keep()
        assert keys(session, "/a") == []
        assert len(session.contenders) == 0
        held = acquire(session, "/a", SHARED, at_least_for=100)
        assert (held.key, sibling_of(held, session).key) == (first.key, taken.key)

    def test_one_that_outlives_its_time_keeps_its_name(self, session: Session, clock: Clock) -> None:
        """A new leader gives leases their time anew: what is not surely gone is not used."""
        first = acquire(session, "/a", SHARED, at_least_for=10)
        first.release()
        sibling = sibling_of(first, session)
        for _ in range(8):
            session.transport.lease_renew(sibling.lease)
            clock.now += 5
            session.keep()
        assert keys(session, "/a") == [sibling]
        assert len(session.contenders) == 1

    def test_hundreds_are_looked_at_together(self, session: Session, clock: Clock) -> None:
        """What is left of 250 locks is seen to be gone with three requests."""
        for number in range(250):
            acquire(session, f"/{number}", at_least_for=5).release()
        clock.now += 10
        session.keep()
        before = requests(session)
        clock.now += 20
        session.keep()
        assert requests(session) - before == 2 + 3  # renewed, and asked for its keys
        assert len(session.contenders) == 0

    def test_it_is_neither_a_stray_nor_a_loss(self, session: Session, clock: Clock) -> None:
        """While held: what the lease has of it is left alone, and a sibling that somebody deletes is no loss."""
        held, other = (acquire(session, name, at_least_for=300) for name in ("/a", "/b"))
        session.transport.delete(Delete(sibling_of(held, session).key))
        for _ in range(9):
            clock.now += 10
            session.keep()
        assert held.is_held()
        assert other.is_held()
        assert len(keys(session, "/b")) == 2
        assert held.release() == "released"
        assert keys(session, "/a") == []

    def test_one_that_waits_for_its_lease_is_no_stray(self, session: Session, clock: Clock) -> None:
        """Between the acquire and the move the sibling hangs on the session's lease, and stays there."""

        def look(verb: str, _asked: Any) -> None:
            if verb == "lease_grant":
                clock.now += 9
                session.keep()
                clock.now += 9
                session.keep()
                clock.now += 13
                session.keep()

        session.transport.before = look  # type: ignore[attr-defined]
        held = acquire(session, "/a", at_least_for=300)
        assert held.is_held()
        assert len(keys(session, "/a")) == 2

    def test_siblings_that_late_puts_made_are_removed(self, session: Session, clock: Clock) -> None:
        """Both keys of an acquire that nobody here knows of."""
        held = acquire(session, "/b", at_least_for=300)
        strays = [f"/a/write/{session.lease:x}{number}" for number in ("", "-1")]
        session.transport.txn(Txn([], [Put(stray, b"{}", session.lease) for stray in strays]))
        for _ in range(4):
            clock.now += 10
            session.keep()
        assert keys(session, "/a") == []
        assert held.is_held()
        assert len(keys(session, "/b")) == 2

    def test_a_name_that_somebody_uses_is_passed_over(self, session: Session) -> None:
        """A key under the sibling's name that is not ours stays, and the sibling gets another."""
        for blocking in (True, False):
            stray = f"/{blocking}/read/{session.lease:x}-1"
            session.transport.txn(Txn([], [Put(stray, b"somebody's", 0)]))
            held = acquire(session, f"/{blocking}", SHARED, blocking=blocking, at_least_for=60)
            assert sibling_of(held, session).key == f"/{blocking}/read/{session.lease:x}-2"
            assert held.release() == "released"
            assert stray in {kv.key for kv in keys(session, f"/{blocking}")}

    @pytest.mark.parametrize("lost", [True, False])
    def test_it_survives_its_session(self, session: Session, store: MemoryEtcd, lost: bool) -> None:
        """Closed, or lost: what has a lease of its own stays until that is over."""
        held, released = (acquire(session, name, at_least_for=60) for name in ("/a", "/b"))
        released.release()
        if lost:
            session.transport.lease_revoke(session.lease)
            session._lose("staged")
            assert held.release() == "lost"
        session.close()
        other = Session(MemoryTransport(store), ttl=30, background=False)
        for name in ("/a", "/b"):
            (left,) = keys(other, name)
            assert left.lease != session.lease

    def test_what_was_carried_out_twice_is_taken_for_ours(self, store: MemoryEtcd, clock: Clock) -> None:
        """The client's second try finds both keys that its first one made."""

        class Twice(MemoryTransport):
            def txn(self, request: Txn, *, timeout: float | None = None) -> Any:
                super().txn(request)
                reply = super().txn(request)
                return reply._replace(header=reply.header._replace(unanswered=True))

        session = Session(Twice(store), ttl=30, clock=clock, background=False)
        for blocking in (True, False):
            with acquire(session, "/a", SHARED, blocking=blocking, at_least_for=60):
                assert len(keys(session, "/a")) == (2 if blocking else 3)
