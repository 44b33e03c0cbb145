"""Waits that a signal ends: its handler raises in the middle of one, as Celery's soft time limit does."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from celery_etcd_lock.etcd.api import Range, prefix_end
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.queue import EXCLUSIVE, Mode, slot_of
from celery_etcd_lock.locks.rider import Rider
from celery_etcd_lock.locks.waiting import Bell

OpenSession = Callable[..., Session]

TIMES = 200
"""How often a wait is interrupted, each time at another moment."""


class InterruptedWaitError(Exception):
    """What the handler raises."""


class Deferred:
    """A handler that raises inside the `waiting` of an acquire and nowhere else: what comes before then, comes then."""

    def __init__(self) -> None:
        self._open = False
        self._pending = False
        self.entered = 0

    def handle(self, *_args: object) -> None:
        if not self._open:
            self._pending = True
            return
        self._open = False
        raise InterruptedWaitError

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self.entered += 1
        self._open = True
        try:
            if self._pending:
                self._pending = False
                raise InterruptedWaitError
            yield
        finally:
            self._open = False


@pytest.fixture
def deferred() -> Iterator[Deferred]:
    made = Deferred()
    before = signal.signal(signal.SIGALRM, made.handle)
    yield made
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def keys(session: Session, name: str) -> list[str]:
    return [kv.key for kv in session.transport.range(Range(name + "/", prefix_end(name + "/"))).kvs]


@pytest.mark.parametrize("mode", [EXCLUSIVE, slot_of(1)], ids=lambda mode: mode.kind)
def test_an_exception_in_mid_wait_leaves_nothing(
    open_session: OpenSession, prefix: str, deferred: Deferred, mode: Mode
) -> None:
    """Behind a holder of another session and of the same: the contender and its sibling go, every time."""
    session, other = open_session(ttl=60), open_session(ttl=60)
    moments = random.Random(4)
    for holder in (session, other):
        with Mutex(holder, prefix + "a").acquire() as held:
            for number in range(TIMES // 2):
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.0001, 0.01))
                began = time.monotonic()
                with pytest.raises(InterruptedWaitError):
                    acquire(
                        session, prefix + "a", mode, timeout=60 if number % 3 else None,
                        at_least_for=60 * (number % 2), waiting=deferred.waiting, rider=Rider([], []),
                    )  # fmt: skip
                assert time.monotonic() - began < 20, "a signal that comes right before the wait is heard all the same"
                assert keys(session, prefix + "a") == [held.key], f"time {number}"
            assert len(session.contenders) == (1 if holder is session else 0)
    assert not session.contenders.unfinished
    with acquire(session, prefix + "a", mode, blocking=False):  # and nothing was left locked
        pass
    assert deferred.entered >= TIMES


def test_it_is_entered_around_waits_and_never_around_a_request(open_session: OpenSession) -> None:
    """No request, nor any other of our work, happens inside; a lock that is free enters it not once."""
    session = Session(MemoryTransport(MemoryEtcd()), ttl=60, background=False)
    inside, seen = threading.local(), list[bool]()

    @contextlib.contextmanager
    def waiting() -> Iterator[None]:
        inside.now = True
        seen.append(True)
        yield
        inside.now = False

    def look(_verb: str, _asked: Any) -> None:
        assert not getattr(inside, "now", False)

    session.transport.before = look  # type: ignore[attr-defined]
    acquire(session, "/a", waiting=waiting).release()
    acquire(session, "/a", blocking=False, waiting=waiting).release()
    assert not seen
    held, started = Mutex(session, "/a").acquire(), threading.Event()

    def release() -> None:
        assert started.wait(20)
        held.release()

    def opened() -> AbstractContextManager[None]:
        started.set()
        return waiting()

    threading.Thread(target=release, daemon=True).start()
    acquire(session, "/a", waiting=opened, timeout=60).release()
    assert seen


class TestBell:
    def test_rings_for_who_comes_later(self) -> None:
        """Rung before the wait it ends it at once, once; cleared it does not."""
        bell = Bell()
        bell.set()
        bell.set()
        assert wait(bell)
        assert not wait(bell)
        bell.set()
        bell.clear()
        assert not wait(bell)

    def test_can_be_set_whatever_became_of_who_waited(self, deferred: Deferred) -> None:
        """An exception at any moment of the wait leaves nothing that a set would wait for."""
        moments = random.Random(4)
        for _ in range(TIMES):
            bell = Bell()
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.0001, 0.002))
            with pytest.raises(InterruptedWaitError), deferred.waiting():
                wait_for_ever(bell)
            setter = threading.Thread(target=bell.set, daemon=True)
            setter.start()
            setter.join(20)
            assert not setter.is_alive()


def wait_for_ever(bell: Bell) -> None:
    while True:
        bell.wait(0.0005)


def wait(bell: Bell) -> bool:
    """Whether it rang within a moment."""
    rang = threading.Event()

    def listen() -> None:
        bell.wait(0.05)
        rang.set()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    thread.join(0.04)
    rung = rang.is_set()
    thread.join(20)
    return rung
