"""On RabbitMQ: where acknowledgement, redelivery and priorities are otherwise than in Redis. Results are in Redis."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from celery_etcd_lock import LockContended
from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.testing import EtcdServer
from tests.rabbit import RabbitServer
from tests.servers import RedisServer
from tests.workers import Project, overlaps, project, until

NewProject = Callable[..., Project]

TOP = 10
"""The highest priority of the queues."""

UNACKNOWLEDGED = 3.0
"""Seconds after which the impatient server takes a message back."""


@pytest.fixture(scope="module")
def running(
    rabbit: RabbitServer, redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    """A prefork worker with four children, and a queue with priorities."""
    folder = tmp_path_factory.mktemp("rabbit")
    settings = {"etcd_lock_ttl": 3, "task_queue_max_priority": TOP}
    with project(rabbit.url, etcd.url, folder, backend_url=redis.url, **settings) as made:
        made.app.conf.task_queue_max_priority = TOP
        made.worker()
        yield made


@contextmanager
def holding(project: Project, lock: str) -> Iterator[None]:
    """Hold a task's lock, as another process."""
    with (
        Session.open(project.etcd_url, namespace=f"{project.queue}-other") as session,
        Mutex(session, f"/{project.queue}/locks/{lock}").acquire(timeout=30),
    ):
        yield


def test_every_policy_ends_and_excludes(running: Project) -> None:
    """45 messages that retry, wait and skip, three keys: each `get` returns, no body runs beside another of its key."""
    tasks = ("retrying", "waiting", "skipping")
    results = [running.send(tasks[number % 3], number, 0.02) for number in range(45)]
    values = [result.get(timeout=120) for result in results]
    for remainder, task in enumerate(tasks):
        runs = running.runs(task)
        assert overlaps(runs) == []
        tokens = [run.token for run in runs]
        assert tokens == sorted(set(tokens))
        skipped = values[remainder::3].count("skipped")
        assert len(runs) + skipped == 15
        assert task == "skipping" or not skipped


def test_without_the_lock_they_overlap(new_project: NewProject, rabbit: RabbitServer) -> None:
    """The control: a load like that, and a lock that does nothing."""
    made = new_project(broker=rabbit.url, etcd_lock_enabled=False)
    made.worker()
    for result in [made.send("retrying", number, 0.5) for number in range(8)]:
        result.get(timeout=120)
    assert overlaps(made.runs()) != []


def test_a_loser_fails_with_the_holders_name(running: Project) -> None:
    """LockContended is the result, and it is not delivered again."""
    with holding(running, "failing/-"), pytest.raises(LockContended):
        running.send("failing", 0).get(timeout=60)
    assert running.runs("failing") == []


def test_a_killed_workers_message_runs_once_more_and_alone(new_project: NewProject, rabbit: RabbitServer) -> None:
    """`acks_late`, kill -9: RabbitMQ delivers at once, the copy waits out the dead one's lease, and runs once."""
    made = new_project(broker=rabbit.url, etcd_lock_ttl=3)
    victim = made.worker("-P", "prefork", "-c", "1")
    result = made.send("late", 0, 3.0)
    until(made.runs, "the start")
    beside = [made.send("late", number, 0.02) for number in (1, 2)]
    victim.kill()
    killed = time.monotonic()
    heir = made.worker("-P", "prefork", "-c", "2")
    assert result.get(timeout=90) == 0
    assert [each.get(timeout=90) for each in beside] == [1, 2]
    first, *others = made.runs()
    assert (first.number, first.how) == (0, "killed")
    assert sorted(run.number for run in others) == [0, 1, 2]
    assert all(run.started > killed for run in others)
    assert overlaps(others) == []
    assert min(run.token for run in others) > first.token
    assert "etcd_lock.lost" not in heir.output


def test_a_put_back_message_keeps_its_priority(running: Project) -> None:
    """It has waited for the lock, and is delivered with the priority that it was sent with."""
    with holding(running, "tells/all"):
        result = running.app.send_task("tells", priority=7)
        until(lambda: result.state == "RETRY", "its return to the queue")
    assert result.get(timeout=60)["priority"] == 7


def test_a_put_back_message_overtakes_those_of_lower_priority(new_project: NewProject, rabbit: RabbitServer) -> None:
    """An urgent one that is put back while others queue runs before them."""
    made = new_project(broker=rabbit.url, etcd_lock_ttl=3, task_queue_max_priority=TOP)
    made.app.conf.task_queue_max_priority = TOP
    made.worker("-P", "solo")
    urgent = None
    with holding(made, "retrying/-"):
        urgent = made.app.send_task("retrying", (100,), priority=9)
        until(lambda: urgent.state == "RETRY", "its return to the queue")
        plain = [
            made.app.send_task("retrying", (number, 0.5), {"key": f"k{number}"}, priority=1) for number in range(8)
        ]
    for result in (urgent, *plain):
        result.get(timeout=60)
    order = [run.number for run in made.runs()]
    assert order.index(100) < 7, order


def test_a_message_that_is_rejected_into_its_queue_comes_again(running: Project) -> None:
    """`Reject(requeue=True)` in the body: the lock is given back, the same message is delivered again and runs."""
    assert running.send("rejecting", 0).get(timeout=60) == 0
    assert [run.how for run in running.runs("rejecting")] == ["Reject", "returned"]
    assert overlaps(running.runs("rejecting")) == []
    until(lambda: not running.keys("locks/rejecting/"), "its release")


def test_a_message_that_waits_out_its_countdown_outlives_its_worker(
    new_project: NewProject, rabbit: RabbitServer
) -> None:
    """It is not run before its time, and RabbitMQ gives it to another worker at once when the first is killed."""
    made = new_project(broker=rabbit.url, etcd_lock_ttl=3)
    victim = made.worker("-P", "solo")
    with holding(made, "later/all"):
        result = made.send("later", 0)
        until(lambda: result.state == "RETRY", "its return to the queue")
        put_back = time.monotonic()
        until(lambda: victim.output.count(f"later[{result.id}] received") == 2, "its second delivery")
    victim.kill()
    made.worker("-P", "solo")
    assert result.get(timeout=60) == 0
    (run,) = made.runs()
    assert run.started - put_back > 2.0, "its countdown of 3 s was kept"


@pytest.fixture
def impatient() -> Iterator[RabbitServer]:
    """A server whose ``consumer_timeout`` is some seconds, and not RabbitMQ's half an hour."""
    parameters = {"consumer_timeout": round(UNACKNOWLEDGED * 1000), "channel_tick_interval": 500}
    with RabbitServer(parameters=parameters) as server:
        yield server


def test_a_copy_made_by_the_consumer_timeout_does_not_run_beside(
    new_project: NewProject, rabbit: RabbitServer, impatient: RabbitServer
) -> None:
    """`acks_late` and a body longer than ``consumer_timeout``: RabbitMQ delivers it again, and the copy waits."""
    made = new_project(broker=impatient.url, etcd_lock_ttl=3)
    first = made.worker("-P", "prefork", "-c", "2")
    second = made.worker("-P", "prefork", "-c", "2")
    result = made.send("late", 0, 4 * UNACKNOWLEDGED)
    until(made.runs, "the start")

    def received() -> int:
        return sum(worker.output.count(f"late[{result.id}] received") for worker in (first, second))

    until(lambda: received() >= 2, "the second delivery")
    assert len(made.runs()) == 1
    until(lambda: made.runs()[0].how == "returned", "the end")
    assert overlaps(made.runs()) == []
