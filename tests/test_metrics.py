"""Metrics without a worker: what is counted as held and as waiting, what is refused, and the alerts."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from celery_etcd_lock.metrics import ended
from celery_etcd_lock.metrics.ended import add_up, registry_of
from celery_etcd_lock.metrics.processes import remove_dead
from celery_etcd_lock.metrics.tally import Tally
from celery_etcd_lock.signals import AcquiredRecord, ContendedRecord, LostRecord, Outcome, ReleasedRecord
from tests.clock import Clock
from tests.prometheus import PrometheusNotFound, do_without, find_prometheus

ROOT = Path(__file__).parent.parent


def acquired(task_id: str, task: str = "t") -> AcquiredRecord:
    return AcquiredRecord(task, task_id, f"/l/{task}", "exclusive", 1, 0, 0.0)


def contended(task_id: str, outcome: Outcome, *, waited: float = 0.0, pause: float = 0.0) -> ContendedRecord:
    return ContendedRecord("t", task_id, "/l/t", "holder", "", outcome, 0, waited, pause)


class TestTally:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def tally(self, clock: Clock) -> Tally:
        return Tally(clock)

    def test_held_until_released_or_lost(self, tally: Tally, clock: Clock) -> None:
        """Each by itself, and each task by itself; the oldest is the one that has begun first."""
        tally.acquired(acquired("one"))
        clock.now += 5
        tally.acquired(acquired("two"))
        tally.acquired(acquired("other", "u"))
        clock.now += 1
        assert (tally.held("t"), tally.oldest_hold("t")) == (2, 6)
        tally.given_up(ReleasedRecord("t", "one", "/l/t", 6.0, answered=True))
        assert (tally.held("t"), tally.oldest_hold("t")) == (1, 1)
        tally.given_up(LostRecord("t", "two", "/l/t", "gone", 1.0, "abort"))
        assert (tally.held("t"), tally.oldest_hold("t")) == (0, 0)
        assert tally.held("u") == 1

    def test_who_is_put_back_waits_until_its_pause_is_over(self, tally: Tally, clock: Clock) -> None:
        """Then whoever gets the message next counts it: here, or another process."""
        tally.contended(contended("one", "retry", waited=100, pause=10))
        tally.run_ended("t", "one")
        clock.now += 9
        assert (tally.waiting("t"), tally.oldest_wait("t")) == (1, 109)
        clock.now += 1
        assert (tally.waiting("t"), tally.oldest_wait("t")) == (0, 0)
        tally.contended(contended("one", "retry", waited=110, pause=10))
        tally.acquired(acquired("one"))
        assert tally.waiting("t") == 0

    def test_a_later_pause_counts(self, tally: Tally, clock: Clock) -> None:
        """Put back again before the end of its pause, as another copy of the message may be."""
        tally.contended(contended("one", "retry", pause=10))
        clock.now += 5
        tally.contended(contended("one", "retry", waited=5, pause=10))
        clock.now += 6
        assert (tally.waiting("t"), tally.oldest_wait("t")) == (1, 11)

    @pytest.mark.parametrize("end", ["acquired", "skip", "fail", "run ended"])
    def test_who_waits_in_its_slot(self, tally: Tally, clock: Clock, end: str) -> None:
        """Until it has the lock, or something else becomes of it."""
        tally.contended(contended("one", "wait", waited=3, pause=10))
        clock.now += 7
        assert (tally.waiting("t"), tally.oldest_wait("t")) == (1, 10)
        if end == "acquired":
            tally.acquired(acquired("one"))
        elif end == "run ended":
            tally.run_ended("t", "one")
        else:
            tally.contended(contended("one", "skip" if end == "skip" else "fail"))
        assert (tally.waiting("t"), tally.oldest_wait("t")) == (0, 0)

    def test_nothing_piles_up_where_nobody_asks(self, tally: Tally, clock: Clock) -> None:
        """A hundred thousand messages put back, and never a scrape."""
        for number in range(100_000):
            tally.contended(contended(str(number), "retry", pause=10))
            clock.now += 1
        assert len(tally._ends) == tally.waiting("t") + 1 == 10


def test_gauges_of_the_dead_are_removed(tmp_path: Path) -> None:
    """Not those of the living, and nothing that is counted for good."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    code = "import os, sys; os.kill(os.getpid(), 9)"
    zombie = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ)
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
    alive = {f"gauge_livesum_{os.getpid()}.db", "gauge_livemax_1.db", f"counter_{ended.pid}.db", "gauge_livemax_x.db"}
    dead = {f"gauge_livesum_{ended.pid}.db", f"gauge_livemin_{ended.pid}.db", f"gauge_livemax_{zombie}.db"}
    for name in alive | dead:
        (tmp_path / name).touch()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
        remove_dead(tmp_path)
    os.waitpid(zombie, 0)
    assert {path.name for path in tmp_path.iterdir()} == alive


def said(code: str, **environment: str) -> str:
    """What a process says at its end that runs `code`."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=env, cwd=ROOT)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1] if lines else ""


class TestConnect:
    def test_again_is_nothing_but_for_another_registry(self) -> None:
        """Signals are of the whole process: there is one registry for them."""
        code = """
from prometheus_client import CollectorRegistry
from celery_etcd_lock import metrics, signals
registry = CollectorRegistry()
try:
    metrics.registry()
except metrics.ConfigError as error:
    assert "before celery_etcd_lock.metrics.connect()" in str(error)
metrics.connect(registry); metrics.connect(registry)
assert metrics.registry() is registry
record = signals.LostRecord("t", "1", "/l/t", "gone", 1.0, "abort")
signals.lock_lost.send(None, record=record)
assert registry.get_sample_value("celery_etcd_lock_lost_total", {"task": "t"}) == 1
metrics.connect()
"""
        assert said(code).startswith("celery_etcd_lock.exceptions.ConfigError: celery_etcd_lock.metrics.connect() was")

    def test_without_prometheus_client(self) -> None:
        """It says what to install."""
        code = """
import sys
import threading
sys.modules["prometheus_client"] = None  # as if it were not installed
from celery_etcd_lock import metrics
metrics.connect()
"""
        assert said(code).endswith("which is not installed: pip install celery-etcd-lock[prometheus]")

    def test_without_the_folder(self, tmp_path: Path) -> None:
        """Each value would fail, where nobody sees it."""
        code = "from celery_etcd_lock import metrics; metrics.connect()"
        missing = str(tmp_path / "missing")
        assert f"PROMETHEUS_MULTIPROC_DIR is {missing!r}" in said(code, PROMETHEUS_MULTIPROC_DIR=missing)
        assert said(code, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)) == ""


def test_alerts() -> None:
    """They can be read, and go off when they should: see alerts_test.yml."""
    try:
        promtool = find_prometheus("promtool")
    except PrometheusNotFound as missing:
        do_without(missing)
    for arguments in (["check", "rules", "docs/alerts.yml"], ["test", "rules", "tests/alerts_test.yml"]):
        done = subprocess.run([promtool, *arguments], check=False, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_child_that_is_forked_while_somebody_reads_keeps_no_lock(tmp_path: Path) -> None:
    """A worker's main process serves scrapes and forks children: those that end must not wait for those that came."""
    registry_of(tmp_path)
    stay, leave = os.pipe()
    with ended._locked(tmp_path, fcntl.LOCK_SH):
        child = os.fork()
        if not child:
            os.close(leave)
            os.read(stay, 1)
            os._exit(0)
    adding = threading.Thread(target=add_up, args=(tmp_path, 1), daemon=True)
    adding.start()
    adding.join(20)
    blocked = adding.is_alive()
    os.close(leave)
    os.waitpid(child, 0)
    os.close(stay)
    assert not blocked
