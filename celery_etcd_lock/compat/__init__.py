"""Bases for projects that come from celery-singleton or celery-once: only the import line changes.

* `Singleton` reads ``unique_on``, ``raise_on_duplicate`` and ``lock_expiry``, and ``singleton_…`` on the app's
  configuration; `DuplicateTaskError` is what it raises, and `clear_locks` what start-up code calls.
* `QueueOnce` reads ``once={…}``, of the task and of one call, and ``ONCE`` on the app's configuration;
  `AlreadyQueued` is what it raises.

Each task that has one of them as its base says in a `CompatWarning` which line to write instead.
"""

from celery_etcd_lock.compat.duplicates import AlreadyQueued, DuplicateTaskError
from celery_etcd_lock.compat.foreign import CompatWarning
from celery_etcd_lock.compat.once import QueueOnce
from celery_etcd_lock.compat.singleton import Singleton, clear_locks

__all__ = ["AlreadyQueued", "CompatWarning", "DuplicateTaskError", "QueueOnce", "Singleton", "clear_locks"]
