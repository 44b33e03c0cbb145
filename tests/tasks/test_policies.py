"""What becomes of the messages that find the lock held: real prefork workers with four children, a TTL of 3 s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from celery_etcd_lock import LockContended
from tests.workers import Project, Run, overlaps, until

NewProject = Callable[..., Project]


LOCKED = pytest.mark.parametrize("locked", [True, False], ids=["locked", "control"])
"""With the lock, and with one that does nothing: a scenario that sees no overlap must see them there."""


@pytest.fixture
def running(new_project: NewProject) -> Project:
    return worker_with(new_project, locked=True)


def worker_with(new_project: NewProject, *, locked: bool) -> Project:
    made = new_project(etcd_lock_ttl=3, etcd_lock_enabled=locked)
    made.worker()
    return made


@LOCKED
def test_forty_retrying_all_run_one_at_a_time(new_project: NewProject, locked: bool) -> None:
    """40 messages of one key, sent at once: each runs once, none beside another, and each `get` returns."""
    running = worker_with(new_project, locked=locked)
    seconds = 0.02 if locked else 0.3  # where nobody waits, long enough for others to come in between
    results = [running.send("retrying", number, seconds) for number in range(40)]
    assert [result.get(timeout=120) for result in results] == list(range(40))
    runs = running.runs("retrying")
    assert sorted(run.number for run in runs) == list(range(40))
    assert {run.how for run in runs} == {"returned"}
    assert (overlaps(runs) == []) is locked
    if locked:
        tokens = [run.token for run in runs]
        assert tokens == sorted(set(tokens)), "tokens grow from holder to holder"


def test_other_keys_run_beside(running: Project) -> None:
    """The lock is of the key: calls with different ones do overlap."""
    for result in [running.send("retrying", number, 1.0, key=f"k{number}") for number in range(4)]:
        result.get(timeout=60)
    assert len(overlaps(running.runs())) > 0


@LOCKED
def test_forty_skipping_all_end(new_project: NewProject, locked: bool) -> None:
    """With `skip` the body runs at least once, never beside itself, and the others succeed with the skip's result."""
    running = worker_with(new_project, locked=locked)
    results = [running.send("skipping", number, 0.3) for number in range(40)]
    values = [result.get(timeout=120) for result in results]
    runs = running.runs("skipping")
    assert (overlaps(runs) == []) is locked
    assert (1 <= len(runs) < 40) is locked
    assert sorted(run.number for run in runs) == sorted(value for value in values if value != "skipped")
    assert values.count("skipped") == 40 - len(runs)
    assert {result.state for result in results} == {"SUCCESS"}
    until(lambda: running.workers[0].output.count("is skipped: ") == 40 - len(runs), "the log of each skip")


def test_losers_of_fail_say_who_holds_it_and_since_when(running: Project) -> None:
    """With `fail` the losers are FAILURE with a LockContended that names key, holder and since when."""
    holder = running.send("failing", 0, 3.0)
    until(lambda: running.runs("failing"), "the holder's start")
    loser = running.send("failing", 1)
    with pytest.raises(LockContended) as refused:
        loser.get(timeout=60)
    assert loser.state == "FAILURE"
    assert refused.value.key == f"/{running.queue}/locks/failing/-"
    assert f"failing[{holder.id}]" in refused.value.holder
    assert f"pid {running.runs()[0].pid}" in refused.value.holder
    assert refused.value.since.startswith("20")
    assert holder.get(timeout=60) == 0
    assert len(running.runs("failing")) == 1
    assert "Traceback" not in running.workers[0].output, "an expected failure"


@LOCKED
def test_waiting_runs_in_the_order_of_queueing(new_project: NewProject, locked: bool) -> None:
    """With `wait` the runs come one at a time, in the order in which their contenders were created."""
    running = worker_with(new_project, locked=locked)
    began = running.etcd_revision()
    results = [running.send("waiting", number, 0.2) for number in range(12)]
    for result in results:
        result.get(timeout=120)
    runs = running.runs("waiting")
    assert len(runs) == 12
    assert (overlaps(runs) == []) is locked
    if locked:
        positions = queued_at(running, runs, began)
        assert positions == sorted(positions)


def queued_at(project_: Project, runs: list[Run], since: int) -> list[int]:
    """The create revision of the contender of each run, in the order of the runs, from etcd's own history."""
    from celery_etcd_lock.etcd import connect
    from celery_etcd_lock.etcd.api import Watch, prefix_end
    from celery_etcd_lock.locks.queue import describe

    prefix = f"/{project_.queue}/locks/waiting/"
    transport = connect(project_.etcd_url)
    stream = transport.watch(Watch(prefix, prefix_end(prefix), start_revision=since + 1))
    created: dict[str, int] = {}
    deleted = 0
    for reply in stream:
        for event in reply.events:
            if event.kind == "put":
                created[describe(event.kv).task_id] = event.kv.create_revision
            else:
                deleted += 1
        if deleted >= len(runs):
            break
    stream.close()
    transport.close()
    return [created[run.id] for run in runs]


def test_retries_show_the_holder_and_do_not_use_up_the_authors(running: Project) -> None:
    """A waiting message is RETRY with LockContended as its info, keeps its id, and gives up after `max_wait`."""
    holder = running.send("giving_up", 0, 4.0)
    until(lambda: running.runs("giving_up"), "the holder's start")
    loser = running.send("giving_up", 1)
    until(lambda: loser.state == "RETRY", "the first wait")
    info: Any = loser.info
    assert isinstance(info, LockContended)
    assert holder.id in info.holder
    with pytest.raises(LockContended):
        loser.get(timeout=60)
    assert holder.get(timeout=60) == 0


def test_asking_for_the_lock_before_it_is_taken_changes_nothing(running: Project) -> None:
    """`self.lock` in `before_start` is not held, and the body runs under the real one all the same."""
    first = running.send("curious", 0, 2.0)
    until(lambda: running.runs("curious"), "the first start")
    with pytest.raises(LockContended):
        running.send("curious", 1).get(timeout=60)
    assert first.get(timeout=60) == 0
    (run,) = running.runs("curious")
    assert run.token > 0


def test_the_authors_own_retry_starts_without_our_counts(running: Project) -> None:
    """What a message waited for the lock is forgotten once it had it: `max_wait` counts from the next contention."""
    first = running.send("sends_itself", 0)
    until(lambda: running.runs("sends_itself"), "the first start")
    second = running.send("sends_itself", 1)
    until(lambda: second.state == "RETRY", "the second's wait")
    for result in (first, second):
        result.get(timeout=60)
    runs = running.runs("sends_itself")
    assert [run.how for run in runs].count("Retry") == 2
    assert [run.how for run in runs].count("returned") == 2
    assert overlaps(runs) == []


def test_the_decorator_locks_as_the_base_does(running: Project) -> None:
    """`@singleton_task` on a real worker: excluded, with a lock of its own to ask."""
    first = running.send("decorated", 0, seconds=2.0)
    until(lambda: running.runs("decorated"), "the first start")
    second = running.send("decorated", 1)
    assert second.get(timeout=60) is None
    assert first.get(timeout=60) == 0
    assert len(running.runs("decorated")) == 1
