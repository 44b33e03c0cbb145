"""Tasks with `unique_queued` or `coalesce`: the same in the worker (setting ``imports``) and where they are sent."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from celery import Celery
from celery.exceptions import Ignore, Reject

from celery_etcd_lock import Conflict, SingletonTask

SOON = Conflict.retry(backoff=0.05, backoff_max=0.3)


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

    def ends(self: Any, number: int, how: str, key: str = "k") -> int:
        with noted(self, number):
            if self.request.retries or how == "success":
                return number
            if how == "retry":
                raise self.retry(countdown=1)
            if how == "replace":
                raise self.replace(app.tasks["plain"].s(number))
            raise {"ignore": Ignore(), "reject": Reject("no", requeue=False), "failure": ValueError(number)}[how]

    def follows(self: Any, number: int, key: str = "k") -> str:
        with noted(self, number):
            return str(self.apply_async((number + 1,), {"key": key}).id) if number < 2 else ""

    task("until_start", unique_queued="until_start")
    task("until_end", unique_queued="until_end")
    task("raises", unique_queued="until_start", on_duplicate="raise")
    task("skips", unique_queued="until_start", on_conflict="skip")
    task("fails", unique_queued="until_start", on_conflict="fail")
    task("waits", unique_queued="until_start", on_conflict=Conflict.wait(timeout=60))
    task("in_the_way", unique_on=None, lock_key="/taken/{key}")
    task("unlucky", unique_on=None, lock_key="/taken/{key}", unique_queued="until_start", on_conflict="fail")
    task("skipped", unique_on=None, lock_key="/taken/{key}", unique_queued="until_end", on_conflict="skip")
    task("shares_one", unique_on=None, lock_key="/shared/{key}", unique_queued="until_start")
    task("shares_other", unique_on=None, lock_key="/shared/{key}", unique_queued="until_start")
    task("unlocked", unique_queued="until_start", on_unavailable="run")
    task("ends_from_start", ends, unique_queued="until_start")
    task("ends_until_end", ends, unique_queued="until_end")
    task("follows", follows, unique_queued="until_start")
    task("coalesces", on_conflict="coalesce")
    task("coalesces_too", unique_on=None, lock_key="/catalog/{key}", on_conflict="coalesce")
    task("coalesces_else", unique_on=None, lock_key="/catalog/{key}", on_conflict="coalesce")
    app.task(name="plain", shared=False)(plain)
    app.task(name="total", shared=False)(total)
    return dict(app.tasks)


if "RECORD" in os.environ:
    project: Any = import_module("project")
    make(project.app, project.work, project.noted)
