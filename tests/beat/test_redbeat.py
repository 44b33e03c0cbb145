"""Around RedBeat: the schedule is in Redis, its own lock is not taken."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from celery_etcd_lock.testing import EtcdServer
from tests.beat.beats import Beats
from tests.beat.checker import Disturbance, Rules, check
from tests.servers import RedisServer
from tests.workers import until

TTL = 3


@pytest.fixture
def beats(redis: RedisServer, etcd: EtcdServer, tmp_path: Path) -> Iterator[Beats]:
    with Beats(redis.url, etcd.url, tmp_path, {"etcd_lock_beat_ttl": TTL}, app="redbeat_beating") as beats:
        yield beats


def run(beats: Beats, code: str) -> None:
    given = "from redbeat_beating import app\nfrom redbeat import RedBeatSchedulerEntry as Entry\n"
    subprocess.run([sys.executable, "-c", given + code], check=True, env=beats.environment, timeout=60)


def test_takeovers_around_redbeat(beats: Beats) -> None:
    """Killed, then frozen for longer than the lease: no slot twice, and none missing but while nobody led."""
    beats.worker()
    for _ in range(3):
        beats.beat()
    until(lambda: len(beats.received("second")) >= 3, "the first ticks")
    begin = time.time()
    _, third = beats.take_over_twice(TTL + 15)
    end = time.time()
    assert third.stop() == 0
    beats.await_leader(other_than=third, seconds=10)
    away = [Disturbance("killed or frozen", begin, end)]
    rules = Rules({"second": 1.0, "seven": 7.0, "alone": 1.0}, slack=3.0, once=("alone",))
    report = check(beats.received(), away, rules, begin=begin, end=end)
    assert not report.violations
    assert "Traceback" not in "".join(each.output for each in beats.processes)
    with Redis.from_url(beats.broker_url) as redis:
        assert not redis.exists(f"{beats.queue}::lock"), "its own lock"


def test_entries_that_are_saved_and_deleted_while_beats_run(beats: Beats) -> None:
    beats.worker()
    beats.beat()
    until(lambda: beats.received("second"), "the first tick")
    run(beats, "Entry('new', 'received', 1.0, args=['new'], app=app).save()")
    until(lambda: len(beats.received("new")) >= 2, "the entry that was added")
    run(beats, "Entry.from_key(app.conf.redbeat_key_prefix + 'new', app=app).delete()")
    there = len(beats.received("second"))
    until(lambda: len(beats.received("second")) >= there + 2, "ticks of another")
    gone = len(beats.received("new"))
    until(lambda: len(beats.received("second")) >= there + 4, "more of them")
    assert len(beats.received("new")) == gone, "deleted"
    ids = [each.id for each in beats.received()]
    assert len(set(ids)) == len(ids)
