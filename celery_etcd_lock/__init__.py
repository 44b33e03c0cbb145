"""Locks for Celery tasks, in etcd: one task, one runner."""

from __future__ import annotations

from celery_etcd_lock import events as _events
from celery_etcd_lock import logs as _logs
from celery_etcd_lock import worker as _worker  # noqa: F401 - workers check the settings when they start
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
from celery_etcd_lock.tasks import discarded as _discarded
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

_logs.connect()
_events.connect()
_discarded.connect()
