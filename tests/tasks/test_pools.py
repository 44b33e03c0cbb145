"""Every pool that a worker can run its tasks in: exclusion, renewal, loss, and shutdown, in real workers.

The same tests for each; a class a pool, so that several of them can be tested at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import ClassVar, cast

import pytest

from celery_etcd_lock import LockLost
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Delete
from celery_etcd_lock.locks import HeldLock, Mutex, Session
from celery_etcd_lock.testing import EtcdServer
from tests.servers import RedisServer
from tests.workers import Project, Run, overlaps, project, until

NewProject = Callable[..., Project]

TTL = 2
"""Seconds: the shortest that etcd grants."""

SOON = 5.0
"""Seconds. A session finds out at its next renewal, within a third of the TTL: several times that."""


@pytest.fixture(scope="class")
def running(
    request: pytest.FixtureRequest, redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    """One worker of the pool that the class is of, with a TTL that tests can outlast."""
    with project(redis.url, etcd.url, tmp_path_factory.mktemp("pool"), etcd_lock_ttl=TTL) as made:
        made.worker(*request.cls.pool)
        yield made


class EveryPool:
    """What is so in each; `pool`, the arguments of the worker, makes it one."""

    pool: ClassVar[tuple[str, ...]]
    workers: ClassVar[int] = 1
    """How many it takes for two bodies to run at the same time."""
    messages: ClassVar[int] = 40
    """The load."""
    ends_sleep: ClassVar[bool] = True
    """Whether a body can be ended inside a call that blocks."""

    def check_processes(self, made: Project) -> None:
        """Whether it was the pool that it was to be: overridden where that shows."""

    def test_under_load_one_runs_at_a_time_and_a_stopped_worker_leaves_nothing(self, new_project: NewProject) -> None:
        """Messages of two tasks, one at a time of each. SIGTERM lets a body finish, and all leases are taken back."""
        made = new_project(etcd_lock_ttl=60)
        for _ in range(self.workers):
            made.worker(*self.pool)
        results = [made.send(("retrying", "waiting")[number % 2], number, 0.02) for number in range(self.messages)]
        assert sorted(result.get(timeout=120) for result in results) == list(range(self.messages))
        for task in ("retrying", "waiting"):
            runs = made.runs(task)
            assert len(runs) == self.messages // 2
            assert overlaps(runs) == []
            tokens = [run.token for run in runs]
            assert tokens == sorted(set(tokens)), "tokens grow from holder to holder"
        self.check_processes(made)
        last = made.send("retrying", -1, 2.0)
        began(made, "retrying", -1)
        assert made.keys("locks/"), "held"
        for worker in made.workers:
            worker.process.send_signal(signal.SIGTERM)
        assert [worker.process.wait(60) for worker in made.workers] == [0] * self.workers
        assert made.keys("locks/") == made.keys("sessions/") == [], "at once, and not after the TTL"
        assert last.get(timeout=30) == -1
        assert not any("Traceback" in worker.output for worker in made.workers)

    def test_without_the_lock_they_overlap(self, new_project: NewProject) -> None:
        """The control: a load like that, and a lock that does nothing."""
        made = new_project(etcd_lock_enabled=False)
        for _ in range(self.workers):
            made.worker(*self.pool)
        for result in [made.send("retrying", number, 0.5) for number in range(8)]:
            result.get(timeout=120)
        assert overlaps(made.runs()) != []

    def test_a_body_longer_than_the_ttl_keeps_its_lock(self, running: Project) -> None:
        """The lease is renewed while the body sleeps: the next one comes in when it has ended, and not before."""
        result = running.send("waiting", 0, 2.5 * TTL)
        began(running, "waiting", 0)
        comes_in_after(running, "waiting", 0)
        assert result.get(timeout=30) == 0

    def test_a_lost_lock_ends_the_body(self, running: Project) -> None:
        """The lease is revoked: the body ends with LockLost, soon where it can be ended in its sleep."""
        result = running.send("waiting", 1, 600.0 if self.ends_sleep else 6.0)
        began(running, "waiting", 1)
        running.revoke_the_holders_lease("waiting/-")
        revoked = time.monotonic()
        with pytest.raises(LockLost, match="expired or was revoked"):
            result.get(timeout=60)
        run = ended(running, "waiting", 1)
        assert run.how == "LockLost"
        if self.ends_sleep:
            assert run.ended - revoked < SOON
        assert "etcd_lock.lost" in running.workers[0].output
        assert running.send("waiting", 2).get(timeout=60) == 2, "the same worker, a new session"


class WithoutYielding(EveryPool):
    """And what becomes of a body that never gives way."""

    computing_renews: ClassVar[bool] = True
    """Whether the lease is renewed beside Python code."""

    def test_python_code_that_never_yields(self, running: Project) -> None:
        """Computing for longer than the TTL: renewed where threads are real, and told of its loss under gevent."""
        result = running.send("computing", 0, 3.0 * TTL)
        if self.computing_renews:
            began(running, "computing", 0)
            comes_in_after(running, "computing", 0)
            assert result.get(timeout=30) == 0
        else:
            comes_in_meanwhile(running, "computing", 0)

    def test_a_call_that_keeps_the_gil_is_no_success(self, running: Project) -> None:
        """C code keeps the GIL past the TTL: the next one comes in, and what it returns then ends as LockLost."""
        running.send("holding", 0, 3 * TTL, 0.0)
        comes_in_meanwhile(running, "holding", 0)

    def test_what_follows_such_a_call_is_ended(self, running: Project) -> None:
        """A body that would go on for ten minutes gets LockLost as soon as it is back in Python."""
        result = running.send("holding", 1, 2 * TTL, 600.0)
        with pytest.raises(LockLost):
            result.get(timeout=60)
        run = ended(running, "holding", 1)
        assert run.how == "LockLost"
        assert run.ended - run.started < 2 * TTL + SOON


class TestPrefork(WithoutYielding):
    pool = ("-P", "prefork", "-c", "4")

    def check_processes(self, made: Project) -> None:
        assert len({run.pid for run in made.runs()}) > 1


class TestThreads(WithoutYielding):
    pool = ("-P", "threads", "-c", "8")
    ends_sleep = False


class TestSolo(WithoutYielding):
    pool = ("-P", "solo")
    workers = 2


class TestGevent(WithoutYielding):
    pool = ("-P", "gevent", "-c", "8")
    computing_renews = False

    def test_only_the_one_that_lost_is_ended(self, running: Project) -> None:
        """One thread runs all bodies: others go on beside one that loses its lock, and one that waits blocks nobody."""
        others = [running.send("retrying", number, 4.0, key=f"other{number}") for number in range(3)]
        holder = running.send("waiting", 10, 600.0)
        began(running, "waiting", 10)
        following = running.send("waiting", 11)
        (mine, *_) = running.keys("locks/waiting/-/")
        with closing(connect(running.etcd_url)) as transport:
            transport.delete(Delete(mine.key))
        with pytest.raises(LockLost, match="was deleted"):
            holder.get(timeout=60)
        assert [other.get(timeout=60) for other in others] == [0, 1, 2]
        assert following.get(timeout=60) == 11
        assert ended(running, "waiting", 10).how == "LockLost"


class TestAutoscale(EveryPool):
    pool = ("-P", "prefork", "--autoscale", "4,1")

    def check_processes(self, made: Project) -> None:
        assert len({run.pid for run in made.runs()}) > 1, "children were forked when there was work"


class TestMaxTasksPerChild(EveryPool):
    messages = 16  # a child is forked for each, and each time that one is put back
    pool = ("-P", "prefork", "-c", "2", "--max-tasks-per-child", "1")

    def check_processes(self, made: Project) -> None:
        runs = made.runs()
        assert len({run.pid for run in runs}) == len(runs)
        until(lambda: len(made.keys("sessions/")) <= 2, "the end of the sessions of children that have ended")


class TestAutoscaleAndMaxTasks(TestMaxTasksPerChild):
    pool = ("-P", "prefork", "--autoscale", "4,1", "--max-tasks-per-child", "1")

    def check_processes(self, made: Project) -> None:
        runs = made.runs()
        assert len({run.pid for run in runs}) == len(runs)
        until(lambda: len(made.keys("sessions/")) <= 4, "the end of the sessions of children that have ended")


def began(project: Project, task: str, number: int) -> Run:
    """The run of `number`, once it has begun."""
    runs = until(lambda: [run for run in project.runs(task) if run.number == number], f"the start of {task} {number}")
    return cast("Run", runs[-1])


def ended(project: Project, task: str, number: int) -> Run:
    """The run of `number`, once it has ended."""
    until(lambda: began(project, task, number).ended < float("inf"), f"the end of {task} {number}")
    return began(project, task, number)


@contextmanager
def in_turn(project: Project, task: str) -> Iterator[HeldLock]:
    """The lock of `task`, waited for and held by this process."""
    with Session.open(project.etcd_url, namespace=f"{project.queue}-next") as session:
        yield Mutex(session, f"/{project.queue}/locks/{task}/-").acquire(timeout=60)


def comes_in_after(project: Project, task: str, number: int) -> None:
    with in_turn(project, task) as held:
        came, run = time.monotonic(), began(project, task, number)
        assert run.how == "returned"
        assert run.ended < came
        assert run.token < held.fencing_token


def comes_in_meanwhile(project: Project, task: str, number: int) -> None:
    began(project, task, number)
    with in_turn(project, task) as held:
        came, run = time.monotonic(), ended(project, task, number)
        assert came < run.ended
        assert run.token < held.fencing_token
        with pytest.raises(LockLost):
            project.app.AsyncResult(run.id).get(timeout=30)
        assert held.key in {kv.key for kv in project.keys("locks/")}, "its late release has freed nobody"
