"""``celery etcd-lock beat``, of keys that were put by hand, as beats put them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone

import pytest

from celery_etcd_lock.beat.record import Record, entry_key, entry_prefix, leader_name
from celery_etcd_lock.beat.slots import Slot
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Put, Txn
from celery_etcd_lock.locks.queue import value_of
from celery_etcd_lock.testing import EtcdServer
from tests.cli.installed import app_with, here

NOW = datetime.now(timezone.utc)


@pytest.fixture(scope="module")
def beats(etcd: EtcdServer) -> Iterator[str]:
    """The namespace: three beats in one election, the first on the highest lease; and one of another name."""
    with closing(connect(etcd.url)) as transport:
        leases = sorted((transport.lease_grant(60).lease for _ in range(3)), reverse=True)
        for number, lease in enumerate(leases):
            value = value_of(host=f"host-{number}", pid=40 + number, since=NOW.isoformat(), nonce="n")
            transport.txn(Txn([], [Put(f"{leader_name('beats', 'default')}/write/{lease:x}", value, lease)]))
        entries = entry_prefix("beats", "default")
        slot = Slot(NOW - timedelta(days=3), "the-task-id")
        sent = Record(NOW - timedelta(days=3), 7, "sent", slot)
        for entry, record in {"daily/report ü": sent, "hourly": Record(NOW - timedelta(hours=1), 0)}.items():
            transport.txn(Txn([], [Put(entry_key(entries, entry), record.to_json())]))
        transport.txn(Txn([], [Put(entry_key(entry_prefix("beats", "eu"), "nightly"), b"no record")]))
        yield "beats"
        for lease in leases:
            transport.lease_revoke(lease)


def test_who_leads_and_what_was_sent(beats: str, etcd: EtcdServer) -> None:
    """The first to come leads, the others stand by in their order; each entry with its last tick, or none."""
    said = here(app_with(etcd.url, namespace=beats), "beat")
    assert said.status == 0
    lines = [line.split() for line in said.out.splitlines()]
    assert [line[:4] for line in lines[2:5]] == [
        ["leads", "host-0", "40", lines[2][3]],
        ["stands", "by", "host-1", "41"],
        ["stands", "by", "host-2", "42"],
    ]
    (sent,) = [line for line in lines if line[:1] == ["daily/report"]]
    assert sent[-3:] == ["sent", "7", "the-task-id"]
    assert sent[2].startswith("3d")
    (never,) = [line for line in lines if line[:1] == ["hourly"]]
    assert never[2:] == ["-", "-", "0", "-"]
    assert "no beat of this name runs: nothing is sent" in said.out, "of the other name"


def test_as_json(beats: str, etcd: EtcdServer) -> None:
    (group,) = json.loads(here(app_with(etcd.url, namespace=beats), "beat", "default", "--json").out)
    assert (group["name"], group["leader"]["host"]) == ("default", "host-0")
    assert [each["host"] for each in group["standbys"]] == ["host-1", "host-2"]
    assert 0 < group["leader"]["ttl"] <= 60
    assert group["entries"]["daily/report ü"]["state"] == "sent"


def test_of_a_name_that_there_is_not(beats: str, etcd: EtcdServer) -> None:
    said = here(app_with(etcd.url, namespace=beats), "beat", "defualt")
    assert (said.status, said.out) == (1, "")
    assert "there are default, eu" in said.err
