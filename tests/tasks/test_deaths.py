"""Children that die while they hold a lock: their locks are free at once, not after the TTL, which is 30 s here."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

import psutil
import pytest

from celery_etcd_lock.testing import EtcdServer
from tests.holding import AT_ONCE, hold, runs_of, under
from tests.servers import RedisServer
from tests.workers import Project, project, until

NewProject = Callable[..., Project]


@pytest.fixture(scope="module")
def working(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with one prefork worker of two children, for all tests of this module that need no other."""
    with project(redis.url, etcd.url, tmp_path_factory.mktemp("deaths"), etcd_lock_ttl=30) as opened:
        opened.worker("-P", "prefork", "-c", "2")
        yield opened


def follow(opened: Project, key: str, since: float, *, task: str = "waiting") -> float:
    """Seconds after `since` (of `time.monotonic`) until another has run under the lock `key`."""
    opened.send(task, 1, 0.01, key).get(timeout=60)
    return max(run.started for run in runs_of(opened, key)) - since


class TestOneChild:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT], ids=["as-the-OOM-killer", "abort"])
    def test_killed_from_outside(self, working: Project, number: signal.Signals) -> None:
        """SIGKILL (the OOM killer sends it too), or a crash: a waiter comes in, its token is higher, it is logged."""
        key = f"killed{number}"
        first, _ = hold(working, key)
        waiter = working.send("waiting", 1, 0.01, key)
        until(lambda: len(under(working, f"locks/waiting/key={key}/")) == 2, "the waiter's key")
        os.kill(first.pid, number)
        killed = time.monotonic()
        assert waiter.get(timeout=60) == 1
        second = runs_of(working, key)[1]
        assert second.started - killed < AT_ONCE
        assert second.token > first.token
        said = f"etcd_lock.orphans_freed: process {first.pid} has died; 1 of its sessions"
        until(lambda: said in working.workers[0].output, "the word of it")

    @pytest.mark.parametrize("how", ["0", "3", "segfault"])
    def test_ended_by_its_own_body(self, working: Project, how: str) -> None:
        """``os._exit`` or a segmentation fault, four times: also of children that were made just before."""
        key = f"own{how}"
        for number in range(4):
            working.send("dying", number, how, key)
        until(lambda: len(runs_of(working, key)) == 4, "all four")
        starts = [run.started for run in runs_of(working, key)]
        assert max(later - earlier for earlier, later in itertools.pairwise(starts)) < AT_ONCE
        until(lambda: not under(working, f"locks/dying/key={key}/"), "the end of the last", seconds=AT_ONCE)

    def test_over_its_hard_time_limit(self, working: Project) -> None:
        """The pool's SIGTERM gives it a tenth of a second, then comes SIGKILL; the lock is free at once."""
        for task in ("waiting", "stubborn"):
            key = f"limit-{task}"
            first, _ = hold(working, key, task=task, time_limit=1)
            assert follow(working, key, first.started + 1, task=task) < AT_ONCE

    @pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
    def test_revoked_with_terminate(self, working: Project, number: str) -> None:
        """``revoke(terminate=True)``, with the signal that the child handles and with the one it cannot."""
        key = f"revoked{number}"
        _, result = hold(working, key)
        result.revoke(terminate=True, signal=number)
        assert follow(working, key, time.monotonic()) < AT_ONCE


class TestNotOthers:
    def test_the_sessions_of_the_living_stay(self, working: Project) -> None:
        """One of two children that hold a lock is killed: the other's session and lock are untouched."""
        dies, _ = hold(working, "dies")
        lives, result = hold(working, "lives")
        os.kill(dies.pid, signal.SIGKILL)
        until(lambda: not under(working, "locks/waiting/key=dies/"), "its end")
        (held,) = under(working, "locks/waiting/key=lives/")
        assert held.lease
        assert any(session.lease == held.lease for session in under(working, "sessions/"))
        assert runs_of(working, "lives")[0].ended == float("inf")
        result.revoke(terminate=True, signal="SIGKILL")
        until(lambda: not under(working, "locks/waiting/key=lives/"), "its end")
        assert lives.pid != dies.pid

    def test_a_stopped_child_is_not_dead(self, working: Project) -> None:
        """SIGSTOP is no death: its lock stays until its lease ends, or it goes on."""
        first, _ = hold(working, "stopped")
        os.kill(first.pid, signal.SIGSTOP)
        until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED, "the stop")
        key = "stopped-not"
        hold(working, key)
        os.kill(runs_of(working, key)[0].pid, signal.SIGKILL)
        until(lambda: not under(working, f"locks/waiting/key={key}/"), "another's end, seen by a later look")
        assert under(working, "locks/waiting/key=stopped/"), "still there"
        os.kill(first.pid, signal.SIGKILL)
        until(lambda: not under(working, "locks/waiting/key=stopped/"), "its end")


class TestInOtherWorkers:
    @pytest.mark.skipif(
        tuple(map(int, version("celery").split(".")[:2])) < (5, 7), reason="Celery 5.7 brought worker_pool_start_method"
    )
    def test_spawned_children(self, new_project: NewProject) -> None:
        """``worker_pool_start_method="spawn"``: they lock, exclude, are renewed; killed or shut down, all is free."""
        project = new_project(etcd_lock_ttl=5, worker_pool_start_method="spawn")
        worker = project.worker("-P", "prefork", "-c", "2")
        dies, _ = hold(project, "spawned")
        (session,) = under(project, "sessions/")
        waiter = project.send("waiting", 1, 6, "spawned")
        until(lambda: len(under(project, "locks/")) == 2, "the waiter")
        assert len({key.rpartition("/")[0] for key in (kv.key for kv in under(project, "sessions/"))}) == 1
        os.kill(dies.pid, signal.SIGKILL)
        until(lambda: session.key not in {kv.key for kv in under(project, "sessions/")}, "its end")
        until(lambda: f"orphans_freed: process {dies.pid} " in worker.output, "the word of it")
        assert waiter.get(timeout=60) == 1, "longer than the TTL: it was renewed"
        assert worker.stop() == 0
        assert not under(project, "locks/")
        assert not under(project, "sessions/")

    def test_grpc(self, new_project: NewProject) -> None:
        """Over gRPC too, and the main process stays free to fork: children made after a death lock as before."""
        pytest.importorskip("grpc")
        project = new_project(etcd_lock_ttl=30, etcd_lock_transport="grpc")
        worker = project.worker("-P", "prefork", "-c", "1")
        for number in range(3):
            project.send("dying", number, "3", "k1")
        until(lambda: len(runs_of(project, "k1")) == 3, "the last", seconds=3 * AT_ONCE)
        until(lambda: not under(project, "locks/"), "its end", seconds=AT_ONCE)
        until(lambda: worker.output.count("etcd_lock.orphans_freed") == 3, "the word of each")
        assert project.send("waiting", 1, 0.01, "k1").get(timeout=60) == 1
        assert "ConfigError" not in worker.output

    def test_with_etcd_away_meanwhile(self, new_project: NewProject) -> None:
        """A child that dies while etcd does not answer: its locks are free when etcd is back."""
        with EtcdServer() as own:
            project = new_project(own.url, etcd_lock_ttl=30, etcd_lock_timeout=1)
            worker = project.worker("-P", "prefork", "-c", "1")
            first, _ = hold(project, "k1")
            own.stop()
            os.kill(first.pid, signal.SIGKILL)
            until(lambda: "etcd_lock.errand_waits" in worker.output, "the word that it waits")
            own.start()
            until(lambda: not under(project, "locks/"), "its end", seconds=AT_ONCE)
            assert worker.process.poll() is None

    def test_the_main_process_killed(self, new_project: NewProject) -> None:
        """Nobody is left who saw its children die: their locks are free when the TTL, 3 s here, is over."""
        project = new_project(etcd_lock_ttl=3)
        worker = project.worker("-P", "prefork", "-c", "1")
        first, _ = hold(project, "k1")
        os.kill(worker.process.pid, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(first.pid), "the end of its child: the kernel sees to that")
        until(lambda: not under(project, "locks/"), "its end", seconds=30)
