"""A worker that is told to end in the middle of a body: warm, soft, cold, and in a hurry. The TTL is 30 s here."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version

import pytest

from tests.holding import AT_ONCE, hold, runs_of, under
from tests.workers import Project, Run, Worker, until

NewProject = Callable[..., Project]

PREFORK, SOLO, THREADS = ["-P", "prefork", "-c", "2"], ["-P", "solo"], ["-P", "threads", "-c", "2"]
POOLS = pytest.mark.parametrize("pool", [PREFORK, SOLO, THREADS], ids=["prefork", "solo", "threads"])
ENDS_BODIES = pytest.mark.skipif(
    tuple(map(int, version("celery").split(".")[:2])) < (5, 5), reason="before 5.5 Celery waits for the body"
)
MAIN_THREAD = pytest.mark.parametrize(
    "pool", [pytest.param(PREFORK, id="prefork"), pytest.param(SOLO, id="solo", marks=ENDS_BODIES)]
)
SOFT = 1.0
"""Seconds of ``worker_soft_shutdown_timeout``."""


def ask_again(worker: Worker) -> bool:
    """SIGQUIT, once more; whether the worker is gone. The first few only make it say that it waits."""
    worker.process.send_signal(signal.SIGQUIT)
    with suppress(subprocess.TimeoutExpired):
        worker.process.wait(0.5)
    return worker.process.poll() is not None


def end(
    project: Project,
    pool: list[str],
    number: signal.Signals,
    *,
    task: str = "waiting",
    seconds: float = 600,
    hurry: bool = False,
) -> tuple[Run, float]:
    """Start a worker and a body, and tell the worker to end.

    The run, and the seconds from the signal, or from the end of the body if that was later, until its lock is free.
    The session was ended soon after that.
    """
    worker = project.worker(*pool)
    hold(project, "k1", task=task, seconds=seconds)
    worker.process.send_signal(number)
    if hurry:
        until(lambda: ask_again(worker), "the end of its patience")
    sent = time.monotonic()
    until(lambda: not under(project, "locks/"), "the lock's end")
    freed = time.monotonic()
    until(lambda: not under(project, "sessions/"), "the session's end", seconds=AT_ONCE)
    worker.process.wait(60)
    (run,) = runs_of(project, "k1")
    return run, freed - (sent if run.how == "killed" else max(sent, run.ended))


@POOLS
def test_warm(new_project: NewProject, pool: list[str]) -> None:
    """SIGTERM: the body finishes under its lock; then the lock is free and the lease revoked, at once."""
    run, freed = end(new_project(etcd_lock_ttl=30), pool, signal.SIGTERM, seconds=3)
    assert run.how == "returned"
    assert freed < AT_ONCE


@MAIN_THREAD
def test_cold(new_project: NewProject, pool: list[str]) -> None:
    """SIGQUIT: the body is ended, the lock is free and the lease revoked, at once."""
    run, freed = end(new_project(etcd_lock_ttl=30), pool, signal.SIGQUIT)
    assert run.how in {"SystemExit", "NotImplementedError"}, "under solo that is how Celery ends it"
    assert freed < AT_ONCE


@ENDS_BODIES
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
    assert freed < AT_ONCE


@pytest.mark.parametrize(
    ("pool", "task"),
    [
        pytest.param(PREFORK, "waiting", id="prefork"),
        pytest.param(PREFORK, "stubborn", id="prefork-stubborn", marks=ENDS_BODIES),
        pytest.param(THREADS, "waiting", id="threads", marks=ENDS_BODIES),
    ],
)
def test_in_a_hurry(new_project: NewProject, pool: list[str], task: str) -> None:
    """SIGQUIT until the worker gives up waiting, even for a body that does not let itself be ended: free at once."""
    _, freed = end(new_project(etcd_lock_ttl=30), pool, signal.SIGQUIT, task=task, hurry=True)
    assert freed < AT_ONCE
