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
from celery_etcd_lock.exceptions import LeaseNotFound

__all__ = ["Leases"]

R = TypeVar("R")

_STEP = 1.25
"""How much longer a lease lives than what is asked for: the factor from one length to the next, and the slice."""


class Leases:
    """Those of one process. All its threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._granted: dict[int, tuple[int, float]] = {}
        """By length in seconds: the newest lease, and when it will have gone."""

    def put(self, transport: Transport, ttl: float, send: Callable[[int], R]) -> R:
        """What `send` returns, given a lease that lives for `ttl` seconds at least, and for 1.6 times that at most.

        It is called once more with a new one if etcd does not know the first any more. Raises what it raises.
        """
        lease = self._lease(transport, ttl)
        try:
            return send(lease)
        except LeaseNotFound:
            with self._lock:
                self._granted = {length: each for length, each in self._granted.items() if each[0] != lease}
            return send(self._lease(transport, ttl))

    def _lease(self, transport: Transport, ttl: float) -> int:
        length = math.ceil(_STEP ** math.ceil(math.log(max(ttl, 2.0), _STEP)))
        with self._lock:
            lease, gone = self._granted.get(length, (0, 0.0))
            now = self._clock()
            if gone - now < ttl:
                granted = transport.lease_grant(math.ceil(length * _STEP))
                lease, gone = granted.lease, now + granted.ttl
                self._granted[length] = lease, gone
            return lease
