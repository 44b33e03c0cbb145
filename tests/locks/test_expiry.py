"""Locks that are held for no longer than was said (`expire_after`), by bodies that do not end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from celery_etcd_lock.etcd.api import KeyValue, Put, Range, prefix_end
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.exceptions import EtcdUnavailable, LockContended, LockLost
from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.locks.acquire import acquire
from tests.clock import Clock

OpenSession = Callable[..., Session]


def keys(session: Session, name: str) -> list[KeyValue]:
    return list(session.transport.range(Range(name + "/", prefix_end(name + "/"), sort="create")).kvs)


class Timed:
    """A session in memory with a clock that the test moves, and what its threads would do done at each step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.session = Session(MemoryTransport(MemoryEtcd(clock=clock)), ttl=30, clock=clock, background=False)

    def passes(self, seconds: float) -> None:
        for _ in range(round(seconds)):
            self.clock.now += 1
            self.session.expiries.run(self.clock.now)
            self.session.keep()


@pytest.fixture
def timed(clock: Clock) -> Timed:
    return Timed(clock)


def test_it_is_lost_when_its_time_is_over_and_its_key_goes_after_the_grace(timed: Timed) -> None:
    """Held until then; lost with the reason, which whoever asked is told once; then the next one goes in."""
    held, told = Mutex(timed.session, "/a").acquire(), list[str]()
    held.on_lost(told.append)
    held.expire_after(100, grace=20, reason="held for longer than lock_at_most_for=100 s")
    assert held.remaining() == pytest.approx(27), "while the session can say no more"
    timed.passes(90)
    assert held.remaining() == pytest.approx(10)
    timed.passes(9)
    assert held.is_held()
    assert not told
    timed.passes(1)
    assert not held.is_held()
    assert told == ["held for longer than lock_at_most_for=100 s"]
    with pytest.raises(LockLost, match="lock_at_most_for=100 s"):
        held.assert_held()
    timed.passes(19)
    with pytest.raises(LockContended):
        Mutex(timed.session, "/a").acquire(blocking=False)
    timed.passes(1)
    next_ = Mutex(timed.session, "/a").acquire(blocking=False)
    assert next_.fencing_token > held.fencing_token
    assert held.release() == "lost"
    assert next_.is_held()
    assert [kv.key for kv in keys(timed.session, "/a")] == [next_.key]
    assert len(told) == 1
    assert not timed.session.contenders.unfinished
    assert not timed.session.lost


def test_the_reason_need_not_be_given(timed: Timed) -> None:
    """Then it says how long."""
    held = Mutex(timed.session, "/a").acquire()
    held.expire_after(2.5, grace=1)
    timed.passes(3)
    assert held.why_not() == "held for longer than 2.5 s"


@pytest.mark.parametrize("at_least_for", [0, 600])
def test_the_sibling_goes_with_it(timed: Timed, at_least_for: float) -> None:
    """Whose body does not end has its lock taken away whole."""
    held = acquire(timed.session, "/a", at_least_for=at_least_for)
    held.expire_after(10, grace=5)
    timed.passes(14)
    assert len(keys(timed.session, "/a")) == (2 if at_least_for else 1)
    timed.passes(1)
    assert keys(timed.session, "/a") == []
    assert len(timed.session.contenders) == 0


def test_released_in_the_grace_it_is_lost_and_the_sibling_stays(timed: Timed) -> None:
    """The body was ended by its loss: its key goes then, nothing more is done after the grace, or to the next one."""
    held = acquire(timed.session, "/a", at_least_for=600)
    held.expire_after(10, grace=60)
    timed.passes(11)
    assert held.release([Put("/done", b"")]) == "lost"
    assert not timed.session.transport.range(Range("/done")).kvs
    (left,) = keys(timed.session, "/a")
    assert left.key != held.key
    timed.session.transport.lease_revoke(left.lease)
    with Mutex(timed.session, "/a").acquire(blocking=False) as next_:
        timed.passes(100)
        assert next_.is_held()


def test_released_in_time_nothing_comes_of_it(timed: Timed) -> None:
    """The next holder, under the very same key, is not touched when the time of the one before is over."""
    held, told = Mutex(timed.session, "/a").acquire(), list[str]()
    held.on_lost(told.append)
    held.expire_after(10, grace=0)
    assert held.release() == "released"
    with Mutex(timed.session, "/a").acquire() as next_:
        assert next_.key == held.key
        timed.passes(30)
        assert next_.is_held()
    assert not told
    held.expire_after(0, grace=0)
    timed.passes(1)
    assert held.why_not() == "it was released"


def test_the_clock_is_enough(timed: Timed, clock: Clock) -> None:
    """Whoever asks, or releases, after the time is over is told so, though no thread has come to say it."""
    asked, released = Mutex(timed.session, "/a").acquire(), Mutex(timed.session, "/b").acquire()
    for held in (asked, released):
        held.expire_after(10, grace=5)
    clock.now += 10
    with pytest.raises(LockLost, match="held for longer than 10 s"):
        asked.assert_held()
    assert released.release([Put("/done", b"")]) == "lost"
    assert not timed.session.transport.range(Range("/done")).kvs
    assert not timed.session.lost


def test_called_again_it_counts_anew(timed: Timed) -> None:
    """The last word counts."""
    held = Mutex(timed.session, "/a").acquire()
    held.expire_after(10, grace=5)
    timed.passes(9)
    held.expire_after(10, grace=5)
    timed.passes(9)
    assert held.is_held()
    timed.passes(1)
    assert not held.is_held()


def test_the_key_goes_though_etcd_was_away(timed: Timed) -> None:
    """The removal that gets no answer is tried until it does."""
    held = Mutex(timed.session, "/a").acquire()
    held.expire_after(10, grace=5)

    def away(verb: str, _asked: Any) -> None:
        if verb == "txn":
            raise EtcdUnavailable("staged", True)

    transport: Any = timed.session.transport
    timed.passes(14)
    transport.before = away
    timed.passes(5)
    assert keys(timed.session, "/a")
    transport.before = None
    timed.passes(4)
    assert not keys(timed.session, "/a")
    assert held.release() == "lost"


def test_a_body_that_does_not_end(open_session: OpenSession, prefix: str) -> None:
    """On the clock of the machine: told at its time, and the waiter goes in after the grace, not before."""
    session, other = open_session(ttl=30), open_session(ttl=30)
    held, told = Mutex(session, prefix + "a").acquire(), list[float]()
    held.on_lost(lambda _reason: told.append(time.monotonic()))
    began = time.monotonic()
    held.expire_after(0.5, grace=0.5)
    with Mutex(other, prefix + "a").acquire(timeout=60):
        went_in = time.monotonic()
    assert 0.5 <= told[0] - began <= went_in - began - 0.4
    assert 1.0 <= went_in - began < 25, "long before the lease would be over"
    assert held.release() == "lost"
    assert session.remaining() > 0


def test_it_costs_no_thread(open_session: OpenSession, prefix: str) -> None:
    """However many there are, the thread that watches the session's deadline looks after them, all at their times."""
    session, told = open_session(ttl=30), list[int]()
    for _ in range(2):  # the first for the transport's own
        Mutex(session, prefix + "first").acquire().release()
    threads = threading.active_count()
    held = [Mutex(session, f"{prefix}{number}").acquire() for number in range(50)]
    for number, each in enumerate(held):
        each.on_lost(lambda _reason, number=number: told.append(number))  # type: ignore[misc]
        each.expire_after(1.5 - number / 50, grace=60)
    assert threading.active_count() == threads
    deadline = time.monotonic() + 60
    while len(told) < 50:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert told == list(reversed(range(50)))
    assert {each.release() for each in held} == {"lost"}


def test_a_forked_copy_expires_nothing(open_session: OpenSession, prefix: str) -> None:
    """In a child the lock is not held anyway, and what is said there is not said of the parent's."""
    session = open_session(ttl=30)
    held = Mutex(session, prefix + "a").acquire()
    held.expire_after(60, grace=60)
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            held.expire_after(0, grace=0)
            os._exit(0 if not held.is_held() and len(session.expiries._pending) == 1 else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert held.is_held()
    assert held.release() == "released"
