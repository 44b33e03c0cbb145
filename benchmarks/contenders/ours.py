"""This package's Mutex, on either wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from celery_etcd_lock.locks import Mutex, Session

__all__ = ["over"]


def over(url: str, ttl: int, transport: Literal["gateway", "grpc"]) -> Callable[[str], Callable[[], object]]:
    """`take(name)` gives what gives it back."""
    session = Session.open(url, ttl=ttl, transport=transport)

    def take(name: str) -> Callable[[], object]:
        return Mutex(session, name).acquire().release

    return take
