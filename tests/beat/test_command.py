"""``celery beat`` and ``celery worker -B`` as they are called: settings, banner, log, the end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from celery_etcd_lock.beat import EtcdScheduler
from tests.beat.beats import Beats
from tests.beat.bench import Bench
from tests.servers import free_port
from tests.workers import until

NewBeats = Callable[..., Beats]
NewBench = Callable[..., Bench]


def run(beats: Beats, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "celery", "-A", "beating", *arguments]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, env=beats.environment, cwd=beats.folder
    )


@pytest.mark.parametrize(
    "command",
    [("beat", "-S", "etcd_lock"), ("worker", "-P", "solo", "-B", "--scheduler", "etcd_lock")],
    ids=["beat", "-B"],
)
def test_running_without_etcd_is_nothing_that_beat_can_do(new_beats: NewBeats, command: tuple[str, ...]) -> None:
    """One clean line, and the end, for a beat of its own and for one in a worker."""
    ended = run(new_beats(etcd_lock_on_unavailable="run"), *command)
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if line.startswith("Error")]
    assert len(said) == 1
    assert said[0].startswith('Error: etcd_lock_on_unavailable is "run", which beat cannot do')
    assert "Traceback" not in ended.stderr


def test_a_worker_without_a_beat_of_ours_may_run_without_etcd(new_beats: NewBeats) -> None:
    beats = new_beats(etcd_lock_on_unavailable="run")
    beats.worker("-P", "solo", "-B")  # with Celery's own


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"etcd_lock_beat_schedular": "x"}, "did you mean etcd_lock_beat_scheduler?"),
        ({"etcd_lock_beat_scheduler": "nowhere:Scheduler"}, "is 'nowhere:Scheduler', which cannot be imported"),
        ({"etcd_lock_beat_scheduler": "celery.beat:Nobody"}, "is 'celery.beat:Nobody', which cannot be imported"),
        ({"etcd_lock_beat_scheduler": "etcd_lock"}, "names the scheduler that wraps others"),
        ({"etcd_lock_beat_scheduler": "celery:Celery"}, "write a subclass of celery.beat.Scheduler"),
        ({"beat_scheduler": "celery.beat:Nobody"}, "beat_scheduler is 'celery.beat:Nobody'"),
        ({"etcd_lock_beat_ttl": 3, "etcd_lock_timeout": 5}, "etcd_lock_beat_ttl is 3: write 15 or more"),
        ({"etcd_lock_beat_name": "a/b"}, "etcd_lock_beat_name is 'a/b'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant(new_bench: NewBench, settings: dict[str, Any], says: str) -> None:
    bench = new_bench({}, **settings)
    with pytest.raises(click.ClickException) as raised:
        EtcdScheduler(app=bench.app, lazy=True)
    assert says in raised.value.message


@pytest.mark.parametrize(
    "named", ["etcd_lock", "celery_etcd_lock.beat:EtcdScheduler", "celery_etcd_lock.beat.EtcdScheduler"]
)
def test_it_may_be_what_beat_scheduler_names(new_bench: NewBench, named: str) -> None:
    bench = new_bench({}, beat_scheduler=named)
    service = bench.app.Beat().Service(bench.app, scheduler_cls=bench.app.conf.beat_scheduler)
    scheduler = service.get_scheduler(lazy=True)
    assert type(scheduler) is EtcdScheduler
    assert scheduler._wrapped.__name__ == "PersistentScheduler"


def test_the_banner_says_who_leads(new_bench: NewBench) -> None:
    bench = new_bench({"soon": {"task": "plain", "schedule": 0.3}})
    assert "no leader yet" in EtcdScheduler(app=bench.app, lazy=True).info
    beat = bench.leading()
    leader = beat._candidate._session
    assert leader is not None
    assert f"leader {leader.host}:{leader.pid}" in EtcdScheduler(app=bench.app, lazy=True).info


def test_the_banner_waits_for_no_etcd(new_bench: NewBench) -> None:
    bench = new_bench({}, etcd_url=f"http://127.0.0.1:{free_port()}")
    assert "etcd does not answer" in EtcdScheduler(app=bench.app, lazy=True).info


@pytest.mark.parametrize("enabled", [False, "observe"])
def test_switched_off_a_beat_is_as_without_it(
    new_bench: NewBench, caplog: pytest.LogCaptureFixture, tmp_path: Path, enabled: object
) -> None:
    """It asks no etcd, sends what is due, and says that nothing keeps it from what others do."""
    bench = new_bench(
        {"soon": {"task": "plain", "schedule": 0.3}}, etcd_url="http://127.0.0.1:1", etcd_lock_enabled=enabled,
        etcd_lock_on_unavailable="run",
    )  # fmt: skip
    beat = bench.scheduler(schedule_filename=str(tmp_path / "schedule"))
    (sent,) = bench.ticked(beat)
    assert not sent.due
    assert "etcd_lock.beat_alone" in caplog.text


def test_two_projects_in_one_election_are_told(new_beats: NewBeats, new_bench: NewBench) -> None:
    bench = new_bench({"soon": {"task": "plain", "schedule": 0.3}})
    beats = new_beats()
    bench.app.conf.etcd_lock_namespace = beats.queue
    bench.leading()
    beats.beat().says("etcd_lock.another_project")


def test_workers_with_a_beat_each(new_beats: NewBeats) -> None:
    """``worker -B``: one of the beats leads, and one that is stopped with its worker hands over at once."""
    beats = new_beats(etcd_lock_beat_ttl=30)
    workers = [
        beats.worker("-P", "prefork", "-c", "1", "-B", "--scheduler", "etcd_lock", "-n", f"w{number}@x")
        for number in (1, 2)
    ]
    until(lambda: len(beats.received("second")) >= 2, "the first ticks")
    until(lambda: len(beats.keys("leader/")) == 2, "two candidates")
    leader = next(each for each in workers if "etcd_lock.leader_elected" in each.output)
    leader.stop()
    there = len(beats.received("second"))
    until(lambda: len(beats.received("second")) >= there + 3, "the ticks of the other", seconds=20)
    ids = [each.id for each in beats.received()]
    assert len(set(ids)) == len(ids)


def test_a_stop_hands_over_at_once(new_beats: NewBeats) -> None:
    """With a lease of 30 seconds, and wherever in a tick the signal strikes."""
    beats = new_beats(etcd_lock_beat_ttl=30)
    worker = beats.worker()
    first = beats.beat()
    leader = beats.await_leader()
    assert leader is first
    first.says("etcd_lock.leader_elected")
    second = beats.beat()
    second.says("etcd_lock.standby")
    until(lambda: beats.received("second"), "a tick")
    assert first.stop() == 0
    beats.await_leader(other_than=first, seconds=10)
    second.says("etcd_lock.leader_elected", seconds=10)
    assert "Traceback" not in first.output + second.output + worker.output
