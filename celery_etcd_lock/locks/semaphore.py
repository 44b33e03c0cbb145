"""The semaphore: so many holders at a time, first come first served."""

from __future__ import annotations

from celery_etcd_lock.locks.lock import Lock
from celery_etcd_lock.locks.queue import slot_of
from celery_etcd_lock.locks.session import Session

__all__ = ["Semaphore"]


class Semaphore(Lock):
    """At most `limit` holders at once::

        with Semaphore(session, "/gpu", limit=4).acquire(timeout=60): ...

    Each acquisition takes a slot of its own, in the same thread too. A `Mutex`, a reader or a stranger's lock of
    the same name excludes all slots, and is excluded by each.

    The limit is not stored: it is what each contender asks for by itself, namely that fewer than `limit` of those who
    came before it are there, waiting ones counted. So while different limits are used at once, as in a rolling
    deploy, there are never more holders than the largest of them; one with a smaller limit does not stop those with
    a larger one from coming in after it, and none waits for anybody who came later.

    A try (``blocking=False``) costs one request when nobody is in, two when somebody is. Holders that are in
    together have fencing tokens in no order that means anything: a semaphore cannot be fenced by them.

    `ConfigError` for a limit that is no whole number from 1 on, and for a name that a lock cannot have.
    """

    def __init__(self, session: Session, name: str, *, limit: int) -> None:
        super().__init__(session, name, slot_of(limit))

    @property
    def limit(self) -> int:
        return self.mode.limit
