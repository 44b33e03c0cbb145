"""Locks in memory instead of etcd, and a task's lock held by somebody else: for tests of tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.locks import HeldLock, Session
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.runtime import close_all
from celery_etcd_lock.tasks.task import SingletonTask

__all__ = ["held_elsewhere", "memory_locks"]


@contextmanager
def memory_locks() -> Iterator[MemoryEtcd]:
    """Until the block ends, every app of this process locks in a store of its own in memory, empty at first.

    What is set as ``etcd_lock_endpoints`` is not asked. Eager runs still lock only under ``etcd_lock_eager``, and
    other processes, the children of a prefork pool among them, are not reached.
    """
    store = MemoryEtcd()
    close_all()
    with patch.object(Settings, "connect", lambda _settings: MemoryTransport(store)):
        try:
            yield store
        finally:
            close_all()


@contextmanager
def held_elsewhere(task: Any, /, *args: Any, **kwargs: Any) -> Iterator[HeldLock]:
    """Until the block ends, somebody else holds the lock that `task` takes for these arguments.

    It is held from a session of its own, where the settings of the task's app say: in memory inside `memory_locks`.
    In the mode of the task: beside a shared one, others that share run. `TypeError` if `task` is no singleton task,
    `LockContended` if the lock is held already, `UnstableKeyError` and `EtcdUnavailable` as for the task.
    """
    real = getattr(task, "_get_current_object", lambda: task)()  # Celery's decorators give a proxy
    if not isinstance(real, SingletonTask):
        raise TypeError(f"{task!r} is no singleton task: it takes no lock that one could hold")
    with (
        Session.from_app(real.app) as session,
        acquire(session, real.lock_name(args, kwargs), real._mode, blocking=False) as held,
    ):
        yield held
