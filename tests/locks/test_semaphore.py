"""The semaphore, on every transport."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest

from celery_etcd_lock.etcd.api import Range, prefix_end
from celery_etcd_lock.exceptions import ConfigError, LockContended, LockTimeout
from celery_etcd_lock.locks import HeldLock, Mutex, Semaphore, Session
from tests.workers import until

OpenSession = Callable[..., Session]


def keys(session: Session, name: str) -> list[str]:
    return [kv.key for kv in session.transport.range(Range(name + "/", prefix_end(name + "/"), sort="create")).kvs]


class Most:
    """How many were inside at once, at most."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def through(self, door: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        with door():
            with self._lock:
                self.now += 1
                self.most = max(self.most, self.now)
            yield
            with self._lock:
                self.now -= 1


def test_lets_in_as_many_as_its_limit(open_session: OpenSession, prefix: str) -> None:
    """The fourth of three is refused without a trace, or times out; when one leaves, one goes in."""
    one, other = open_session(), open_session()
    semaphores = [Semaphore(session, prefix + "a", limit=3) for session in (one, other)]
    held = [semaphores[number % 2].acquire(blocking=bool(number % 2)) for number in range(3)]
    assert all(each.key.startswith(prefix + "a/slot/") for each in held)
    revision = one.transport.range(Range(prefix)).header.revision
    with pytest.raises(LockContended) as refused:
        semaphores[0].acquire(blocking=False)
    assert refused.value.holder
    assert one.transport.range(Range(prefix)).header.revision == revision
    with pytest.raises(LockTimeout):
        semaphores[1].acquire(timeout=0.2)
    held[1].release()
    semaphores[0].acquire(blocking=False).release()
    assert len(keys(one, prefix + "a")) == 2


@pytest.mark.parametrize("blocking", [True, False])
def test_never_more_than_the_limit(
    open_session: OpenSession, prefix: str, crowd: Callable[..., Any], blocking: bool
) -> None:
    """Eight threads of two sessions, waiting or trying: never four are in at once."""
    sessions = [open_session(ttl=30), open_session(ttl=30)]

    def door(number: int) -> HeldLock:
        while True:
            with contextlib.suppress(LockContended):
                return Semaphore(sessions[number % 2], prefix + "a", limit=3).acquire(blocking=blocking)

    most = Most()
    crowd([lambda number=number: most.through(lambda: door(number)) for number in range(8)])
    assert 1 <= most.most <= 3
    assert keys(sessions[0], prefix + "a") == []


def test_without_a_semaphore_there_are_more(crowd: Callable[..., Any]) -> None:
    """Control: the same crowd through open doors."""
    most = Most()
    crowd([lambda: most.through(contextlib.nullcontext)] * 8)
    assert most.most > 3


def test_is_granted_in_the_order_of_queueing(open_session: OpenSession, prefix: str) -> None:
    """Each release lets in who has waited longest, and nobody else."""
    sessions = [open_session(ttl=30), open_session(ttl=30)]
    holders = [Semaphore(sessions[0], prefix + "a", limit=2).acquire() for _ in range(2)]
    got: dict[int, HeldLock] = {}

    def come(number: int) -> None:
        got[number] = Semaphore(sessions[number % 2], prefix + "a", limit=2).acquire(timeout=30)

    for number in range(6):
        threading.Thread(target=come, args=(number,), daemon=True).start()
        until(lambda number=number: len(keys(sessions[0], prefix + "a")) == number + 3)  # type: ignore[misc]
    for number in range(6):
        assert sorted(got) == list(range(number))
        holders.pop(0).release()
        until(lambda number=number: number in got)  # type: ignore[misc]
        holders.append(got[number])


def test_what_a_try_costs(open_session: OpenSession, prefix: str) -> None:
    """One request while nobody is in, two beside others; waiting in line one; a release one."""
    session, other = open_session(ttl=30), open_session(ttl=30)
    semaphore, transport = Semaphore(session, prefix + "a", limit=3), session.transport

    def cost(**options: Any) -> int:
        before: int = transport.requests  # type: ignore[attr-defined]
        held = semaphore.acquire(**options)
        taken: int = transport.requests - before  # type: ignore[attr-defined]
        held.release()
        assert transport.requests - before == taken + 1  # type: ignore[attr-defined]
        return taken

    assert cost() == 1
    assert cost(blocking=False) == 1
    with Semaphore(other, prefix + "a", limit=3).acquire():
        assert cost() == 1
        assert cost(blocking=False) == 2


def test_limits_may_differ_for_a_while(open_session: OpenSession, prefix: str) -> None:
    """There are never more holders than the largest limit; a smaller one waits for those before it only."""
    session = open_session()
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(Semaphore(session, prefix + "a", limit=4).acquire())
        with pytest.raises(LockContended):
            Semaphore(session, prefix + "a", limit=2).acquire(blocking=False)
        for _ in range(2):
            stack.enter_context(Semaphore(session, prefix + "a", limit=4).acquire(blocking=False))
        with pytest.raises(LockContended):
            Semaphore(session, prefix + "a", limit=4).acquire(blocking=False)


def test_excludes_the_mutex_of_its_name(open_session: OpenSession, prefix: str) -> None:
    """A slot keeps an exclusive lock out, and that keeps slots out."""
    session = open_session()
    with Semaphore(session, prefix + "a", limit=4).acquire(), pytest.raises(LockContended):
        Mutex(session, prefix + "a").acquire(blocking=False)
    with Mutex(session, prefix + "a").acquire(), pytest.raises(LockContended):
        Semaphore(session, prefix + "a", limit=4).acquire(blocking=False)


def test_twice_in_one_thread_takes_two_slots(open_session: OpenSession, prefix: str) -> None:
    """And the third acquisition of two waits for itself."""
    semaphore = Semaphore(open_session(), prefix + "a", limit=2)
    with semaphore as one, semaphore as two:
        assert one.key != two.key
        with pytest.raises(LockTimeout):
            semaphore.acquire(timeout=0.2)


@pytest.mark.parametrize("limit", [0, -3, True, 2.5, "4", None])
def test_refuses_limits_that_cannot_be(open_session: OpenSession, prefix: str, limit: Any) -> None:
    """A limit is a whole number from 1 on."""
    with pytest.raises(ConfigError, match="limit"):
        Semaphore(open_session(), prefix + "a", limit=limit)
