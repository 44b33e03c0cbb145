"""Locks for Celery tasks, in etcd: one task, one runner.

A name is imported when it is first asked for, so that ``import celery_etcd_lock`` costs next to nothing, neither an
import of one exception nor of `locks`, nor ``celery --help``, which looks at the plugin's entry points.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_etcd_lock.exceptions import (
        ConfigError,
        DuplicateTaskError,
        EtcdLockError,
        EtcdUnavailable,
        LockContended,
        LockLost,
        LockTimeout,
        UnstableKeyError,
    )
    from celery_etcd_lock.tasks.conflict import Conflict
    from celery_etcd_lock.tasks.current import current_lock
    from celery_etcd_lock.tasks.decorator import singleton_task
    from celery_etcd_lock.tasks.task import SingletonTask

__all__ = [
    "ConfigError",
    "Conflict",
    "DuplicateTaskError",
    "EtcdLockError",
    "EtcdUnavailable",
    "LockContended",
    "LockLost",
    "LockTimeout",
    "SingletonTask",
    "UnstableKeyError",
    "current_lock",
    "singleton_task",
]

__version__ = "0.1.0"

_TASKS = {
    "Conflict": "tasks.conflict",
    "SingletonTask": "tasks.task",
    "current_lock": "tasks.current",
    "singleton_task": "tasks.decorator",
}
"""Which module has a name; `exceptions` has the others."""

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_TASKS.get(name, 'exceptions')}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


if "celery.signals" in sys.modules:
    # A worker, like as not: it is to check the settings at its start, though its tasks may only import our `locks`.
    # (Where Celery comes after us, whatever of ours knows of Celery brings this with it.)
    import_module(f"{__name__}.tasks")
