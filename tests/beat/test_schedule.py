"""What goes on from one beat to the next: last runs, counts, phases; entries that come and go; the schedule file."""

from __future__ import annotations

import json
import os
import shelve
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery.beat import BeatLazyFunc, ScheduleEntry, Scheduler
from celery.schedules import crontab

from celery_etcd_lock.etcd.api import Range
from celery_etcd_lock.signals import TickSentRecord
from tests.beat.bench import Bench

NewBench = Callable[..., Bench]
SOON: dict[str, Any] = {"task": "plain", "schedule": 0.3}
DAILY: dict[str, Any] = {"task": "plain", "schedule": timedelta(days=1)}


def now() -> datetime:
    return datetime.now(timezone.utc)


def entry_of(bench: Bench, beat: Any, name: str) -> Any:
    return beat.schedule[name]


def test_a_restart_goes_on_where_the_beat_before_stopped(new_bench: NewBench) -> None:
    """No tick at once, the counts go on, and the daily entry keeps its time of day."""
    bench = new_bench({"two": {"task": "plain", "schedule": 2.0}, "daily": DAILY})
    beat = bench.leading()
    daily = bench.record("daily")
    bench.ticked(beat, entry="two")
    beat.close()
    again = bench.leading()
    assert bench.record("daily") == daily
    assert again.schedule["daily"].last_run_at == datetime.fromisoformat(daily["last_run_at"])
    assert len(bench.sent()) == 1
    bench.ticked(again, entry="two")
    first, second = (each.due for each in bench.signals(TickSentRecord))
    assert second - first >= timedelta(seconds=1.9)
    assert bench.record("two")["total_run_count"] == 2


@pytest.mark.parametrize(
    ("entry", "missed"),
    [
        ({"task": "plain", "schedule": 10.0}, timedelta(hours=2)),
        ({"task": "plain", "schedule": crontab(minute="*/5")}, timedelta(hours=2)),
        (DAILY, timedelta(days=3)),
    ],
    ids=["interval", "crontab", "daily"],
)
def test_what_was_missed_while_all_were_down_is_sent_once(
    new_bench: NewBench, entry: dict[str, Any], missed: timedelta
) -> None:
    bench = new_bench({"entry": entry, "soon": SOON})
    last = now() - missed
    bench.write(
        "entry", state="sent", due=last.isoformat(), task_id="x", last_run_at=last.isoformat(), total_run_count=4
    )
    beat = bench.leading()
    bench.ticked(beat, 3, "soon")
    (sent,) = bench.sent("entry")
    every = timedelta(minutes=5) if isinstance(entry["schedule"], crontab) else timedelta(seconds=10)
    every = entry["schedule"] if isinstance(entry["schedule"], timedelta) else every
    assert every > now() - datetime.fromisoformat(sent.due) - timedelta(seconds=30) > timedelta(seconds=-30), (
        "the latest"
    )
    assert bench.record("entry")["total_run_count"] == 5


def test_a_deadline_holds_after_a_takeover(new_bench: NewBench) -> None:
    """Celery's own rule: a crontab that was missed by more than this is not made up for."""
    bench = new_bench(
        {"entry": {"task": "plain", "schedule": crontab(minute="0", hour=str((now().hour - 3) % 24))}, "soon": SOON},
        beat_cron_starting_deadline=60,
    )
    last = (now() - timedelta(hours=5)).isoformat()
    bench.write("entry", state="sending", due=last, task_id="x", last_run_at=last, total_run_count=4)
    bench.ticked(bench.leading(), 2, "soon")
    assert not bench.sent("entry")


def test_a_clock_that_was_wrong_is_reported_and_not_waited_for(
    new_bench: NewBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench = new_bench({"soon": SOON, "near": SOON})
    far, near = (now() + timedelta(hours=1)).isoformat(), (now() + timedelta(seconds=20)).isoformat()
    bench.write("soon", state="sent", due=far, task_id="x", last_run_at=far, total_run_count=4)
    bench.write("near", state="sent", due=near, task_id="y", last_run_at=near, total_run_count=4)
    bench.ticked(bench.leading(), 2, "soon")
    assert "etcd_lock.clock_skew" in caplog.text
    assert not bench.sent("near"), "some seconds are waited for, so that nothing is sent twice"
    assert bench.record("soon")["total_run_count"] == 6


def test_entries_come_and_go(new_bench: NewBench) -> None:
    """A new entry has a record from when it is first seen; that of one that is no more is dropped by the next beat."""
    bench = new_bench({"daily": DAILY, "gone": SOON})
    beat = bench.leading()
    assert bench.records().keys() == {"daily", "gone"}
    beat.schedule["added/ä %"] = ScheduleEntry(name="added/ä %", app=bench.app, **SOON)
    bench.ticked(beat, entry="added/ä %")
    del beat.schedule["gone"]
    there = len(bench.sent("gone"))
    bench.ticked(beat, 2, "added/ä %")
    assert len(bench.sent("gone")) <= there + 1
    beat.close()
    bench.app.conf.beat_schedule = {"daily": DAILY}
    bench.leading()
    assert bench.records().keys() == {"daily"}


def test_an_entry_that_is_changed_keeps_its_last_run(new_bench: NewBench) -> None:
    bench = new_bench({"entry": DAILY})
    beat = bench.leading()
    last = bench.record("entry")["last_run_at"]
    beat.close()
    bench.app.conf.beat_schedule = {"entry": SOON}
    beat = bench.leading()
    assert beat.schedule["entry"].last_run_at == datetime.fromisoformat(last)
    bench.ticked(beat)


def test_six_hundred_entries(new_bench: NewBench) -> None:
    """Written down in batches that etcd takes, and read in pages."""
    bench = new_bench({f"entry-{number}": DAILY for number in range(600)})
    bench.leading().close()
    records = bench.records()
    assert len(records) == 600
    bench.leading()
    assert bench.records() == records


def test_arguments_that_are_made_when_the_tick_is_due(new_bench: NewBench) -> None:
    bench = new_bench({"soon": {**SOON, "args": (BeatLazyFunc(os.getpid),)}})
    assert bench.ticked(bench.leading())[0].args == [os.getpid()]


def test_the_schedule_file_is_read_once_and_never_written(new_bench: NewBench, tmp_path: Path) -> None:
    """A daily job keeps the time that it had with Celery's own scheduler; what is in etcd counts from then on."""
    file = tmp_path / "celerybeat-schedule"
    bench = new_bench({"daily": DAILY})
    plain = bench.app.Beat(scheduler_cls="celery.beat:PersistentScheduler").Service(
        bench.app, schedule_filename=str(file)
    )
    last = now() - timedelta(hours=7)
    plain.scheduler.schedule["daily"].last_run_at = last
    plain.scheduler.close()
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    beat = bench.leading(schedule_filename=str(file))
    assert beat.schedule["daily"].last_run_at == last
    assert datetime.fromisoformat(bench.record("daily")["last_run_at"]) == last
    beat.close()
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    with shelve.open(str(file), writeback=True) as stale:
        stale["entries"]["daily"].last_run_at = now() - timedelta(days=9)
    again = bench.leading(schedule_filename=str(file))
    again.tick()
    assert again.schedule["daily"].last_run_at == last
    assert not bench.sent()


class Odd(Scheduler):
    """A scheduler of somebody's own, without a store: entries with a field of its own, made anew each time."""

    class Entry(ScheduleEntry):
        odd = True

    def setup_schedule(self) -> None:
        self.merge_inplace(self.app.conf.beat_schedule)


def test_a_scheduler_of_ones_own(new_bench: NewBench) -> None:
    bench = new_bench({"two": {"task": "plain", "schedule": 2.0}}, etcd_lock_beat_scheduler=Odd)
    beat = bench.leading()
    assert isinstance(beat._inner, Odd)
    bench.ticked(beat)
    beat.close()
    again = bench.leading()
    assert again.schedule["two"].odd
    assert again.schedule["two"].total_run_count == 1


def test_what_is_in_etcd_of_a_beat(new_bench: NewBench) -> None:
    """The layout is public: a rolling deploy mixes versions, and `etcdctl` shows who leads."""
    bench = new_bench({"nightly/ä": DAILY})
    beat = bench.leading()
    session: Any = beat._candidate._session
    (leader,) = session.transport.range(Range(f"/{bench.name}/beat/", f"/{bench.name}/beat/default/m")).kvs[1:]
    assert leader.key == f"/{bench.name}/beat/default/leader/write/{session.lease:x}"
    assert list(json.loads(leader.value)) == ["host", "pid", "since", "nonce", "app"]
    (entry,) = session.transport.range(Range(f"/{bench.name}/beat/default/entry/", f"/{bench.name}/beat/default/f")).kvs
    assert entry.key == f"/{bench.name}/beat/default/entry/nightly%2F%C3%A4"
    assert list(json.loads(entry.value)) == ["last_run_at", "total_run_count"]
    assert entry.lease == 0
