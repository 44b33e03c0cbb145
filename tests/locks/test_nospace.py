"""Locks in an etcd that has reached its quota: refused at once, given back all the same, and going on afterwards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import pytest

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Range, Txn, TxnReply
from celery_etcd_lock.exceptions import ConfigError, EtcdUnavailable, LockLost, NoSpace
from celery_etcd_lock.locks import Election, HeldLock, Mutex, RWLock, Semaphore, Session
from celery_etcd_lock.testing import EtcdServer
from tests.costs import Bill, until
from tests.quota import fill, make_room, small_etcd
from tests.servers import skip_or_fail

Name = Literal["gateway", "grpc"]
TTL = 4


@pytest.fixture
def server() -> Iterator[EtcdServer]:
    with small_etcd() as started:
        yield started


@pytest.fixture(params=["gateway", "grpc"])
def transport(request: pytest.FixtureRequest) -> Name:
    if request.param == "grpc":
        try:
            connect("http://127.0.0.1:1", transport="grpc").close()
        except ConfigError as missing:
            skip_or_fail(missing)
    name: Name = request.param
    return name


@pytest.fixture
def open_session(server: EtcdServer, transport: Name) -> Iterator[Callable[[], Session]]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Session.open(server.url, ttl=TTL, transport=transport))


def keys(session: Session, name: str) -> list[str]:
    return [kv.key for kv in session.transport.range(Range(name + "/", name + "0")).kvs]


def counted(monkeypatch: pytest.MonkeyPatch, session: Session) -> list[Txn]:
    """What `session` sends from now on."""
    sent: list[Txn] = []
    txn = session.txn

    def counting(request: Txn, *, timeout: float | None = None) -> TxnReply:
        sent.append(request)
        return txn(request, timeout=timeout)

    monkeypatch.setattr(session, "txn", counting)
    return sent


def test_a_full_etcd_refuses_locks_and_takes_them_back(
    server: EtcdServer, open_session: Any, transport: Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acquires are `NoSpace` after one request; what is held stays held, renewed, and can be given back.

    When there is room again the same sessions go on, and who waited through it all gets its lock.
    """
    session, other = open_session(), open_session()
    with open_session() as third:
        kept, given = Mutex(session, "/kept").acquire(), Mutex(session, "/given").acquire()
        slot, reader = Semaphore(session, "/slot", limit=2).acquire(), RWLock(session, "/book").read().acquire()
        leadership = Election(session, "/election").campaign("one")
        of_third = Mutex(third, "/third").acquire()
        got: list[HeldLock] = []

        def come() -> None:
            with contextlib.suppress(LockLost):  # where the test fails
                got.append(Mutex(other, "/kept").acquire())

        waiter = threading.Thread(target=come, daemon=True)
        waiter.start()
        until(lambda: len(keys(session, "/kept")) == 2)

        said = fill(server)
        assert "etcdctl compact" in said
        calls = [counted(monkeypatch, each) for each in (session, third)]
        wanted: list[Callable[[], Any]] = [
            lambda: Mutex(third, "/new").acquire(),
            lambda: Mutex(third, "/new").acquire(timeout=600),
            lambda: Mutex(third, "/new").acquire(blocking=False),
            lambda: RWLock(third, "/book").read().acquire(),
            lambda: Semaphore(third, "/slot", limit=2).acquire(),
            lambda: Election(third, "/election").campaign("two", timeout=600),
            lambda: leadership.proclaim("one, still"),
        ]
        for want in wanted:
            before = sum(map(len, calls))
            with pytest.raises(NoSpace) as refused:
                want()
            assert isinstance(refused.value, EtcdUnavailable), "a task's on_unavailable applies"
            assert str(refused.value) == said
            assert sum(map(len, calls)) == before + 1, "and nobody tries again"
        assert len(third.contenders) == 1, "the one it holds"
        with pytest.raises(NoSpace):
            Session.open(server.url, transport=transport)

        # Given back, each kind of it; and with a session, all of it.
        assert [each.release() for each in (given, slot, reader, leadership)] == ["released"] * 4
        third.close()
        assert not any(keys(session, name) for name in ("/given", "/slot", "/book", "/election", "/third"))
        assert not of_third.is_held()
        assert not session.contenders.unfinished

        # Longer than the TTL, while the lease is renewed.
        bill = Bill(server)
        until(lambda: bill.so_far()["LeaseKeepAlive"] >= 2 * 4)
        assert kept.is_held()
        assert not got

    make_room(server, said)
    with Mutex(other, "/new").acquire() as new:
        assert new.fencing_token > kept.fencing_token
    assert kept.release() == "released"
    until(lambda: got)
    waiter.join(20)
    assert got[0].fencing_token > new.fencing_token
    assert got[0].is_held()
    assert got[0].release() == "released"
    for each in (session, other):
        assert not each.lost
        assert not each.contenders.unfinished
        assert keys(each, "/kept") == []
