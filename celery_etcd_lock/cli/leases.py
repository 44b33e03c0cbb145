"""How long leases have left: each is asked for once, several at a time, and not for longer than people wait."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from celery_etcd_lock.etcd.api import LeaseKeys, Transport

__all__ = ["GONE", "left_of"]

GONE = -1
_AT_ONCE = 8
_PATIENCE = 5.0
"""Seconds for all of them."""


def left_of(transport: Transport, leases: Iterable[int], *, keys: bool = False) -> dict[int, LeaseKeys]:
    """What etcd says of each of `leases`. Those that are missing were not asked for: that would have taken too long."""
    deadline = time.monotonic() + _PATIENCE

    def ask(lease: int) -> LeaseKeys | None:
        return transport.lease_time_to_live(lease, keys=keys) if time.monotonic() < deadline else None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = pool.map(ask, sorted({lease for lease in leases if lease}))
        return {answer.lease: answer for answer in answers if answer is not None}
