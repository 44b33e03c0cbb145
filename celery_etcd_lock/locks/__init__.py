"""The locks: etcd's own concurrency recipes. Knows nothing of Celery."""

from __future__ import annotations

from celery_etcd_lock.locks.held import HeldLock
from celery_etcd_lock.locks.mutex import Mutex
from celery_etcd_lock.locks.session import Session

__all__ = ["HeldLock", "Mutex", "Session"]
