"""Tasks as users of celery-singleton and celery-once have them: the same in the worker and where they are sent."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from celery import Celery

from celery_etcd_lock.compat import QueueOnce, Singleton


def nothing(self: Any, number: int, seconds: float = 0.05, key: str = "k") -> None:
    """The body where none runs."""


def make(app: Celery, work: Callable[..., Any] = nothing, noted: Any = None) -> dict[str, Any]:
    """The tasks of `app`, by name. `work`: their body, ``(self, number, seconds, key)``."""

    def fails(self: Any, number: int, key: str = "k") -> None:
        with noted(self, number):
            raise ValueError(number)

    def retries(self: Any, number: int, key: str = "k") -> int:
        with noted(self, number):
            if not self.request.retries:
                raise self.retry(countdown=1)
        return number

    class Contextual(QueueOnce):
        """As the application context of a web framework is put around every body."""

        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            request: Any = self.request
            request.inside = True
            return super().__call__(*args, **kwargs)

    def contextual(self: Any, number: int, seconds: float = 0.05, key: str = "k") -> Any:
        assert self.request.inside
        return work(self, number, seconds, key)

    def task(name: str, base: Any, body: Callable[..., Any] = work, **options: Any) -> None:
        app.task(base=base, bind=True, name=name, shared=False, **options)(body)

    task("singleton", Singleton, unique_on=["key"])
    task("singleton_raises", Singleton, unique_on="key", raise_on_duplicate=True)
    task("singleton_fails", Singleton, fails, unique_on="key")
    task("singleton_retries", Singleton, retries, unique_on="key")
    task("singleton_expires", Singleton, unique_on="key", lock_expiry=60)
    task("once", QueueOnce, once={"keys": ["key"]})
    task("once_graceful", QueueOnce, once={"keys": ["key"], "graceful": True})
    task("once_early", QueueOnce, once={"keys": ["key"], "unlock_before_run": True})
    task("once_retries", QueueOnce, retries, once={"keys": ["key"]})
    task("once_fails", QueueOnce, fails, once={"keys": ["key"]})
    task("once_contextual", Contextual, contextual, once={"keys": ["key"]})
    return dict(app.tasks)


if "RECORD" in os.environ:
    project: Any = import_module("project")
    make(project.app, project.work, project.noted)
