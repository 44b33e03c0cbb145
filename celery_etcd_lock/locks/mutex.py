"""The mutex: one holder at a time, first come first served."""

from __future__ import annotations

from celery_etcd_lock.locks.lock import Lock
from celery_etcd_lock.locks.queue import EXCLUSIVE
from celery_etcd_lock.locks.session import Session

__all__ = ["Mutex"]


class Mutex(Lock):
    """An exclusive lock in etcd, by etcd's own recipe: ``etcdctl lock NAME`` and Go's Mutex exclude it, and it them.

    Not reentrant: a holder that acquires it again waits for itself, in whatever thread. Threads of one session
    exclude each other as any other two holders do::

        with Mutex(session, "/maintenance").acquire(timeout=5) as held:
            assert held.is_held()

    `ConfigError` for a name that a lock cannot have.
    """

    def __init__(self, session: Session, name: str) -> None:
        super().__init__(session, name, EXCLUSIVE)
