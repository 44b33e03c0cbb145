"""The watches behind the waits: one for each lock name, and nothing missed by who comes late to one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from celery_etcd_lock.etcd.api import Delete, Put, Txn, Watch, WatchReply, WatchStream
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.exceptions import AuthRejected, LockLost
from celery_etcd_lock.locks import Election, Mutex, Semaphore, Session
from celery_etcd_lock.locks.acquire import _Attempt
from celery_etcd_lock.locks.waiting import Wakeups
from tests.workers import until


@pytest.fixture
def transport() -> Iterator[MemoryTransport]:
    made = MemoryTransport(MemoryEtcd())
    yield made
    made.close()


def put(transport: MemoryTransport, *keys: str) -> int:
    return transport.txn(Txn([], [Put(key, b"") for key in keys])).header.revision


def quiet(transport: MemoryTransport) -> Callable[[], bool]:
    """Whether nothing has been sent for a while."""
    seen = [0, -1]

    def settled() -> bool:
        seen[:] = [seen[0] + 1 if transport.requests == seen[1] else 0, transport.requests]
        return seen[0] > 20

    return settled


def test_who_comes_late_is_told_of_what_has_passed(transport: MemoryTransport) -> None:
    """A key goes away after somebody looked and before they wait for it, while the watch is up: they are woken."""
    wakeups, first, second, late = Wakeups(transport), *(threading.Event() for _ in range(3))
    seen = put(transport, "/a/1", "/a/2", "/a/3")
    with wakeups.watching("/a", ["/a/1", "/a/3"], seen + 1, first):
        until(transport._open_watches)
        with wakeups.watching("/a", ["/a/2"], seen + 1, second):
            transport.delete(Delete("/a/2"))
            assert second.wait(20)
        assert not first.is_set()
        with wakeups.watching("/a", ["/a/2"], seen + 1, late):
            assert late.wait(0), "the watch has told of it before"
        late.clear()
        with wakeups.watching("/a", ["/a/3"], seen + 2, late):
            assert not late.wait(0.05), "and there is nothing to tell of what came before they looked"


def test_puts_wake_only_who_asked_for_them(transport: MemoryTransport) -> None:
    """An observer and a waiter share a watch; a proclamation is for the observer."""
    wakeups, waiter, observer, everything = Wakeups(transport), *(threading.Event() for _ in range(3))
    seen = put(transport, "/a/1", "/a/2")
    with (
        wakeups.watching("/a", ["/a/1"], seen + 1, waiter),
        wakeups.watching("/a", ["/a/1"], seen + 1, observer, puts=True),
        wakeups.watching("/a", ["/a/"], seen + 1, everything, puts=True),
    ):
        put(transport, "/a/2")
        assert everything.wait(20)
        put(transport, "/a/1")
        assert observer.wait(20)
        assert not waiter.is_set()
        transport.delete(Delete("/a/1"))
        assert waiter.wait(20)


def test_one_watch_however_many_wait(transport: MemoryTransport) -> None:
    """Candidates, slots and an observer of one session on one name have one stream between them; then none."""
    store = transport.store
    with Session(transport, ttl=600) as session, Session(MemoryTransport(store), ttl=600) as other:
        taken = Mutex(other, "/a").acquire()
        threads = [
            threading.Thread(target=lambda: Semaphore(session, "/a", limit=2).acquire().release(), daemon=True)
            for _ in range(5)
        ]
        observation = Election(session, "/a").observe()
        threads.append(threading.Thread(target=lambda: list(observation), daemon=True))
        for thread in threads:
            thread.start()
        quiet_now = quiet(transport)
        until(lambda: len(session.contenders) == 5 and quiet_now())
        assert list(session.wakeups._watches) == ["/a"]
        assert len([watch for watch in transport._open_watches() if not watch.closed]) == 1
        taken.release()
        for thread in threads[:-1]:
            thread.join(20)
        observation.close()
        threads[-1].join(20)
        assert not any(thread.is_alive() for thread in threads)
        until(lambda: not session.wakeups._watches)


def test_a_release_wakes_as_many_as_there_are_slots(transport: MemoryTransport) -> None:
    """Of 30 that wait for one of two slots, a release makes two look, not 30."""
    with Session(transport, ttl=600, background=False) as session:
        semaphore = Semaphore(session, "/a", limit=2)
        held = [semaphore.acquire() for _ in range(2)]
        got: list[object] = []

        def come() -> None:
            with contextlib.suppress(LockLost):  # at the end of the test
                got.append(semaphore.acquire())

        threads = [threading.Thread(target=come, daemon=True) for _ in range(30)]
        for thread in threads:
            thread.start()
        until(lambda: len(session.contenders) == 32)
        until(quiet(transport))
        before = transport.requests
        held[0].release()
        until(lambda: got)
        until(quiet(transport))
        assert transport.requests - before <= 1 + 2
        assert len(got) == 1


def test_a_watch_that_is_refused_is_not_asked_for_again_and_again(
    transport: MemoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pauses grow, since each attempt may be a log-in; and once it is let the watch is there."""
    opened: list[float] = []
    watch = transport.watch

    def refuse(request: Watch) -> WatchStream:
        opened.append(time.monotonic())
        if len(opened) <= 3:
            raise AuthRejected("staged: permission denied", 7)
        return watch(request)

    monkeypatch.setattr(transport, "watch", Refusing(refuse))
    wakeups, event = Wakeups(transport), threading.Event()
    seen = put(transport, "/a/1")
    with wakeups.watching("/a", ["/a/1"], seen + 1, event):
        until(lambda: len(opened) > 3 and transport._open_watches())
        transport.delete(Delete("/a/1"))
        assert event.wait(20)
    pauses = [late - early for early, late in pairwise(opened)]
    assert all(pause >= least for pause, least in zip(pauses, (0.39, 0.79, 1.59), strict=True))


class Refusing:
    """Opens streams as `open_` does, at the first step of each, as the transports do."""

    def __init__(self, open_: Callable[[Watch], WatchStream]) -> None:
        self._open = open_

    def __call__(self, request: Watch) -> WatchStream:
        return self.Stream(self._open, request)

    class Stream:
        def __init__(self, open_: Callable[[Watch], WatchStream], request: Watch) -> None:
            self._open, self._request = open_, request
            self._stream: WatchStream | None = None

        def __iter__(self) -> Iterator[WatchReply]:
            self._stream = self._open(self._request)
            return iter(self._stream)

        def close(self) -> None:
            if self._stream is not None:
                self._stream.close()


class TestLocalListening:
    """Who waits behind a contender of the same session needs no watch: that one tells, whatever it knows of itself."""

    class Held:
        """Keeps back the answers to what the thread ``slow`` sends, once they are there."""

        def __init__(self, transport: MemoryTransport) -> None:
            self.there, self.let_go = threading.Event(), threading.Event()
            transport.after = self.after

        def after(self, verb: str, _request: object) -> None:
            if verb == "txn" and threading.current_thread().name == "slow" and not self.there.is_set():
                self.there.set()
                assert self.let_go.wait(20)

    @staticmethod
    def come(session: Session, name: str, order: list[str]) -> threading.Thread:
        def inside() -> None:
            with Mutex(session, "/a").acquire():
                order.append(name)

        thread = threading.Thread(target=inside, name=name, daemon=True)
        thread.start()
        return thread

    def test_behind_one_that_has_no_answer_yet(self, transport: MemoryTransport) -> None:
        """It is waited for quietly, without a look after the other, until it has been in."""
        with (
            Session(transport, ttl=600) as session,
            Session(MemoryTransport(transport.store), ttl=600) as other,
        ):
            taken, answer, order = Mutex(other, "/a").acquire(), self.Held(transport), list[str]()
            slow = self.come(session, "slow", order)
            assert answer.there.wait(20)
            before = transport.requests
            behind = self.come(session, "behind", order)
            until(lambda: any(each.listeners for each in session.contenders._by_key.values()))
            until(quiet(transport))
            assert transport.requests - before == 1
            answer.let_go.set()
            taken.release()
            slow.join(20)
            behind.join(20)
            assert order == ["slow", "behind"]

    def test_behind_one_that_went_while_its_name_is_taken_again(
        self, transport: MemoryTransport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The one that was seen is gone, though the new one of that name cannot tell yet: it tells when it can."""
        with Session(transport, ttl=600) as session:
            first, answer, order = Mutex(session, "/a").acquire(), self.Held(transport), list[str]()
            join, joined, go_on = _Attempt.join, threading.Event(), threading.Event()

            def slow_join(attempt: _Attempt) -> object:
                found = join(attempt)
                if threading.current_thread().name == "behind":
                    joined.set()
                    assert go_on.wait(20)
                return found

            monkeypatch.setattr(_Attempt, "join", slow_join)
            behind = self.come(session, "behind", order)
            assert joined.wait(20)
            first.release()
            slow = self.come(session, "slow", order)
            assert answer.there.wait(20)
            go_on.set()
            again = session.contenders._by_key[first.key]
            until(lambda: again.listeners)
            assert not order
            answer.let_go.set()
            behind.join(20)
            slow.join(20)
            assert order == ["behind", "slow"]

    def test_behind_one_whose_name_somebody_else_has(self, transport: MemoryTransport) -> None:
        """A key that is not ours, under a name that a local contender tries in vain, is watched after all."""
        with Session(transport, ttl=600) as session:
            key, order = f"/a/write/{session.lease:x}", list[str]()
            put(transport, key)
            answer = self.Held(transport)
            slow = self.come(session, "slow", order)
            assert answer.there.wait(20)
            behind = self.come(session, "behind", order)
            until(lambda: any(each.listeners for each in session.contenders._by_key.values()))
            answer.let_go.set()
            transport.delete(Delete(key))
            slow.join(20)
            behind.join(20)
            assert sorted(order) == ["behind", "slow"]
