"""Losing the lock in the middle of a body: frozen processes, revoked leases, etcd away.

What differs from pool to pool is in `test_pools`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from celery_etcd_lock import LockLost
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Range, prefix_end
from celery_etcd_lock.testing import EtcdServer
from tests.workers import Project, overlaps, until

NewProject = Callable[..., Project]


def test_a_frozen_holder_wakes_up_to_its_loss(new_project: NewProject) -> None:
    """SIGSTOP past the TTL: the next runs, with a higher token; the frozen one ends with LockLost and frees nothing."""
    project = new_project(etcd_lock_ttl=3)
    project.worker("-P", "prefork", "-c", "2")
    frozen = project.send("freezing", 1)
    (first,) = until(lambda: project.runs("freezing"), "the start")
    until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED, "the freeze")
    following = project.send("freezing", 2)
    assert following.get(timeout=60) is None
    second = project.runs("freezing")[1]
    assert second.token > first.token
    holder = project.send("freezing", 3)  # somebody holds or has held the lock while the frozen one wakes
    os.kill(first.pid, signal.SIGCONT)
    woken = time.monotonic()
    with pytest.raises(LockLost):
        frozen.get(timeout=30)
    assert time.monotonic() - woken < 10
    assert holder.get(timeout=60) is None
    first = project.runs("freezing")[0]
    assert first.how == "LockLost"
    assert overlaps(project.runs("freezing")[1:]) == [], "among those who were not frozen"


def test_the_late_release_of_a_frozen_holder_frees_nobody(new_project: NewProject) -> None:
    """While the next one holds the lock, the frozen one wakes, is aborted and releases: the key of the next stays."""
    project = new_project(etcd_lock_ttl=3)
    project.worker("-P", "prefork", "-c", "2")
    frozen = project.send("waiting", 0, 600.0)
    (first,) = until(lambda: project.runs("waiting"), "the start")
    os.kill(first.pid, signal.SIGSTOP)
    following = project.send("waiting", 1, 8.0)
    second = until(lambda: project.runs("waiting")[1:], "the take-over")[0]
    os.kill(first.pid, signal.SIGCONT)
    with pytest.raises(LockLost):
        frozen.get(timeout=30)
    transport = connect(project.etcd_url)
    assert transport.range(Range(second.key)).kvs, "still held"
    assert following.get(timeout=60) == 1
    assert not transport.range(Range(second.key)).kvs
    transport.close()


def test_a_worker_killed_in_mid_task_blocks_for_the_ttl_and_no_longer(new_project: NewProject) -> None:
    """kill -9 of a whole worker: the lock comes free when its lease ends, and the job is taken over by another."""
    project = new_project(etcd_lock_ttl=3)
    victim = project.worker("-P", "prefork", "-c", "1")
    project.send("waiting", 0, 600.0)
    (first,) = until(lambda: project.runs("waiting"), "the start")
    victim.kill()
    killed = time.monotonic()
    project.worker("-P", "prefork", "-c", "1")
    following = project.send("waiting", 1)
    assert following.get(timeout=60) == 1
    second = project.runs("waiting")[1]
    assert second.token > first.token
    assert second.started - killed < 30


def test_lost_locks_can_put_the_task_back_or_only_warn(new_project: NewProject) -> None:
    """`on_lost="retry"` runs the task again; `on_lost="warn"` lets the body finish, and says so in the log."""
    project = new_project(etcd_lock_ttl=3)
    worker = project.worker("-P", "prefork", "-c", "2")
    again = project.send("lost_retries", 0, 6.0)
    until(lambda: project.runs("lost_retries"), "the start")
    project.revoke_the_holders_lease("lost_retries/-")
    assert again.get(timeout=60) == 0
    assert [run.how for run in project.runs("lost_retries")] == ["LockLost", "returned"]
    warned = project.send("lost_warns", 0, 5.0)
    until(lambda: project.runs("lost_warns"), "the start")
    project.revoke_the_holders_lease("lost_warns/-")
    assert warned.get(timeout=60) == 0
    assert "lost_warns[" in worker.output
    assert worker.output.count("etcd_lock.lost") == 2


def test_a_body_that_swallows_its_loss_ends_with_it_all_the_same(new_project: NewProject) -> None:
    """LockLost in the body is an exception like any other; but a result without the lock is not vouched for."""
    project = new_project(etcd_lock_ttl=3)
    project.worker("-P", "prefork", "-c", "1")
    result = project.send("catching", 0)
    until(lambda: project.runs("catching"), "the start")
    project.revoke_the_holders_lease("catching/all")
    with pytest.raises(LockLost):
        result.get(timeout=30)


def test_etcdctl_and_a_task_exclude_each_other(new_project: NewProject, etcd: EtcdServer) -> None:
    """``etcdctl lock <the task's lock name>`` keeps the task out, and is kept out by it."""
    if etcd.etcdctl is None:
        pytest.skip("no etcdctl beside the etcd that is used")
    project = new_project(etcd_lock_ttl=3)
    project.worker("-P", "prefork", "-c", "1")
    name = f"/{project.queue}/locks/waiting/-"
    command = [str(etcd.etcdctl), "--endpoints", etcd.url, "lock", name]
    environment = {**os.environ, "ETCDCTL_API": "3"}
    with subprocess.Popen([*command, "sleep", "600"], env=environment) as shell:
        transport = connect(etcd.url)
        until(lambda: transport.range(Range(name + "/", prefix_end(name + "/"))).kvs, "etcdctl's key")
        result = project.send("waiting", 0, 3.0)
        until(lambda: len(transport.range(Range(name + "/", prefix_end(name + "/"))).kvs) == 2, "the task's key")
        assert project.runs() == []
        for child in psutil.Process(shell.pid).children():
            child.terminate()
    until(project.runs, "the task's start")
    got = subprocess.run([*command, "env"], env=environment, capture_output=True, text=True, check=True).stdout
    (run,) = project.runs()
    assert run.ended < float("inf"), "etcdctl came in only when the body had ended"
    (token,) = [line.partition("=")[2] for line in got.splitlines() if line.startswith("ETCD_LOCK_REV=")]
    assert int(token) > run.token, "their tokens and ours mix"
    assert result.get(timeout=30) == 0
    transport.close()


class TestEtcdAway:
    def test_every_message_ends_and_none_runs_unlocked(self, new_project: NewProject, tmp_path: Path) -> None:
        """etcd stopped and started again under a worker: all end as run, or as a LockLost that aborted the body."""
        with EtcdServer() as own:
            project = new_project(own.url, etcd_lock_ttl=3, etcd_lock_timeout=1)
            worker = project.worker()
            results = [project.send("retrying", number, 0.5) for number in range(20)]
            for _ in range(2):
                until(lambda: len(project.runs()) > 2, "some runs")
                own.stop()
                until(lambda: "etcd_lock.unavailable" in worker.output, "the word that etcd is away")
                time.sleep(4)  # longer than the TTL: that is the outage
                own.start()
            ended: dict[int, Any] = {}
            for number, result in enumerate(results):
                try:
                    ended[number] = result.get(timeout=120)
                except LockLost as lost:
                    ended[number] = lost
            runs = project.runs()
            assert overlaps(runs) == []
            assert all(run.token for run in runs), "none ran unlocked"
            for number, value in ended.items():
                how = [run.how for run in runs if run.number == number]
                assert how == (["LockLost"] if isinstance(value, LockLost) else ["returned"])
            assert worker.process.poll() is None, "the worker lives"

    def test_a_worker_starts_without_etcd_and_says_so_in_three_lines(self, new_project: NewProject) -> None:
        """No etcd there: the worker comes up, the task is put back, three lines say what to do; then it runs."""
        own = EtcdServer()
        with own:
            project = new_project(own.url, etcd_lock_ttl=3, etcd_lock_timeout=1)
            own.stop()
            worker = project.worker("-P", "prefork", "-c", "1")
            results = [project.send("retrying", number) for number in range(3)]
            until(lambda: results[0].state == "RETRY", "the task's return to its queue")
            said = worker.output[worker.output.index("etcd_lock.unavailable") :]
            first, second, third = said.splitlines()[:3]
            assert f"no etcd at {own.url}" in first
            assert "put back and not run" in second
            assert "etcd_lock_endpoints" in third
            until(lambda: all(result.state == "RETRY" for result in results), "the same for all")
            assert worker.output.count("etcd_lock.unavailable") == 1, "once, not once a task"
            assert project.runs() == []
            own.start()
            assert [result.get(timeout=90) for result in results] == [0, 1, 2]
            assert "etcd is back after" in worker.output

    def test_other_wishes_are_obeyed(self, new_project: NewProject) -> None:
        """`on_unavailable="fail"` fails with EtcdUnavailable; `"run"` runs, with a lock that says it is not held."""
        from celery_etcd_lock import EtcdUnavailable

        with EtcdServer() as own:
            project = new_project(own.url, etcd_lock_timeout=1)
            own.stop()
            project.worker("-P", "prefork", "-c", "1")
            with pytest.raises(EtcdUnavailable, match=r"no etcd|refused|answer"):
                project.send("unavailable_fails", 0).get(timeout=60)
            assert project.send("unavailable_runs", 1).get(timeout=60) == 1
            (run,) = project.runs()
            assert run.token == 0
