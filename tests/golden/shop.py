"""The tasks whose keys are recorded, and one message run as a worker runs it, in this process. Names never change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.app.trace import build_tracer

from celery_etcd_lock import Conflict, SingletonTask

__all__ = ["make", "run"]


def nothing() -> None:
    """What beat sends."""


def make(endpoints: str, **settings: Any) -> Celery:
    """An app with the tasks, its queue in memory. A body is whatever is set as the task's ``work`` then."""
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(
        etcd_lock_endpoints=endpoints,
        etcd_lock_ttl=60,
        beat_schedule={"nightly": {"task": "shop.nightly", "schedule": 1.0}},
        result_expires=None,  # or Celery adds an entry that cleans up
        **settings,
    )

    def task(name: str, parameter: str, **options: Any) -> None:
        def body(self: Any, value: Any) -> Any:
            return self.work(value)

        def catalog(self: Any, catalog: Any) -> Any:
            return self.work(catalog)

        options = {"on_conflict": Conflict.fail(), "work": staticmethod(lambda value: value), **options}
        function = {"value": body, "catalog": catalog}[parameter]
        app.task(base=SingletonTask, bind=True, name=f"shop.{name}", shared=False, **options)(function)

    task("sync", "value")
    task("export", "catalog", lock_key="/catalog:{catalog}", lock_mode="shared")
    task("rebuild", "catalog", lock_key="/catalog:{catalog}")
    task("render", "value", lock_key="all", lock_limit=2)
    task("import", "value", lock_at_least_for=50)
    task("invoice", "value", unique_queued="until_start")
    task("index", "value", on_conflict="coalesce")
    task("charge", "value", acks_late=True, on_conflict="retry")
    app.task(name="shop.nightly", shared=False)(nothing)
    app.finalize()
    return app


def run(
    app: Celery, name: str, task_id: str, *args: Any, work: Callable[[Any], Any] | None = None, **request: Any
) -> str:
    """Deliver a message to the task, as a worker does: the state in which it ends, IGNORED if it is none."""
    task: Any = app.tasks[name]
    task.work = work or (lambda value: value)
    message = {"id": task_id, "task": name, "args": args, "kwargs": {}, "delivery_info": {}, **request}
    tracer: Any = build_tracer(name, task, app=app)
    ended = tracer(task_id, args, {}, message)
    return ended.info.state if ended.info else "SUCCESS"
