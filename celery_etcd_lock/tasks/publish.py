"""Publishing a singleton task: what its message carries for the worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from celery_etcd_lock.tasks import queued
from celery_etcd_lock.tasks.message import addressed
from celery_etcd_lock.tasks.options import FOR_ONE_CALL, for_one_call

if TYPE_CHECKING:
    from celery.result import AsyncResult

    from celery_etcd_lock.tasks.task import SingletonTask

__all__ = ["for_this_call", "send"]


def send(
    task: SingletonTask,
    publish: Callable[..., AsyncResult[Any]],
    args: Any,
    kwargs: Any,
    task_id: str,
    options: dict[str, Any],
) -> AsyncResult[Any]:
    """Publish a call of `task` by `publish`, Celery's own ``apply_async``, unless `queued` has something against it.

    `ConfigError` for options without sense.
    """
    options = for_this_call(task, task_id, options)
    if queued.applies(task, options):
        return queued.send(task, publish, args, kwargs, task_id, options)
    return publish(args, kwargs, task_id=task_id, **options)


def for_this_call(task: SingletonTask, task_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` of ``apply_async`` as Celery takes them: ours among them have gone into the header."""
    if task.name.startswith("celery."):
        return dict(options)
    ours = for_one_call(task.name, {name: value for name, value in options.items() if name in FOR_ONE_CALL})
    celerys = {name: value for name, value in options.items() if name not in FOR_ONE_CALL}
    headers = celerys.get("headers")
    if headers is not None and not isinstance(headers, Mapping):
        return celerys  # Celery says what is wrong with that
    return {**celerys, "headers": addressed(headers, task_id, ours)}
