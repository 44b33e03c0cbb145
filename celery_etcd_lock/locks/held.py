"""A lock that is held: what its holder may ask of it, and how it is given back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from celery_etcd_lock.etcd.api import Compare, Operation, created_at
from celery_etcd_lock.exceptions import LockLost
from celery_etcd_lock.locks.expiry import Expiry

if TYPE_CHECKING:
    from celery_etcd_lock.locks.contender import Contender, Removal
    from celery_etcd_lock.locks.session import Session

__all__ = ["HeldLock"]


class HeldLock:
    """What `acquire` returns. As a context manager it releases at the end of the block.

    Any thread may use and release it. A forked child has a copy that is not held and releases nothing.
    """

    def __init__(self, session: Session, contender: Contender, fencing_token: int, *, rode: bool = False) -> None:
        self._session = session
        self._contender = contender
        self._token = fencing_token
        self._rode = rode
        self._expiry: Expiry | None = None
        self._releasing = threading.Lock()
        self._outcome: Removal | None = None

    @property
    def session(self) -> Session:
        """The session on whose lease it hangs."""
        return self._session

    @property
    def name(self) -> str:
        """The lock's name in etcd, as ``etcdctl lock`` takes it."""
        return self._contender.name

    @property
    def key(self) -> str:
        """The key in etcd that stands for this hold."""
        return self._contender.key

    @property
    def fencing_token(self) -> int:
        """A number larger than that of every exclusive holder before.

        Let whatever the lock protects remember the largest it has seen and refuse a smaller one: that stops a
        holder that was frozen and goes on as if nothing had happened, which no lease can. It is the etcd
        revision at which the lock was found held, as in Go's ``concurrency`` and ``ETCD_LOCK_REV``.
        """
        return self._token

    @property
    def rode(self) -> bool:
        """Whether the acquire's `Rider` was carried out. False: it was dropped, or there was none."""
        return self._rode

    def remaining(self) -> float:
        """Seconds for which the lock is surely held, unless it is renewed meanwhile; 0 when it is not held."""
        if self._outcome is not None or self._contender.lost is not None:
            return 0.0
        left = self._session.remaining()
        return left if self._expiry is None else max(0.0, min(left, self._expiry.at - self._session.now()))

    def is_held(self) -> bool:
        """Whether the lock is surely held right now. Asks the clock, not etcd."""
        return self.remaining() > 0.0

    def assert_held(self) -> None:
        """`LockLost`, with the reason, unless the lock is surely held right now."""
        if not self.is_held():
            raise LockLost(f"{self.name}: {self.why_not()}")

    def why_not(self) -> str:
        """Why it is not held, in words."""
        if os.getpid() != self._session.pid:
            return self._session.reason
        if self._outcome is not None:
            return "it was released"
        reason = self._contender.lost or self._session.reason
        return reason or (self._expiry.reason if self._expiry is not None and not self.remaining() else "")

    def compare(self) -> Compare:
        """The condition that this hold still stands, for a transaction of your own in the same etcd."""
        return created_at(self.key, self._contender.create_revision)

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Call `callback` with the reason, in another thread, once the lock is lost; at once if it is already."""
        self._session.contenders.on_lost(self._contender, callback)

    def expire_after(self, seconds: float, *, grace: float, reason: str = "") -> None:
        """Hold it for `seconds` from now and no longer: then it is lost, for `reason`, and `on_lost` is told.

        `grace` seconds after that its key is deleted unless it was released, though its holder may not have ended:
        that gives up exclusion. Called again it counts anew.
        """
        if os.getpid() != self._session.pid or self._outcome is not None:
            return
        at = self._session.now() + seconds
        self._expiry = Expiry(self._contender, at, grace, reason or f"held for longer than {seconds:g} s")
        self._session.expire(self._expiry)

    def release(self, also: Sequence[Operation] = ()) -> Removal:
        """Give it back. Says what came of it, and the same again when called twice.

        ``"released"``: it was ours until now. ``"lost"``: it was not ours any more; nothing was touched.
        ``"unanswered"``: etcd did not answer within the timeout; the session goes on until it is certain.

        `also` is done by the same transaction, if the lock was still ours. It is dropped where etcd is full and takes
        no puts, where it names a lease that is gone, and where the session has to go on: after ``"unanswered"`` it
        was done by the request that got no answer, or never is. Of two calls that of the first counts.
        """
        if os.getpid() != self._session.pid:
            return "lost"
        with self._releasing:
            if self._outcome is None:
                if self._expiry is not None:
                    self._session.expiries.cancel(self._contender)
                    if self._expiry.at <= self._session.now():
                        self._session.contenders.lose(self._contender, self._expiry.reason)
                lost = self._contender.lost is not None
                outcome = self._session.contenders.remove(
                    self._contender, timeout=1.0 if lost else None, also=() if lost else also
                )
                self._outcome = "lost" if lost else outcome
            return self._outcome

    def __enter__(self) -> HeldLock:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        reason = "" if self.is_held() else self.why_not()
        outcome = self.release()
        if exc_type is None and outcome == "lost":
            raise LockLost(f"{self.name}: {reason or 'its key was deleted'}")

    def __repr__(self) -> str:
        return f"<HeldLock {self.key} token={self._token} {'held' if self.is_held() else self.why_not()}>"
