"""A named lock in one mode: what `Mutex`, the two sides of a `RWLock` and `Semaphore` are."""

from __future__ import annotations

import threading
from types import TracebackType

from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.held import HeldLock
from celery_etcd_lock.locks.queue import Mode, checked_name
from celery_etcd_lock.locks.session import Session

__all__ = ["Lock"]


class Lock:
    """Something to acquire. Not bound to a thread: whoever has the `HeldLock` holds it, and may release it.

    It knows nothing of who has it already, so it is not reentrant: each acquisition is a contender of its own, and
    waits for those ahead even if this very thread holds them. Without a `timeout` that may be for ever; such a wait
    begins with a warning ``etcd_lock.waits_for_itself`` in the log.
    """

    def __init__(self, session: Session, name: str, mode: Mode) -> None:
        self.session = session
        self.name = checked_name(name)
        self.mode = mode
        self._entered = threading.local()

    def acquire(self, *, blocking: bool = True, timeout: float | None = None) -> HeldLock:
        """Take it, waiting for `timeout` seconds at most (None: for as long as it takes).

        `LockTimeout` when the time is over; with ``blocking=False`` `LockContended` at once if it is not free;
        `LockLost` if the session is lost; `EtcdUnavailable` if no etcd answers.
        """
        if not blocking and timeout is not None:
            raise ValueError("acquire(blocking=False) does not wait: leave out timeout")
        return acquire(self.session, self.name, self.mode, blocking=blocking, timeout=timeout)

    def __enter__(self) -> HeldLock:
        held = self.acquire()
        self._entered.__dict__.setdefault("stack", []).append(held)
        return held

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        held: HeldLock = self._entered.stack.pop()
        held.__exit__(exc_type, exc, tb)

    def __repr__(self) -> str:
        limit = f" limit={self.mode.limit}" if self.mode.limit else ""
        return f"<{type(self).__name__} {self.name} {self.mode.kind}{limit}>"
