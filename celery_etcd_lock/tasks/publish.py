"""Publishing a singleton task: what its message carries for the worker."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from celery.signals import before_task_publish

from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.tasks.message import HEADER, addressed, options_in
from celery_etcd_lock.tasks.options import FOR_ONE_CALL, for_one_call, instead_for_one_call

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
    if task.unique_queued is not None:
        from celery_etcd_lock.tasks import queued  # which talks to etcd: others need nothing of that

        if queued.applies(task, options):
            return queued.send(task, publish, args, kwargs, task_id, options)
    return publish(args, kwargs, task_id=task_id, **options)


def for_this_call(task: SingletonTask, task_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` of ``apply_async`` as Celery takes them: ours among them have gone into the header."""
    if task.name.startswith("celery."):
        return dict(options)
    if not options:  # as `delay` calls it: there is nothing to check
        return {"headers": addressed(None, task_id, {})}
    ours = {name: value for name, value in options.items() if name in FOR_ONE_CALL}
    celerys = {name: value for name, value in options.items() if name not in FOR_ONE_CALL}
    for name in celerys.keys() - set(options.get("stamped_headers") or ()):
        if instead := instead_for_one_call(name):
            what = f"task {task.name}: {name} is no option for one call and does nothing: write {instead}"
            warnings.warn(what, stacklevel=4)
    headers = celerys.get("headers")
    if headers is not None and not isinstance(headers, Mapping):
        return celerys  # Celery says what is wrong with that
    return {**celerys, "headers": addressed(headers, task_id, _checked(task, headers, task_id, ours))}


def _checked(
    task: SingletonTask, headers: Mapping[str, Any] | None, task_id: str, ours: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        written = options_in(headers, task_id)
    except ConfigError as error:
        raise ConfigError(f"task {task.name}: {error}") from None
    return for_one_call(task, {**written, **ours})


@before_task_publish.connect(weak=False)
def _say_unread(sender: str = "", properties: Mapping[str, Any] | None = None, **_: Any) -> None:
    """Options of ours that have come to where Celery takes them for the broker's: they do nothing there."""
    for name in FOR_ONE_CALL.keys() & (properties or {}).keys():
        what = f"{name} does nothing for {sender}, which is no singleton task of this app"
        warnings.warn(f'{what}: by name, write send_task(…, headers={{"{HEADER}": {{"{name}": …}}}})', stacklevel=2)
