"""The locks: etcd's own concurrency recipes. Knows nothing of Celery."""

from __future__ import annotations

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
