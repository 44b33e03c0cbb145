"""Ten thousand locks: read in pages, as of one moment, and each lease asked for once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from celery_etcd_lock.cli.pages import PAGE, keys_below
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Delete, LeaseKeys, Put, Range, RangeReply, Transport, Txn
from celery_etcd_lock.locks.queue import value_of
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.testing import EtcdServer
from tests.cli.installed import app_with, here

MANY = 10_000
LEASES = 5


class Counting:
    """A transport, and what was asked of it."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.pages: list[int] = []
        self.leases: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def range(self, request: Range, **options: Any) -> RangeReply:
        reply = self._transport.range(request, **options)
        self.pages.append(len(reply.kvs))
        return reply

    def lease_time_to_live(self, lease: int, **options: Any) -> LeaseKeys:
        self.leases.append(lease)
        return self._transport.lease_time_to_live(lease, **options)


@pytest.fixture(scope="module")
def many(etcd: EtcdServer) -> Iterator[str]:
    """The namespace."""
    with closing(connect(etcd.url)) as transport:
        leases = [transport.lease_grant(600).lease for _ in range(LEASES)]
        for first in range(0, MANY, 100):
            transport.txn(Txn([], [put(number, leases[number % LEASES]) for number in range(first, first + 100)]))
        yield "many"
        for lease in leases:
            transport.lease_revoke(lease)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Counting]:
    """The transports of the commands that a test runs."""
    made: list[Counting] = []
    connected = Settings.connect

    def connect_(settings: Settings) -> Any:
        made.append(Counting(connected(settings)))
        return made[-1]

    monkeypatch.setattr(Settings, "connect", connect_)
    return made


def put(number: int, lease: int) -> Put:
    value = value_of(
        host="worker-1", pid=42, since="2026-01-01T00:00:00Z", nonce="0" * 12,
        extra={"task": "shop.sync", "task_id": f"00000000-0000-0000-0000-{number:012}", "retries": 0},
    )  # fmt: skip
    return Put(f"/many/locks/shop.sync/account_id={number}/write/{lease:x}", value, lease)


@pytest.mark.parametrize("as_json", [False, True], ids=["table", "json"])
def test_ls_of_ten_thousand(many: str, etcd: EtcdServer, counted: list[Counting], as_json: bool) -> None:
    """All are listed within seconds; no reply has more than a page, and there are as many requests as pages."""
    began = time.monotonic()
    said = here(app_with(etcd.url, namespace=many), "ls", *["--json"] * as_json)
    assert time.monotonic() - began < 20
    (transport,) = counted
    assert max(transport.pages) <= PAGE
    assert len(transport.pages) == MANY / PAGE
    if as_json:
        assert len(json.loads(said.out)) == MANY
        assert transport.leases == []
    else:
        assert len(said.out.splitlines()) == MANY + 1
        assert len(transport.leases) == LEASES


def test_few_of_many_are_few_requests(many: str, etcd: EtcdServer, counted: list[Counting]) -> None:
    """Who asks for the first ten gets them from the first page."""
    said = here(app_with(etcd.url, namespace=many), "ls", "--limit", "10")
    assert len(said.out.splitlines()) == 11
    assert counted[0].pages == [PAGE]


def test_all_pages_are_of_one_moment(etcd: EtcdServer, prefix: str) -> None:
    """What comes and goes while they are read does not show."""
    with closing(connect(etcd.url)) as transport:
        keys = [f"{prefix}{number:02}" for number in range(30)]
        transport.txn(Txn([], [Put(key, b"") for key in keys]))
        pages = keys_below(transport, prefix, page=10)
        read = [next(pages).key]
        transport.txn(Txn([], [Delete(keys[20]), Put(f"{prefix}15-new", b"")]))
        assert [*read, *(kv.key for kv in pages)] == keys
        now = sorted([*keys[:20], *keys[21:], f"{prefix}15-new"])
        assert [kv.key for kv in keys_below(transport, prefix, page=10)] == now
