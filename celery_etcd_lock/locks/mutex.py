"""The mutex: one holder at a time, first come first served."""

from __future__ import annotations

import threading
from types import TracebackType

from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.held import HeldLock
from celery_etcd_lock.locks.queue import checked_name
from celery_etcd_lock.locks.session import Session

__all__ = ["Mutex"]


class Mutex:
    """An exclusive lock in etcd, by etcd's own recipe: ``etcdctl lock NAME`` and Go's Mutex exclude it, and it them.

    Not reentrant: a holder that acquires it again waits for itself, in whatever thread. Threads of one session
    exclude each other as any other two holders do::

        with Mutex(session, "/maintenance").acquire(timeout=5) as held:
            assert held.is_held()

    `ConfigError` for a name that a lock cannot have.
    """

    def __init__(self, session: Session, name: str) -> None:
        self.session = session
        self.name = checked_name(name)
        self._entered = threading.local()

    def acquire(self, *, blocking: bool = True, timeout: float | None = None) -> HeldLock:
        """Take it, waiting for `timeout` seconds at most (None: for as long as it takes).

        `LockTimeout` when the time is over; with ``blocking=False`` `LockContended` at once if it is not free;
        `LockLost` if the session is lost; `EtcdUnavailable` if no etcd answers.
        """
        if not blocking and timeout is not None:
            raise ValueError("acquire(blocking=False) does not wait: leave out timeout")
        return acquire(self.session, self.name, blocking=blocking, timeout=timeout)

    def __enter__(self) -> HeldLock:
        held = self.acquire()
        self._entered.held = held
        return held

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        held: HeldLock = self._entered.held
        held.__exit__(exc_type, exc, tb)
