"""A worker that is told to end in the middle of a body: warm, soft, cold, and in a hurry. The TTL is 30 s here."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from importlib.metadata import version

import pytest

from tests.holding import AT_ONCE, hold, runs_of, under
from tests.workers import Project, Run, Worker, until

NewProject = Callable[..., Project]

PREFORK, SOLO, THREADS = ["-P", "prefork", "-c", "2"], ["-P", "solo"], ["-P", "threads", "-c", "2"]
POOLS = pytest.mark.parametrize("pool", [PREFORK, SOLO, THREADS], ids=["prefork", "solo", "threads"])
MAIN_THREAD = pytest.mark.parametrize("pool", [PREFORK, SOLO], ids=["prefork", "solo"])
SOFT = 1.0
"""Seconds of ``worker_soft_shutdown_timeout``."""


def answer(worker: Worker, number: signal.Signals) -> None:
    """Send the signal, and wait until the worker has said that it heard it, or is gone."""
    heard = worker.output.count("worker: ")
    worker.process.send_signal(number)

    def answered() -> bool:
        return worker.output.count("worker: ") > heard or worker.process.poll() is not None

    until(answered, "an answer")


def end(
    project: Project, pool: list[str], *signals: signal.Signals, task: str = "waiting", seconds: float = 600
) -> tuple[Run, float]:
    """Start a worker and a body, and send the worker `signals`. The run, and the seconds from the last to freedom."""
    worker = project.worker(*pool)
    hold(project, "k1", task=task, seconds=seconds)
    for number in signals:
        heard = worker.output.count("worker: ")
        worker.process.send_signal(number)
        until(
            lambda heard=heard: worker.output.count("worker: ") > heard or worker.process.poll() is not None, "a word"
        )
    sent = time.monotonic()
    until(lambda: not under(project, "locks/"), "the lock's end")
    freed = time.monotonic() - sent
    until(lambda: not under(project, "sessions/"), "the session's end", seconds=AT_ONCE)
    worker.process.wait(60)
    (run,) = runs_of(project, "k1")
    return run, freed


@POOLS
def test_warm(new_project: NewProject, pool: list[str]) -> None:
    """SIGTERM: the body finishes under its lock; then the lock is free and the lease revoked, at once."""
    run, freed = end(new_project(etcd_lock_ttl=30), pool, signal.SIGTERM, seconds=3)
    assert run.how == "returned"
    assert freed < 3 + AT_ONCE


@MAIN_THREAD
def test_cold(new_project: NewProject, pool: list[str]) -> None:
    """SIGQUIT: the body is ended, the lock is free and the lease revoked, at once."""
    run, freed = end(new_project(etcd_lock_ttl=30), pool, signal.SIGQUIT)
    assert run.how in {"SystemExit", "NotImplementedError"}, "under solo that is how Celery ends it"
    assert freed < AT_ONCE


@pytest.mark.skipif(tuple(map(int, version("celery").split(".")[:2])) < (5, 5), reason="Celery 5.5 brought it")
@MAIN_THREAD
def test_soft(new_project: NewProject, pool: list[str]) -> None:
    """SIGQUIT with ``worker_soft_shutdown_timeout``: the same, when that is over."""
    project = new_project(etcd_lock_ttl=30, worker_soft_shutdown_timeout=SOFT)
    run, freed = end(project, pool, signal.SIGQUIT)
    assert run.how in {"SystemExit", "NotImplementedError"}
    assert freed < SOFT + AT_ONCE


def test_cold_in_threads(new_project: NewProject) -> None:
    """Celery cannot end a thread: the body finishes, under its lock, and then all is given back."""
    run, freed = end(new_project(etcd_lock_ttl=30), THREADS, signal.SIGQUIT, seconds=3)
    assert run.how == "returned"
    assert freed < 3 + AT_ONCE


@pytest.mark.parametrize(
    ("pool", "task"), [(PREFORK, "waiting"), (PREFORK, "stubborn"), (THREADS, "waiting")],
    ids=["prefork", "prefork-stubborn", "threads"],
)  # fmt: skip
def test_in_a_hurry(new_project: NewProject, pool: list[str], task: str) -> None:
    """SIGQUIT until the worker gives up waiting, even for a body that does not let itself be ended: free at once."""
    _, freed = end(new_project(etcd_lock_ttl=30), pool, *[signal.SIGQUIT] * 3, task=task)
    assert freed < AT_ONCE
