"""Children that die while they hold a lock: their locks are free at once, not after the TTL, which is 30 s here."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import KeyValue, Range, prefix_end
from celery_etcd_lock.testing import EtcdServer
from tests.servers import RedisServer
from tests.workers import Project, Run, project, until

NewProject = Callable[..., Project]

AT_ONCE = 12
"""Seconds: nominally 3, and several times that on a machine that is busy; far below the TTL of 30."""


@pytest.fixture(scope="module")
def working(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with one prefork worker of two children, for all tests of this module that need no other."""
    with project(redis.url, etcd.url, tmp_path_factory.mktemp("deaths"), etcd_lock_ttl=30) as opened:
        opened.worker("-P", "prefork", "-c", "2")
        yield opened


def under(opened: Project, prefix: str) -> tuple[KeyValue, ...]:
    """The keys that the project has in etcd under `prefix`."""
    transport = connect(opened.etcd_url)
    try:
        whole = f"/{opened.queue}/{prefix}"
        return transport.range(Range(whole, prefix_end(whole))).kvs
    finally:
        transport.close()


def runs_of(opened: Project, key: str) -> list[Run]:
    return [run for run in opened.runs() if f"/key={key}/" in run.key]


def hold(opened: Project, key: str, *, task: str = "waiting", **options: Any) -> tuple[Run, Any]:
    """Have a body run for ten minutes under the lock `key`: its run, and its result."""
    result = opened.app.send_task(task, (0, 600.0, key), **options)
    (run,) = until(lambda: runs_of(opened, key), "the start")
    return run, result


def follow(opened: Project, key: str, since: float) -> float:
    """Seconds after `since` (of `time.monotonic`) until another has run under the lock `key`."""
    opened.send("waiting", 1, 0.01, key).get(timeout=60)
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
        """The pool kills it; the lock is free at once."""
        first, _ = hold(working, "limit", time_limit=1)
        assert follow(working, "limit", first.started + 1) < AT_ONCE

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
