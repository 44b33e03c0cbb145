"""Tasks that share a lock, and tasks with a limit: real prefork workers with four children, a TTL of 3 s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from celery_etcd_lock import LockContended
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.locks import Session
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.queue import SHARED
from tests.workers import Project, Run, overlaps, until

NewProject = Callable[..., Project]


@pytest.fixture
def running(new_project: NewProject) -> Project:
    made = new_project(etcd_lock_ttl=3)
    made.worker()
    return made


def most_at_once(runs: list[Run]) -> int:
    return max(sum(other.started <= run.started < other.ended for other in runs) for run in runs)


@pytest.mark.parametrize("suffix", ["", "_in_turn"], ids=["retry", "wait"])
def test_readers_overlap_and_a_writer_does_not(running: Project, suffix: str) -> None:
    """Readers and writers of one lock, sent mixed: all run, readers beside each other, a writer beside nobody."""
    tasks = ["reading", "reading", "reading", "writing"] * 5
    results = [running.send(task + suffix, number, 0.15) for number, task in enumerate(tasks)]
    assert [result.get(timeout=120) for result in results] == list(range(20))
    readers, writers = (running.runs(task + suffix) for task in ("reading", "writing"))
    assert (len(readers), len(writers)) == (15, 5)
    assert len(overlaps(readers)) > 0
    pairs = overlaps(sorted(readers + writers, key=lambda run: run.started))
    assert [pair for pair in pairs if not {run.number % 4 for run in pair} <= {0, 1, 2}] == []
    assert {run.key.split("/")[-2] for run in readers} == {"read"}
    assert {run.key.split("/")[-2] for run in writers} == {"write"}


@pytest.mark.parametrize("task", ["limited", "limited_in_turn"])
@pytest.mark.parametrize("locked", [True, False], ids=["locked", "control"])
def test_at_most_so_many_at_once(new_project: NewProject, task: str, locked: bool) -> None:
    """With a limit of 2 two run at once and never three, on four children; without the lock there are more."""
    running = new_project(etcd_lock_ttl=3, etcd_lock_enabled=locked)
    running.worker()
    results = [running.send(task, number, 0.2) for number in range(12)]
    assert [result.get(timeout=120) for result in results] == list(range(12))
    assert (most_at_once(running.runs(task)) <= 2) is locked


def test_the_third_of_two_says_who_is_in(running: Project) -> None:
    """With `fail`, who finds all slots taken fails with one of the holders' names; another key has slots of its own."""
    holders = [running.send("limited_fails", number, 4.0) for number in range(2)]
    until(lambda: len(running.runs()) == 2, "the start of both")
    refused = running.send("limited_fails", 2)
    with pytest.raises(LockContended) as contended:
        refused.get(timeout=60)
    assert any(holder.id in contended.value.holder for holder in holders)
    assert running.send("limited_fails", 3, 0.1, key="other").get(timeout=60) == 3
    assert [holder.get(timeout=60) for holder in holders] == [0, 1]


@pytest.mark.parametrize("task", ["reading", "limited"])
def test_a_second_copy_of_a_message_does_not_share(running: Project, task: str) -> None:
    """What would be let in beside another run is not let in beside a run of its own task id: it comes again later."""
    first: Any = running.app.send_task(task, (0, 1.5), task_id=f"twin-{running.queue}")
    until(running.runs, "the first start")
    running.app.send_task(task, (1, 0.1), task_id=first.id)
    until(lambda: len([run for run in running.runs() if run.ended < float("inf")]) == 2, "the end of both")
    assert overlaps(running.runs()) == []


def test_a_reader_is_kept_out_by_a_run_of_the_same_task_id(etcd: Any, prefix: str) -> None:
    """The same by the lock itself: refused with the twin's id, though any other reader goes in, and gone again."""
    transport = connect(etcd.url)
    with Session(transport, ttl=5) as session:
        name = prefix + "a"
        held = acquire(session, name, SHARED, describe={"task": "t", "task_id": "1"})
        beside = acquire(session, name, SHARED, blocking=False, describe={"task": "t", "task_id": "2"})
        with pytest.raises(LockContended) as refused:
            acquire(session, name, SHARED, blocking=False, describe={"task": "t", "task_id": "1"})
        assert refused.value.task_id == "1"
        assert beside.release() == "released"
        assert held.release() == "released"
        acquire(session, name, blocking=False).release()
    transport.close()
