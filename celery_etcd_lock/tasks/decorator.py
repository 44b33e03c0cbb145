"""`singleton_task`: one line on a function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from celery import Celery, Task
from celery import _state as _celery_state
from celery.local import Proxy

from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.tasks.task import SingletonTask

if TYPE_CHECKING:
    from types import CodeType

    from celery_etcd_lock.tasks.typed import SingletonTaskDecorator

    _Proxy = Proxy[Any]
else:
    _Proxy = Proxy

__all__ = ["singleton_task"]

_state: Any = _celery_state  # what shared_task itself is made of


def _singleton_task(function: Callable[..., Any] | None = None, *, app: Celery | None = None, **options: Any) -> Any:
    """Make a task whose body runs under its lock: a shared task, or one of `app`.

    With or without parentheses; takes every option of ``@app.task`` and those of `SingletonTask`::

        @singleton_task(unique_on="account_id", on_conflict="skip", acks_late=True)
        def sync(account_id, full=False): ...

    `TypeError` when it stands above or below ``@app.task``: it makes the task itself.
    """
    if function is None:
        return lambda function: _make_shared(function, app, options)
    return _make_shared(function, app, options)


_singleton_task.__name__ = _singleton_task.__qualname__ = "singleton_task"
singleton_task = cast("SingletonTaskDecorator", _singleton_task)


def _make_shared(function: Callable[..., Any], only_app: Celery | None, options: dict[str, Any]) -> Any:
    if issubclass(type(function), (Task, Proxy)):  # not its __class__: lazy
        raise TypeError(_two_decorators(_name_of(function), "above"))
    if not callable(function):
        raise TypeError(f"@singleton_task decorates a function, not {function!r}")

    def make(app: Any) -> None:
        if only_app is None or app is only_app:
            app.task(shared=False, lazy=False, **{**options, "base": _base(app, options.get("base"))})(function)

    # As shared_task does: every app that is finalized from now on, and those that are already.
    _state.connect_on_app_finalize(make)
    for app in _state._get_active_apps():
        if app.finalized:
            make(app)

    def task() -> Any:
        app = only_app or _state.get_current_app()
        return app.tasks[options.get("name") or app.gen_task_name(function.__name__, function.__module__)]

    return _TaskProxy(task)


def _base(app: Celery, base: Any) -> type[SingletonTask]:
    """`SingletonTask` in front of the base that was asked for, or of the app's own task class."""
    parent = base or app.Task
    if not (isinstance(parent, type) and issubclass(parent, Task)):
        raise ConfigError(f"base={base!r} is no task class: write a subclass of celery.Task")
    if issubclass(parent, SingletonTask):
        return parent
    bases = (SingletonTask,) if issubclass(SingletonTask, parent) else (SingletonTask, parent)
    return cast("type[SingletonTask]", type("SingletonTask", bases, {"abstract": True, "__module__": __name__}))


class _TaskProxy(_Proxy):
    """The task of the current app. Refuses to be made a task of once more: Celery would drop the options of that."""

    @property
    def __name__(self) -> str:
        _refuse_celery(sys._getframe(1).f_code, self)
        return cast("str", self._get_current_object().__name__)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        _refuse_celery(sys._getframe(1).f_code, self)
        return cast("str | None", self._get_current_object().__doc__)

    @property
    def __module__(self) -> str:  # type: ignore[override]
        _refuse_celery(sys._getframe(1).f_code, self)
        return cast("str", self._get_current_object().__module__)


def _refuse_celery(caller: CodeType, proxy: Any) -> None:
    if caller.co_name in ("_task_from_fun", "_create_task_cls") and caller.co_filename == _APP_FILE:
        raise TypeError(_two_decorators(proxy._get_current_object().__name__, "below"))


_APP_FILE = Celery._task_from_fun.__code__.co_filename


def _name_of(task: Any) -> str:
    """The name of a task, or of one that is yet to be made."""
    if not issubclass(type(task), Proxy):
        return str(task.__name__)
    waiting = object.__getattribute__(task, "_Proxy__args")
    return waiting[0].__name__ if waiting else "the function"


def _two_decorators(name: str, where: str) -> str:
    return (
        f"@singleton_task stands {where} another task decorator at {name}: it makes the task itself, and takes "
        f"every option of @app.task: write one line, @singleton_task(<all the options>), or "
        f"@app.task(base=SingletonTask, <all the options>)."
    )
