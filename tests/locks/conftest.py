"""Sessions on every transport, and a scenario that shows whether a lock excludes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Transport
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.locks import Session
from tests.clock import Clock
from tests.servers import skip_or_fail

OpenSession = Callable[..., Session]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryEtcd:
    return MemoryEtcd(clock=clock)


@pytest.fixture
def session(store: MemoryEtcd, clock: Clock) -> Session:
    """In memory, with a clock that the test moves, and nothing in its background: the test calls `keep` itself."""
    return Session(MemoryTransport(store), ttl=30, clock=clock, background=False)


@pytest.fixture(params=["memory", "gateway", "grpc"])
def new_transport(request: pytest.FixtureRequest) -> Iterator[Callable[[], Transport]]:
    """Makes clients of one etcd: the one in memory, and the real one through its gateway and over gRPC."""
    made: list[Transport] = []
    if request.param == "memory":
        store = MemoryEtcd()

        def new() -> Transport:
            return MemoryTransport(store)
    else:
        url = request.getfixturevalue("etcd").url

        def new() -> Transport:
            try:
                made.append(connect(url, transport=request.param))
            except ConfigError as missing:
                skip_or_fail(missing)
            return made[-1]

    yield new
    for transport in made:
        transport.close()


@pytest.fixture
def open_session(new_transport: Callable[[], Transport]) -> Iterator[OpenSession]:
    """Opens sessions, each with a client of its own, and closes them at the end."""
    opened: list[Session] = []

    def open_(*, ttl: int = 5) -> Session:
        opened.append(Session(new_transport(), ttl=ttl))
        return opened[-1]

    yield open_
    for session in opened:
        session.close()


@dataclass
class Record:
    """Who was inside when, on one monotonic clock."""

    intervals: list[tuple[float, float]] = field(default_factory=list)

    def overlaps(self) -> int:
        ordered = sorted(self.intervals)
        return sum(late[0] < early[1] for early, late in pairwise(ordered))


def crowd(doors: list[Callable[[], AbstractContextManager[object]]], *, times: int = 3) -> Record:
    """Everybody goes in through their door at once, `times` times, and stays for a moment."""
    record, start = Record(), threading.Barrier(len(doors))
    failures: list[BaseException] = []

    def come(door: Callable[[], AbstractContextManager[object]]) -> None:
        try:
            start.wait()
            for _ in range(times):
                with door():
                    entered = time.monotonic()
                    time.sleep(0.005)  # the stay itself
                    record.intervals.append((entered, time.monotonic()))
        except BaseException as failure:
            failures.append(failure)
            raise

    threads = [threading.Thread(target=come, args=(door,), daemon=True) for door in doors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    assert len(record.intervals) == times * len(doors)
    return record


@pytest.fixture(name="crowd")
def crowd_fixture() -> Callable[..., Record]:
    return crowd
