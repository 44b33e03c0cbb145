"""Leading goes on while a tick takes its time; a beat that is ended hands over at once, wherever in a tick it is."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from celery.schedules import schedule

from celery_etcd_lock.signals import LeaderElectedRecord, LeaderLostRecord, TickSentRecord
from tests.beat.beats import Beats
from tests.beat.bench import Bench
from tests.workers import until

NewBeats = Callable[..., Beats]
NewBench = Callable[..., Bench]
TTL = 3


class Slow(schedule):
    """An interval whose `is_due` blocks for longer than the lease lasts, once, when it is due."""

    blocked = False

    def is_due(self, last_run_at: datetime) -> Any:
        state = super().is_due(last_run_at)
        if state.is_due and not Slow.blocked:
            Slow.blocked = True
            time.sleep(1.5 * TTL)
        return state


def test_neither_a_tick_that_blocks_nor_a_quiet_schedule_costs_leadership(
    new_bench: NewBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each for longer than the lease: the one that stands by is not elected, and nothing is sent twice."""
    monkeypatch.setattr(Slow, "blocked", False)
    schedules = {"slow": {"task": "plain", "schedule": Slow(1.0 + TTL)}}
    bench = new_bench(schedules, etcd_lock_beat_ttl=TTL, etcd_lock_timeout=1)
    beat, other = bench.leading(), bench.scheduler()
    other.tick()
    bench.ticked(beat)
    assert Slow.blocked
    assert beat.schedule["slow"].total_run_count == 1
    assert not other.schedule
    assert len(bench.signals(LeaderElectedRecord)) == 1
    assert not bench.signals(LeaderLostRecord)


def test_closing_hands_over_at_once_and_may_be_done_twice(new_bench: NewBench) -> None:
    """As Celery does on SIGTERM. Of the entry that is due between the two nothing is missed, nothing sent twice."""
    bench = new_bench({"entry": {"task": "plain", "schedule": 1.0}})
    first, second = bench.leading(), bench.scheduler()
    second.tick()
    bench.ticked(first)
    first.close()
    first.close()
    began = time.monotonic()
    bench.ticked(second)
    assert time.monotonic() - began < 15, "the lease is of 30 s"
    told = bench.signals(TickSentRecord)
    assert [each.again for each in told] == [False, False]
    assert told[1].due - told[0].due >= timedelta(seconds=1)
    assert not bench.signals(LeaderLostRecord), "stepping down is no loss"


@pytest.mark.parametrize("at", ["before publish", "after publish"])
def test_sigterm_in_the_middle_of_a_tick(new_beats: NewBeats, at: str) -> None:
    """It waits until what is being published is published and written down; then the next leads at once."""
    beats = new_beats(etcd_lock_beat_ttl=30)
    beats.strike(at, signal.SIGTERM, "second")
    beats.worker("-P", "solo")
    first = beats.beat()
    assert first.process.wait(60) == 0
    (sent,) = beats.received("second") or until(lambda: beats.received("second"), "its tick")
    record = next(json.loads(kv.value) for kv in beats.keys("entry/") if kv.key.endswith("/second"))
    assert (record["state"], record["task_id"], record["total_run_count"]) == ("sent", sent.id, 1)
    assert not beats.keys("leader/")
    beats.beat().says("etcd_lock.leader_elected", seconds=15)
    until(lambda: len(beats.received("second")) >= 2, "the next tick", seconds=15)
    assert len({each.id for each in beats.received("second")}) == len(beats.received("second"))
    assert "Traceback" not in first.output
