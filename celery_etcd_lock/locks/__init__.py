"""The locks: etcd's own concurrency recipes. Knows nothing of Celery.

A name is imported when it is first asked for: who makes a task needs of all this no more than the lock's mode.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_etcd_lock.locks.election import Election, Leader, Leadership, Observation
    from celery_etcd_lock.locks.held import HeldLock
    from celery_etcd_lock.locks.lock import Lock
    from celery_etcd_lock.locks.mutex import Mutex
    from celery_etcd_lock.locks.rwlock import RWLock
    from celery_etcd_lock.locks.semaphore import Semaphore
    from celery_etcd_lock.locks.session import Session

__all__ = [
    "Election",
    "HeldLock",
    "Leader",
    "Leadership",
    "Lock",
    "Mutex",
    "Observation",
    "RWLock",
    "Semaphore",
    "Session",
]

_MODULES = {"HeldLock": "held", "Leader": "election", "Leadership": "election", "Observation": "election"}
"""Which module has a name, where that is not the name's own."""

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES.get(name, name.lower())}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
