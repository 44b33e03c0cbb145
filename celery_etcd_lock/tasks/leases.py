"""Leases for marks: keys that outlive the process that puts them, and go by themselves.

A lease for each mark would be the most expensive thing about it. So those that a process puts within a slice of time
hang on one lease, which nobody renews: it lives for somewhat longer than the mark must.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from celery_etcd_lock.etcd.api import Transport
from celery_etcd_lock.exceptions import EtcdUnavailable, LeaseNotFound

__all__ = ["Leases"]

R = TypeVar("R")

_STEP = 1.25
"""How much longer a lease lives than what is asked for: the factor from one length to the next, and the slice."""

_PATIENCE = 5.0
"""Seconds for a lease, where the caller does not say."""


class Leases:
    """Those of one process. All its threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        """For what is known; never held over a request."""
        self._granting = threading.Lock()
        """So that the threads of a process do not each get a lease at once."""
        self._granted: dict[int, tuple[int, float]] = {}
        """By length in seconds: the newest lease, and when it will have gone."""

    def put(
        self, transport: Transport, ttl: float, send: Callable[[int], R], *, timeout: Callable[[], float] | None = None
    ) -> R:
        """What `send` returns, given a lease that lives for `ttl` seconds at least, and for 1.6 times that at most.

        It is called once more with a new one if etcd does not know the first any more. `timeout` gives the seconds
        that getting a lease may take from now on. Raises what `send` and the transport raise.
        """
        lease = self._lease(transport, ttl, timeout)
        try:
            return send(lease)
        except LeaseNotFound:
            self.forget(lease)
            return send(self._lease(transport, ttl, timeout))

    def forget(self, lease: int) -> None:
        """It is gone, or not to be used again."""
        with self._lock:
            self._granted = {length: each for length, each in self._granted.items() if each[0] != lease}

    def _lease(self, transport: Transport, ttl: float, timeout: Callable[[], float] | None) -> int:
        length = math.ceil(_STEP ** math.ceil(math.log(max(ttl, 2.0), _STEP)))
        if lease := self._known(length, ttl):
            return lease
        deadline = self._clock() + (_PATIENCE if timeout is None else timeout())
        if not self._granting.acquire(timeout=max(0.0, deadline - self._clock())):
            raise EtcdUnavailable("another thread's request for a lease takes too long")
        try:
            if lease := self._known(length, ttl):  # the other thread's
                return lease
            now = self._clock()
            granted = transport.lease_grant(math.ceil(length * _STEP), timeout=max(0.0, deadline - now))
            with self._lock:
                self._granted[length] = granted.lease, now + granted.ttl
            return granted.lease
        finally:
            self._granting.release()

    def _known(self, length: int, ttl: float) -> int:
        """A lease of that length that lives for `ttl` seconds from now on; 0 if there is none."""
        with self._lock:
            lease, gone = self._granted.get(length, (0, 0.0))
        return lease if gone - self._clock() >= ttl else 0
