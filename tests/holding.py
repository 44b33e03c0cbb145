"""A body that runs under a lock for as long as a test needs it, and what etcd has of it."""

from __future__ import annotations

from typing import Any

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import KeyValue, Range, prefix_end
from tests.workers import Project, Run, until

__all__ = ["AT_ONCE", "hold", "runs_of", "under"]

AT_ONCE = 12
"""Seconds: nominally 3, and several times that on a machine that is busy; far below the TTL of 30."""


def under(project: Project, prefix: str) -> tuple[KeyValue, ...]:
    """The keys that the project has in etcd under `prefix`."""
    transport = connect(project.etcd_url)
    try:
        whole = f"/{project.queue}/{prefix}"
        return transport.range(Range(whole, prefix_end(whole))).kvs
    finally:
        transport.close()


def runs_of(project: Project, key: str) -> list[Run]:
    """The runs under a lock of this key, of any task that is unique on ``key``."""
    return [run for run in project.runs() if f"/key={key}/" in run.key]


def hold(project: Project, key: str, *, task: str = "waiting", seconds: float = 600, **options: Any) -> tuple[Run, Any]:
    """Have a body run under the lock `key`: its run, once it is inside, and its result."""
    result = project.app.send_task(task, (0, seconds, key), **options)
    (run,) = until(lambda: runs_of(project, key), "the start")
    return run, result
