"""A slot that is sent again, because whoever sent it could not write that down: what the worker makes of the copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from celery_etcd_lock import SingletonTask
from celery_etcd_lock.testing import EtcdServer
from tests.beat.beats import Beats
from tests.beat.bench import Bench
from tests.servers import RedisServer
from tests.tasks.test_requests import requests
from tests.workers import collect_garbage, until

SINGLETONS = ("alone", "late", "queued")
ENTRIES = (*SINGLETONS, "received")
"""Each of a task of that name, of `beating`."""


def _queued(self: Any, entry: str) -> None:
    """As `beating` has it: that one is queued is asked for where it is published."""


@pytest.fixture
def own() -> Iterator[EtcdServer]:
    """An etcd whose requests nobody else makes."""
    with EtcdServer() as server:
        yield server


@pytest.fixture
def beats(redis: RedisServer, own: EtcdServer, tmp_path: Path) -> Iterator[Beats]:
    """For its worker; the beats are those of `bench`."""
    with Beats(redis.url, own.url, tmp_path, {"etcd_lock_ttl": 120}) as made:
        yield made


@pytest.fixture
def bench(redis: RedisServer, own: EtcdServer, beats: Beats) -> Iterator[Bench]:
    schedule = {name: {"task": name, "schedule": timedelta(days=1), "args": (name,)} for name in ENTRIES}
    with closing(Bench(redis.url, own.url, schedule, {"etcd_lock_beat_ttl": 120}, name=beats.queue)) as made:
        task: Any = made.app.task
        task(_queued, name="queued", base=SingletonTask, bind=True, unique_queued="until_end", shared=False)
        yield made
    collect_garbage()


def ago(**past: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(**past)).replace(microsecond=0).isoformat()


def sends_again(bench: Bench, slot: str, due: str) -> None:
    """A new leader, which finds all entries as one has left them that died before it could write *sent*."""
    for name in ENTRIES:
        bench.write(
            name, state="sending", due=due, task_id=f"{name}-{slot}", last_run_at=ago(days=2), total_run_count=3
        )
    beat = bench.leading()
    bench.tick(beat, lambda: all(bench.record(name)["state"] == "sent" for name in ENTRIES))
    beat.close()


def test_a_singleton_runs_once_and_a_plain_task_as_often_as_it_is_sent(
    bench: Bench, beats: Beats, own: EtcdServer
) -> None:
    """Whether the copies wait in the queue together, or one comes when the other has finished.

    The mark that one is queued keeps nobody from sending it again under the same id: it may never have been sent.
    """
    due = ago(minutes=2)
    sends_again(bench, "one", due)
    sends_again(bench, "one", due)
    assert Counter(each.id for each in bench.sent()) == {f"{name}-one": 2 for name in ENTRIES}
    worker = beats.worker("-P", "solo")
    until(lambda: len(beats.received("received")) == 2 and not bench.sent(), "both")
    sends_again(bench, "one", due)
    until(lambda: len(beats.received("received")) == 3 and not bench.sent(), "a third")
    until(lambda: worker.output.count("etcd_lock.copy_dropped") == 2 * len(SINGLETONS), "that the copies are dropped")
    sends_again(bench, "two", ago(minutes=1))
    until(lambda: len(beats.received("received")) == 4 and not bench.sent(), "the next slot")
    worker.stop()
    counted = Counter(each.id for each in beats.received())
    assert counted == {
        **{f"{name}-{slot}": 1 for name in SINGLETONS for slot in ("one", "two")}, "received-one": 3, "received-two": 1,
    }  # fmt: skip


def test_what_it_costs_a_run_that_there_may_be_copies(bench: Bench, beats: Beats, own: EtcdServer) -> None:
    """Two requests more than a run that was sent by `delay`: what has become of the id, and that it is done."""
    bench.app.conf.beat_schedule = {
        f"alone-{number}": {"task": "alone", "schedule": timedelta(days=1), "args": (f"alone-{number}",)}
        for number in range(10)
    }
    for name in bench.app.conf.beat_schedule:
        bench.write(name, last_run_at=ago(days=2), total_run_count=0)
    bench.ticked(bench.scheduler(), 10)
    bench.close()
    before = requests(own)
    worker = beats.worker("-P", "solo")
    until(lambda: len(beats.received()) == 10, "all")
    worker.stop()
    spent = requests(own) - before
    assert spent["Txn"] == 1 + 3 * 10, "and one for the session"
    assert spent["Range"] == 10
    assert set(spent) <= {"Txn", "Range", "LeaseGrant", "LeaseKeepAlive", "LeaseRevoke"}
