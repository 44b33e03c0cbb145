"""Tasks with times of their own, and what tells of options for one call.

The same in the worker (setting ``imports``) and where they are sent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from celery import Celery

from celery_etcd_lock import Conflict, SingletonTask

SOON = Conflict.retry(backoff=0.05, backoff_max=0.3)
LEAST = 4.0
"""Seconds; etcd's shortest lease is 2."""
MOST = 2.0
"""Seconds."""


def nothing(self: Any, number: int, seconds: float = 0.05, key: str = "k") -> None:
    """The body where none runs."""


def plain(number: int) -> int:
    return number


def total(numbers: list[int]) -> int:
    return sum(numbers)


def make(app: Celery, work: Callable[..., Any] = nothing, noted: Any = None) -> dict[str, Any]:
    """The tasks of `app`, by name. `work`: their body, ``(self, number, seconds, key)``."""

    def task(name: str, body: Callable[..., Any] = work, **options: Any) -> None:
        options = {"unique_on": "key", "on_conflict": SOON, **options}
        app.task(base=SingletonTask, bind=True, name=name, shared=False, **options)(body)

    def retries(self: Any, number: int, key: str = "k") -> int:
        with noted(self, number):
            if self.request.retries == 0:
                raise self.retry(countdown=0.1)
        return number

    def hangs(self: Any, number: int, nap: float = 0.05, key: str = "k") -> int:
        """For ever, by naps of so many seconds; when it is put back it does not."""
        with noted(self, number):
            while not (self.request.headers or {}).get("etcd_lock", {}).get("times"):
                time.sleep(nap)
        return number

    def stuck(self: Any, number: int, seconds: float, key: str = "k") -> int:
        """In one call that nothing interrupts but a signal."""
        with noted(self, number):
            time.sleep(seconds)
        return number

    def told(self: Any, key: str = "k", retry: bool = False) -> dict[str, Any]:
        if retry and self.request.retries == 0:
            raise self.retry(countdown=0.1)
        return {**self.request.headers["etcd_lock"], "retries": self.request.retries}

    def hands_on(self: Any, key: str = "k") -> Any:
        return app.tasks["told"].apply_async((), {"key": key + "-on"}, headers=self.request.headers).id

    least: dict[str, Any] = {"lock_at_least_for": LEAST}
    task("lasts", **least)
    task("lasts_in_turn", **least, on_conflict=Conflict.wait(timeout=60))
    task("lasts_skipping", **least, on_conflict=Conflict.skip(result="skipped"))
    task("lasts_two", **least, lock_limit=2)
    catalog: dict[str, Any] = {"unique_on": None, "lock_key": "/lasting/{key}"}
    task("lasts_reading", **least, **catalog, lock_mode="shared")
    task("writes_then", **catalog)
    task("lasts_retrying", retries, **least)
    task("hangs", hangs, lock_at_most_for=MOST)
    task("hangs_retried", hangs, lock_at_most_for=MOST, on_lost="retry")
    task("late_warned", stuck, lock_at_most_for=MOST, on_lost="warn")
    task("stuck", stuck, lock_at_most_for=MOST, on_conflict=Conflict.wait(timeout=60))
    task("fails", on_conflict="fail")
    task("told", told, on_conflict="fail")
    task("hands_on", hands_on)
    app.task(name="plain", shared=False)(plain)
    app.task(name="total", shared=False)(total)
    app.task(name="any", bind=True, shared=False)(work)
    return dict(app.tasks)


if "RECORD" in os.environ:
    project: Any = import_module("project")
    make(project.app, project.work, project.noted)
