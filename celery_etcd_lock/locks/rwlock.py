"""The read-write lock: any number of readers together, or one writer, first come first served."""

from __future__ import annotations

from celery_etcd_lock.locks.lock import Lock
from celery_etcd_lock.locks.queue import EXCLUSIVE, SHARED, checked_name
from celery_etcd_lock.locks.session import Session

__all__ = ["RWLock"]


class RWLock:
    """Readers go in together, a writer alone::

        catalog = RWLock(session, "/catalog")
        with catalog.read().acquire(timeout=5): ...
        with catalog.write().acquire(timeout=5): ...

    Nobody overtakes: a reader that comes while a writer waits goes in after it, so neither side starves. The write
    side is the `Mutex` of that name; a `Mutex`, ``etcdctl lock`` and Go's Mutex on it are writers.

    Not reentrant, and there is no upgrade. Who holds the read lock and acquires the write lock waits for their own
    read lock to be released: `LockContended` with ``blocking=False``, `LockTimeout` with a timeout, and without
    one a wait for ever, unless another thread releases it. (Two readers that both want to write would wait for each
    other in any case.) Release the read lock first, and look again at what was read. Reading twice in one thread
    works until a writer comes to wait in between; then the second read waits for that writer, and so for itself.

    `ConfigError` for a name that a lock cannot have.
    """

    def __init__(self, session: Session, name: str) -> None:
        self.session = session
        self.name = checked_name(name)

    def read(self) -> Lock:
        """The shared side."""
        return Lock(self.session, self.name, SHARED)

    def write(self) -> Lock:
        """The exclusive side."""
        return Lock(self.session, self.name, EXCLUSIVE)

    def __repr__(self) -> str:
        return f"<RWLock {self.name}>"
