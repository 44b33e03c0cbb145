"""Errands of a worker's main process, and which sessions it may end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest

from celery_etcd_lock.etcd import Transport, connect
from celery_etcd_lock.etcd.api import Delete, Put, Range, Txn
from celery_etcd_lock.exceptions import EtcdRejected, EtcdUnavailable
from celery_etcd_lock.locks.session import Session
from celery_etcd_lock.orphans import Orphans
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.errands import Errands
from tests.workers import until

INSTANCE = "00c0ffee"


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings(endpoints=f"memory://{request.node.name}")  # type: ignore[arg-type]


@pytest.fixture
def errands(settings: Settings) -> Iterator[Errands]:
    made = Errands(settings)
    yield made
    made.close(within=5)


def test_what_is_given_is_done_in_order_in_another_thread(errands: Errands, settings: Settings) -> None:
    """The caller does not wait; what `ask` is given comes back."""
    seen: list[tuple[int, bool]] = []
    here = threading.get_ident()

    def note(number: int, _transport: Transport) -> None:
        seen.append((number, threading.get_ident() == here))

    for number in range(3):
        assert errands.later(partial(note, number))
    transport = settings.connect()
    transport.txn(Txn([], [Put("/mark", b"x")]))
    assert errands.later(lambda transport: transport.delete(Delete("/mark")))
    assert errands.ask(lambda transport: transport.range(Range("/mark")).count, within=30) == 0
    assert seen == [(0, False), (1, False), (2, False)]


def test_one_that_fails_does_not_stop_the_next(errands: Errands, caplog: pytest.LogCaptureFixture) -> None:
    """etcd's no, and a bug in an errand: each is logged, and the rest is done."""

    def refused(_transport: Transport) -> None:
        raise EtcdRejected("not so")

    def broken(_transport: Transport) -> None:
        raise ZeroDivisionError

    assert errands.later(refused)
    assert errands.later(broken)
    assert errands.ask(lambda _transport: "done", within=30) == "done"
    assert "etcd_lock.errand_failed: not so" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(EtcdRejected, match="not so"):
        errands.ask(refused, within=30)


def test_one_that_gets_no_answer_is_done_again_while_there_is_patience(errands: Errands) -> None:
    """For as long as it was given, and then no more; the next has its turn."""
    tried: list[float] = []

    def unanswered(_transport: Transport) -> None:
        tried.append(time.monotonic())
        if len(tried) < 3:
            raise EtcdUnavailable

    def never(_transport: Transport) -> None:
        tried.append(time.monotonic())
        raise EtcdUnavailable

    errands.later(unanswered)
    until(lambda: len(tried) == 3, "the third attempt", seconds=30)
    errands.later(never, patience=0.1)
    assert errands.ask(lambda _transport: "next", within=30) == "next"
    assert len(tried) <= 5


def test_a_forked_copy_does_nothing_and_its_like_made_anew_does(settings: Settings) -> None:
    """In a child `later` says no, even where the fork came in the middle of an errand."""
    parents = Errands(settings, forks=True)
    inside, go_on = threading.Event(), threading.Event()

    def hang(_transport: Transport) -> None:
        inside.set()
        go_on.wait(30)

    parents.later(hang)
    assert inside.wait(30)
    child = os.fork()
    if child == 0:
        refused = parents.later(lambda _transport: None) is False
        done = Errands(settings).ask(lambda _transport: True, within=10)
        os._exit(0 if refused and done else 1)
    go_on.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    parents.close(within=5)


def test_nothing_is_done_where_locking_is_off() -> None:
    """Nor is a thread started."""
    before = threading.active_count()
    assert Errands(Settings(enabled=False)).later(lambda _transport: None) is False
    assert threading.active_count() == before


@dataclass
class Child:
    """What of billiard's process object is looked at."""

    pid: int
    returncode: int | None = None
    _popen: SimpleNamespace = field(init=False)

    def __post_init__(self) -> None:
        self._popen = SimpleNamespace(pid=self.pid, returncode=self.returncode)


@pytest.fixture
def reused() -> Iterator[int]:
    """The pid of a process that lives."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def session_of(transport: Transport, pid: int, start: str) -> Session:
    """A session of the process `pid`, as it stands in etcd."""
    session = Session(transport, instance=INSTANCE, background=False)
    key = f"/celery/sessions/{INSTANCE}/{pid}-{session.lease:x}"
    transport.txn(Txn([], [Delete(session.key), Put(key, f'{{"start":"{start}"}}'.encode(), session.lease)]))
    return session


def test_of_a_pid_that_somebody_has_again_only_old_sessions_are_ended(
    errands: Errands, settings: Settings, reused: int
) -> None:
    """Those from well before the dead was last seen alive; one that is not dated could be the new one's."""
    transport = connect(settings.endpoints)
    old = session_of(transport, reused, "2020-01-01T00:00:00Z")
    new = session_of(transport, reused, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    undated = session_of(transport, reused, "")
    others = session_of(transport, reused + 1, "2020-01-01T00:00:00Z")
    child = Child(reused)
    orphans = Orphans(errands, f"/celery/sessions/{INSTANCE}/", lambda: [child])
    assert orphans.look() is False
    assert transport.lease_time_to_live(old.lease).ttl > 0, "it lives"
    child._popen.returncode = -9
    orphans.look()
    errands.ask(lambda _transport: None, within=30)
    left = {
        session.lease: transport.lease_time_to_live(session.lease).ttl > 0 for session in (old, new, undated, others)
    }
    assert left == {old.lease: False, new.lease: True, undated.lease: True, others.lease: True}


def test_of_a_pid_that_nobody_has_all_sessions_are_ended(errands: Errands, settings: Settings) -> None:
    """However young; and a child that is only being started, or is gone from the list, is not taken for dead."""
    transport = connect(settings.endpoints)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    session = session_of(transport, dead.pid, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    child, unborn = Child(dead.pid, returncode=0), Child(0)
    unborn._popen = None  # type: ignore[assignment]
    orphans = Orphans(errands, f"/celery/sessions/{INSTANCE}/", lambda: [child, unborn])
    assert orphans.look() is True, "somebody is being born"
    errands.ask(lambda _transport: None, within=30)
    assert transport.lease_time_to_live(session.lease).ttl <= 0
