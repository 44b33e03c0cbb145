"""The read-write lock, on every transport; and what every lock does with those who want it twice."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from celery_etcd_lock.etcd.api import Delete, Put, Range, Txn, prefix_end
from celery_etcd_lock.exceptions import ConfigError, LockContended, LockLost, LockTimeout
from celery_etcd_lock.locks import HeldLock, Lock, Mutex, RWLock, Session
from tests.workers import until

OpenSession = Callable[..., Session]


def keys(session: Session, name: str) -> list[str]:
    return [kv.key for kv in session.transport.range(Range(name + "/", prefix_end(name + "/"), sort="create")).kvs]


class Taking:
    """An acquire in a thread of its own."""

    def __init__(self, lock: Lock, **options: Any) -> None:
        self.held: HeldLock | None = None
        self.error: Exception | None = None
        self._lock, self._options = lock, options
        self.thread = threading.Thread(target=self._take, daemon=True)
        self.thread.start()

    def _take(self) -> None:
        try:
            self.held = self._lock.acquire(**self._options)
        except Exception as error:  # noqa: BLE001 - the test judges it
            self.error = error

    def result(self) -> HeldLock:
        self.thread.join(30)
        assert self.held is not None, self.error
        return self.held


class TestReaders:
    def test_go_in_together_and_keep_a_writer_out(self, open_session: OpenSession, prefix: str) -> None:
        """Two readers are in at once; a writer is refused until both are out, without a trace."""
        one, other = open_session(), open_session()
        first = RWLock(one, prefix + "a").read().acquire()
        second = RWLock(other, prefix + "a").read().acquire(blocking=False)
        assert first.is_held()
        assert second.is_held()
        assert first.key.startswith(prefix + "a/read/")
        revision = one.transport.range(Range(prefix)).header.revision
        with pytest.raises(LockContended) as refused:
            RWLock(other, prefix + "a").write().acquire(blocking=False)
        assert f"pid {os.getpid()}" in refused.value.holder
        assert one.transport.range(Range(prefix)).header.revision == revision
        first.release()
        with pytest.raises(LockTimeout):
            RWLock(other, prefix + "a").write().acquire(timeout=0.2)
        second.release()
        RWLock(other, prefix + "a").write().acquire(blocking=False).release()
        assert keys(one, prefix + "a") == []

    def test_a_writer_keeps_readers_out(self, open_session: OpenSession, prefix: str) -> None:
        """While somebody writes, a try to read is refused without a trace, and a timed one times out."""
        one, other = open_session(), open_session()
        with RWLock(one, prefix + "a").write().acquire() as held:
            revision = one.transport.range(Range(prefix)).header.revision
            with pytest.raises(LockContended):
                RWLock(other, prefix + "a").read().acquire(blocking=False)
            assert one.transport.range(Range(prefix)).header.revision == revision
            with pytest.raises(LockTimeout):
                RWLock(other, prefix + "a").read().acquire(timeout=0.2)
            assert keys(one, prefix + "a") == [held.key]

    def test_cost_one_request_each_way_beside_others(self, open_session: OpenSession, prefix: str) -> None:
        """Taking the read lock costs one request, whether or not others read, and releasing it one."""
        session, other = open_session(ttl=30), open_session(ttl=30)
        lock = RWLock(session, prefix + "a").read()
        transport: Any = session.transport
        for readers in (0, 3):
            beside = [RWLock(other, prefix + "a").read().acquire() for _ in range(readers)]
            for blocking in (True, False):
                before = transport.requests
                lock.acquire(blocking=blocking).release()
                assert transport.requests - before == 2
            for held in beside:
                held.release()

    def test_a_waiting_writer_is_not_overtaken(self, open_session: OpenSession, prefix: str) -> None:
        """Readers that come while a writer waits go in after it, all together; tries to read are refused."""
        one, other = open_session(ttl=30), open_session(ttl=30)
        name = prefix + "a"
        reading = RWLock(one, name).read().acquire()
        writer = Taking(RWLock(other, name).write())
        until(lambda: len(keys(one, name)) == 2)
        with pytest.raises(LockContended):
            RWLock(one, name).read().acquire(blocking=False)
        late = [Taking(RWLock(session, name).read()) for session in (one, other, one)]
        until(lambda: len(keys(one, name)) == 5)
        assert writer.held is None
        reading.release()
        writing = writer.result()
        assert [each.held for each in late] == [None] * 3
        writing.release()
        held = [each.result() for each in late]
        assert all(each.is_held() for each in held)
        assert min(each.fencing_token for each in held) > writing.fencing_token > reading.fencing_token

    def test_strangers_and_mutexes_write(self, open_session: OpenSession, prefix: str) -> None:
        """Other clients' keys and the mutex of the same name keep readers out."""
        session = open_session()
        session.transport.txn(Txn([], [Put(prefix + "a/694d9", b"")]))
        with pytest.raises(LockContended, match="another etcd client"):
            RWLock(session, prefix + "a").read().acquire(blocking=False)
        session.transport.delete(Delete(prefix + "a/694d9"))
        with Mutex(session, prefix + "a").acquire(), pytest.raises(LockContended):
            RWLock(session, prefix + "a").read().acquire(blocking=False)

    def test_refuses_names_that_cannot_be(self, open_session: OpenSession) -> None:
        """As the mutex does."""
        with pytest.raises(ConfigError, match="a lock's name"):
            RWLock(open_session(), "a/")

    @pytest.mark.parametrize("blocking", [True, False])
    def test_a_foreign_key_under_our_name_is_stepped_aside_from(
        self, open_session: OpenSession, prefix: str, blocking: bool
    ) -> None:
        """What somebody put under the name a reader would have had is neither overwritten nor taken for its own."""
        session = open_session()
        theirs = f"{prefix}a/read/{session.lease:x}"
        session.transport.txn(Txn([], [Put(theirs, b"theirs")]))
        with RWLock(session, prefix + "a").read().acquire(blocking=blocking) as held:
            assert held.key != theirs
            assert session.transport.range(Range(theirs)).kvs[0].value == b"theirs"


class TestExclusion:
    def test_writers_are_alone_and_readers_are_not(
        self, open_session: OpenSession, prefix: str, crowd: Callable[..., Any]
    ) -> None:
        """Writers among themselves never overlap, though readers come and go; the readers alone do overlap."""
        sessions = [open_session(ttl=30), open_session(ttl=30)]
        inside: set[str] = set()
        broken: list[set[str]] = []

        @contextlib.contextmanager
        def door(number: int) -> Any:
            lock = RWLock(sessions[number % 2], prefix + "a")
            writes = number < 3
            with (lock.write() if writes else lock.read()).acquire():
                inside.add(f"{'w' if writes else 'r'}{number}")
                seen = set(inside)
                if len(seen) > 1 and any(each.startswith("w") for each in seen):
                    broken.append(seen)
                yield
                inside.discard(f"{'w' if writes else 'r'}{number}")

        crowd([lambda number=number: door(number) for number in range(6)])
        assert broken == []
        readers = crowd([RWLock(sessions[number % 2], prefix + "b").read().acquire for number in range(6)])
        assert readers.overlaps() > 0, "control: the scenario sees those who are in together"


class TestTwice:
    def test_an_upgrade_waits_for_itself_and_does_not_pass(self, open_session: OpenSession, prefix: str) -> None:
        """Who reads and wants to write is refused, or times out, and still holds the read lock."""
        lock = RWLock(open_session(), prefix + "a")
        with lock.read().acquire() as held:
            with pytest.raises(LockContended) as refused:
                lock.write().acquire(blocking=False)
            assert f"pid {os.getpid()}" in refused.value.holder
            with pytest.raises(LockTimeout):
                lock.write().acquire(timeout=0.2)
            assert held.is_held()
            assert keys(lock.session, lock.name) == [held.key]

    def test_an_untimed_wait_for_oneself_is_said(
        self, open_session: OpenSession, prefix: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It begins with a warning, and goes on when somebody else releases what the thread holds."""
        lock = RWLock(open_session(), prefix + "a")
        holding: list[HeldLock] = []

        def upgrade() -> None:
            holding.append(lock.read().acquire())
            holding.append(lock.write().acquire())

        thread = threading.Thread(target=upgrade, daemon=True)
        thread.start()
        until(lambda: "etcd_lock.waits_for_itself" in caplog.text)
        assert holding[0].release() == "released"
        thread.join(30)
        assert holding[1].is_held()

    def test_waiting_for_others_is_not_said(
        self, open_session: OpenSession, prefix: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A wait for another thread is what locks are for."""
        lock = RWLock(open_session(), prefix + "a")
        held = lock.write().acquire()
        waiter = Taking(lock.write())
        until(lambda: len(keys(lock.session, lock.name)) == 2)
        held.release()
        waiter.result()
        assert "waits_for_itself" not in caplog.text

    def test_reading_twice_works_until_a_writer_waits(self, open_session: OpenSession, prefix: str) -> None:
        """Each read is a contender of its own; the second waits behind a writer that came in between."""
        one, other = open_session(), open_session()
        lock = RWLock(one, prefix + "a")
        with lock.read() as first, lock.read() as second:
            assert first.key != second.key
        assert keys(one, lock.name) == []
        with lock.read().acquire():
            writer = Taking(RWLock(other, lock.name).write())
            until(lambda: len(keys(one, lock.name)) == 2)
            with pytest.raises(LockTimeout):
                lock.read().acquire(timeout=0.2)
        assert writer.result().is_held()

    def test_one_side_entered_twice_in_a_thread_releases_both(self, open_session: OpenSession, prefix: str) -> None:
        """``with`` of one object inside itself gives each block its own hold."""
        side = RWLock(open_session(), prefix + "a").read()
        with side as outer:
            with side as inner:
                assert inner is not outer
            assert not inner.is_held()
            assert outer.is_held()
        assert not outer.is_held()

    def test_releasing_twice_and_elsewhere(self, open_session: OpenSession, prefix: str) -> None:
        """The second release of a read lock says the same and touches nobody; any thread may do either."""
        session = open_session()
        first, second = (RWLock(session, prefix + "a").read().acquire() for _ in range(2))
        said: list[str] = []
        for _ in range(2):
            thread = threading.Thread(target=lambda: said.append(first.release()))
            thread.start()
            thread.join(20)
        assert said == ["released", "released"]
        assert keys(session, prefix + "a") == [second.key]


class TestGivingUp:
    @pytest.mark.parametrize("side", ["read", "write"])
    def test_an_exception_from_a_signal_leaves_nothing_behind(
        self, open_session: OpenSession, prefix: str, side: str
    ) -> None:
        """Whatever a signal's handler raises into the wait ends it, and the contender is gone."""
        one, other = open_session(ttl=30), open_session(ttl=30)
        lock = RWLock(other, prefix + "a")

        class Enough(BaseException):
            pass

        def handler(*_: Any) -> None:
            raise Enough

        before = signal.signal(signal.SIGUSR2, handler)
        try:
            with Mutex(one, prefix + "a").acquire() as held:

                def interrupt() -> None:
                    until(lambda: len(keys(one, prefix + "a")) == 2)
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

                threading.Thread(target=interrupt, daemon=True).start()
                with pytest.raises(Enough):
                    (lock.read() if side == "read" else lock.write()).acquire()
                until(lambda: keys(one, prefix + "a") == [held.key])
        finally:
            signal.signal(signal.SIGUSR2, before)

    def test_closing_the_session_ends_its_waits(self, open_session: OpenSession, prefix: str) -> None:
        """From any thread: the waiters raise LockLost, and their keys are gone."""
        one, other = open_session(ttl=30), open_session(ttl=30)
        with RWLock(one, prefix + "a").write().acquire() as held:
            waiters = [Taking(RWLock(other, prefix + "a").read()), Taking(RWLock(other, prefix + "a").write())]
            until(lambda: len(keys(one, prefix + "a")) == 3)
            other.close()
            for waiter in waiters:
                waiter.thread.join(20)
                assert isinstance(waiter.error, LockLost)
            assert keys(one, prefix + "a") == [held.key]

    def test_a_reader_whose_key_was_deleted_does_not_go_in(self, open_session: OpenSession, prefix: str) -> None:
        """After waiting its own key is read again."""
        one, other = open_session(), open_session(ttl=30)
        with RWLock(one, prefix + "a").write().acquire() as held:
            waiter = Taking(RWLock(other, prefix + "a").read())
            until(lambda: len(keys(one, prefix + "a")) == 2)
            one.transport.delete(Delete(next(key for key in keys(one, prefix + "a") if key != held.key)))
        waiter.thread.join(20)
        assert "deleted while we waited" in str(waiter.error)
