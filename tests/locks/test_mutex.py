"""The mutex, on every transport."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from celery_etcd_lock.etcd.api import Delete, Put, Range, Txn, prefix_end
from celery_etcd_lock.exceptions import ConfigError, LockContended, LockLost, LockTimeout
from celery_etcd_lock.locks import HeldLock, Mutex, Session
from celery_etcd_lock.locks.acquire import _Attempt

OpenSession = Callable[..., Session]


def keys(session: Session, name: str) -> list[str]:
    return [kv.key for kv in session.transport.range(Range(name + "/", prefix_end(name + "/"), sort="create")).kvs]


def until(condition: Callable[[], Any], *, seconds: float = 20) -> None:
    """Wait until `condition` holds; fail if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


class TestAcquire:
    def test_costs_one_request_and_the_release_another(self, open_session: OpenSession, prefix: str) -> None:
        """A lock that is free is taken with one etcd request and given back with one, waiting or not."""
        session = open_session(ttl=30)
        mutex = Mutex(session, prefix + "a")
        for blocking in (True, False):
            before = session.transport.requests  # type: ignore[attr-defined]
            held = mutex.acquire(blocking=blocking)
            assert session.transport.requests - before == 1  # type: ignore[attr-defined]
            assert held.release() == "released"
            assert session.transport.requests - before == 2  # type: ignore[attr-defined]

    def test_not_blocking_says_who_holds_it_and_leaves_no_trace(self, open_session: OpenSession, prefix: str) -> None:
        """A refused try-lock names the holder, and leaves neither a key nor a revision behind."""
        one, other = open_session(), open_session()
        with Mutex(one, prefix + "a").acquire() as held:
            revision = one.transport.range(Range(prefix)).header.revision
            with pytest.raises(LockContended) as refused:
                Mutex(other, prefix + "a").acquire(blocking=False)
            assert refused.value.key == prefix + "a"
            assert f"pid {os.getpid()}" in refused.value.holder
            assert refused.value.since
            assert not isinstance(refused.value, LockTimeout)
            assert keys(one, prefix + "a") == [held.key]
            assert one.transport.range(Range(prefix)).header.revision == revision

    def test_times_out_and_leaves_the_queue(self, open_session: OpenSession, prefix: str) -> None:
        """A waiter whose time is over says who held the lock, and is out of the queue."""
        one, other = open_session(), open_session()
        with Mutex(one, prefix + "a").acquire() as held:
            with pytest.raises(LockTimeout) as late:
                Mutex(other, prefix + "a").acquire(timeout=0.2)
            assert late.value.holder
            assert keys(one, prefix + "a") == [held.key]

    def test_is_granted_in_the_order_of_queueing(self, open_session: OpenSession, prefix: str) -> None:
        """Waiters of several sessions and threads go in first come, first served."""
        sessions = [open_session(), open_session()]
        order: list[int] = []

        def come(number: int) -> None:
            with Mutex(sessions[number % 2], prefix + "a").acquire(timeout=30):
                order.append(number)

        with Mutex(sessions[0], prefix + "a").acquire():
            threads = []
            for number in range(8):
                threads.append(in_thread(lambda number=number: come(number)))  # type: ignore[misc]
                until(lambda number=number: len(keys(sessions[0], prefix + "a")) == number + 2)  # type: ignore[misc]
        for thread in threads:
            thread.join(30)
        assert order == list(range(8))
        assert keys(sessions[0], prefix + "a") == []

    def test_a_name_in_use_again_is_not_the_one_that_was_waited_for(
        self, open_session: OpenSession, prefix: str
    ) -> None:
        """Whoever finds itself behind a key that goes, and comes again behind it, does not wait for that one."""
        session = open_session(ttl=60)
        mutex = Mutex(session, prefix + "a")
        first, released, order = mutex.acquire(), threading.Event(), []
        join, joined = _Attempt.join, threading.Event()

        def slow_join(attempt: _Attempt) -> Any:
            found = join(attempt)
            if threading.current_thread().name == "behind":
                joined.set()
                assert released.wait(20)
            return found

        def come(name: str) -> None:
            with mutex.acquire(timeout=30):
                order.append(name)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Attempt, "join", slow_join)
            behind = threading.Thread(target=come, args=("behind",), name="behind")
            behind.start()
            assert joined.wait(20)
            first.release()
            again = in_thread(lambda: come("again"))
            until(lambda: len(keys(session, prefix + "a")) == 2)
            released.set()
            behind.join(20)
            again.join(20)
        assert order == ["behind", "again"]

    def test_tokens_grow_from_holder_to_holder(self, open_session: OpenSession, prefix: str) -> None:
        """Each holder's fencing token is larger than the one before, whichever way the lock was taken."""
        one, other = open_session(), open_session()
        tokens = []
        for round_ in range(3):
            with Mutex(one, prefix + "a").acquire(blocking=bool(round_ % 2)) as held:
                tokens.append(held.fencing_token)
                waiting: list[HeldLock] = []
                thread = in_thread(lambda waiting=waiting: waiting.append(Mutex(other, prefix + "a").acquire()))  # type: ignore[misc]
                until(lambda: len(keys(one, prefix + "a")) == 2)
            thread.join(20)
            tokens.append(waiting[0].fencing_token)
            waiting[0].release()
        assert tokens == sorted(set(tokens))

    def test_obeys_foreign_contenders(self, open_session: OpenSession, prefix: str) -> None:
        """A key that is not JSON, or has no lease, under the lock's name is somebody else, and is waited for."""
        session = open_session()
        session.transport.txn(Txn([], [Put(prefix + "a/694d9", b"not { json")]))
        with pytest.raises(LockContended, match="another etcd client"):
            Mutex(session, prefix + "a").acquire(blocking=False)
        with pytest.raises(LockTimeout):
            Mutex(session, prefix + "a").acquire(timeout=0.2)
        session.transport.delete(Delete(prefix + "a/694d9"))
        assert Mutex(session, prefix + "a").acquire(blocking=False).release() == "released"

    def test_a_lock_is_no_part_of_another(self, open_session: OpenSession, prefix: str) -> None:
        """Names that begin alike are different locks."""
        session = open_session()
        with Mutex(session, prefix + "a").acquire(), Mutex(session, prefix + "ab").acquire(blocking=False):
            pass

    @pytest.mark.parametrize("name", ["", "/", "a/", 7, None])
    def test_refuses_names_that_cannot_be(self, open_session: OpenSession, name: Any) -> None:
        """A name that is empty, no string, or would be a parent of others is a ConfigError."""
        with pytest.raises(ConfigError, match="a lock's name"):
            Mutex(open_session(), name)


class TestExclusion:
    def test_threads_and_sessions_never_overlap(
        self, open_session: OpenSession, prefix: str, crowd: Callable[..., Any]
    ) -> None:
        """Six threads on two sessions are never inside together, two of the same session neither."""
        sessions = [open_session(ttl=30), open_session(ttl=30)]
        doors = [Mutex(sessions[number % 2], prefix + "a").acquire for number in range(6)]
        assert crowd(doors).overlaps() == 0

    def test_polling_threads_never_overlap(
        self, open_session: OpenSession, prefix: str, crowd: Callable[..., Any]
    ) -> None:
        """The same through the way in that does not wait."""
        session = open_session(ttl=30)

        def poll() -> HeldLock:
            while True:
                with contextlib.suppress(LockContended):
                    return Mutex(session, prefix + "a").acquire(blocking=False)

        assert crowd([poll] * 4).overlaps() == 0

    def test_without_a_lock_they_do(self, crowd: Callable[..., Any]) -> None:
        """The scenario sees overlaps where there are any: the same crowd through open doors."""
        assert crowd([contextlib.nullcontext] * 6).overlaps() > 0


class TestHeld:
    def test_says_what_it_is(self, open_session: OpenSession, prefix: str) -> None:
        """A held lock has its key in etcd, time left, and a condition that holds as long as it does."""
        session = open_session()
        held = Mutex(session, prefix + "a").acquire()
        assert held.key.startswith(prefix + "a/write/")
        assert held.is_held()
        assert 0 < held.remaining() <= session.ttl
        held.assert_held()
        write = Txn([held.compare()], [Put(prefix + "mine", b"1")])
        assert session.transport.txn(write).succeeded
        held.release()
        assert not session.transport.txn(write).succeeded
        assert held.remaining() == 0
        with pytest.raises(LockLost, match="it was released"):
            held.assert_held()

    def test_releasing_twice_says_the_same_and_does_nothing(self, open_session: OpenSession, prefix: str) -> None:
        """The second release does not touch the next holder."""
        session = open_session()
        first = Mutex(session, prefix + "a").acquire()
        assert first.release() == "released"
        with Mutex(session, prefix + "a").acquire() as second:
            assert first.release() == "released"
            assert keys(session, prefix + "a") == [second.key]

    def test_may_be_released_in_another_thread(self, open_session: OpenSession, prefix: str) -> None:
        """A lock belongs to who holds the object, not to the thread that took it."""
        held = Mutex(open_session(), prefix + "a").acquire()
        in_thread(held.release).join(20)
        assert not held.is_held()

    def test_a_key_deleted_by_hand_is_a_loss_at_release(self, open_session: OpenSession, prefix: str) -> None:
        """Whose key is gone is told so, and frees nobody else's."""
        one, other = open_session(ttl=30), open_session(ttl=30)
        held = Mutex(one, prefix + "a").acquire()
        one.transport.delete(Delete(held.key))
        with Mutex(other, prefix + "a").acquire(timeout=10) as next_:
            assert held.release() == "lost"
            assert keys(one, prefix + "a") == [next_.key]
        with pytest.raises(LockLost, match="deleted"), Mutex(one, prefix + "a").acquire() as held:
            one.transport.delete(Delete(held.key))

    def test_a_key_deleted_by_hand_is_told_within_the_ttl(self, open_session: OpenSession, prefix: str) -> None:
        """The session looks once per TTL whether what it holds is still there."""
        session = open_session(ttl=2)
        held, told = Mutex(session, prefix + "a").acquire(), threading.Event()
        held.on_lost(lambda _reason: told.set())
        session.transport.delete(Delete(held.key))
        assert told.wait(20)
        assert not held.is_held()
        assert not session.lost
        assert "deleted" in held.why_not()

    def test_a_waiter_whose_key_was_deleted_does_not_go_in(self, open_session: OpenSession, prefix: str) -> None:
        """After waiting the own key is read again: gone means lost, even though nobody is ahead."""
        one, other = open_session(), open_session(ttl=30)
        errors: list[BaseException] = []

        def come() -> None:
            try:
                Mutex(other, prefix + "a").acquire(timeout=30)
            except LockLost as error:
                errors.append(error)

        with Mutex(one, prefix + "a").acquire() as held:
            thread = in_thread(come)
            until(lambda: len(keys(one, prefix + "a")) == 2)
            waiter = next(key for key in keys(one, prefix + "a") if key != held.key)
            one.transport.delete(Delete(waiter))
        thread.join(20)
        assert "deleted while we waited" in str(errors[0])

    def test_a_forked_copy_holds_and_releases_nothing(self, open_session: OpenSession, prefix: str) -> None:
        """In a forked child the lock is not held, and releasing it there leaves the parent's alone."""
        session = open_session()
        held = Mutex(session, prefix + "a").acquire()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                said = pickle.dumps((held.is_held(), held.remaining(), held.release(), session.reason))
                session.close()
                os.write(write, said)
            os._exit(0)
        os.waitpid(child, 0)
        is_held, remaining, outcome, reason = pickle.loads(os.read(read, 10_000))
        assert (is_held, remaining, outcome) == (False, 0, "lost")
        assert f"belongs to process {os.getpid()}" in reason
        assert held.is_held()
        assert held.release() == "released"

    def test_the_mutex_itself_is_a_context_manager(self, open_session: OpenSession, prefix: str) -> None:
        """``with Mutex(…)`` waits, and gives the held lock."""
        mutex = Mutex(open_session(), prefix + "a")
        with mutex as held:
            assert held.is_held()
        assert not held.is_held()


class TestNames:
    def test_one_contender_name_however_often(self, open_session: OpenSession, prefix: str) -> None:
        """A lock taken a thousand times by one session leaves one contender name in etcd's history."""
        session = open_session(ttl=30)
        used = set()
        start = session.transport.range(Range(prefix)).header.revision + 1
        from celery_etcd_lock.etcd.api import Watch

        for number in range(1000):
            with Mutex(session, prefix + "a").acquire(blocking=bool(number % 2)) as held:
                used.add(held.key)
        stream = session.transport.watch(Watch(prefix, prefix_end(prefix), start_revision=start))
        in_history, seen = set(), 0
        for reply in stream:
            in_history |= {event.kv.key for event in reply.events}
            seen += len(reply.events)
            if seen >= 2000:
                break
        stream.close()
        assert used == in_history == {f"{prefix}a/write/{session.lease:x}"}

    def test_one_lease_for_a_thousand_locks(self, open_session: OpenSession, prefix: str) -> None:
        """All locks of a session hang on its one lease."""
        session = open_session(ttl=30)
        held = [Mutex(session, f"{prefix}{number}").acquire() for number in range(1000)]
        listed = session.transport.lease_time_to_live(session.lease, keys=True).keys
        assert {lock.key for lock in held} | {session.key} == set(listed)
