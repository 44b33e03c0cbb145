"""Locks that are broken on purpose, in one way each: what the checker must catch. Only for processes of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from celery_etcd_lock.etcd.api import KeyValue, LeaseReply, Range, Transport, Txn
from celery_etcd_lock.exceptions import EtcdUnavailable
from celery_etcd_lock.locks import acquire as acquire_module
from celery_etcd_lock.locks import queue, session
from celery_etcd_lock.locks.held import HeldLock

__all__ = ["BREAKS", "LateRenewals"]

_Attempt = acquire_module._Attempt


def _own_key() -> None:
    """After waiting, nobody looks whether the own key is still there."""

    def look(self: Any) -> tuple[tuple[KeyValue, ...], int]:
        ahead = self.mode.ahead(self.name, self.contender.create_revision, self.task_id)
        reply = self.session.txn(Txn([], [Range(self.contender.key, keys_only=True), *ahead]))
        return self.keeping_out(acquire_module._contenders(reply, 1)), reply.header.revision

    _Attempt.look = look  # type: ignore[method-assign]


def _trust() -> None:
    """The lease is trusted from when the reply came, as in Go's ``concurrency``, not from when it was asked for."""

    def trusted_until(sent: float, ttl: float) -> float:
        return session.boottime() + ttl - ttl / 10

    session.trusted_until = trusted_until


def _no_lock() -> None:
    """Everybody is let in."""

    def keeping_out(self: Any, queued: Iterable[KeyValue]) -> tuple[KeyValue, ...]:
        return ()

    _Attempt.keeping_out = keeping_out  # type: ignore[method-assign]


def _overtaking() -> None:
    """Readers and slots go past writers and each other's limit: only a writer waits, and for writers alone."""
    rule = queue.keeping_out

    def keeping_out(mode: queue.Mode, name: str, ahead: Iterable[KeyValue], task_id: str = "") -> tuple[KeyValue, ...]:
        return rule(mode, name, [kv for kv in ahead if mode.kind == queue.kind_of(name, kv.key) == "write"], task_id)

    queue.keeping_out = keeping_out


def _token() -> None:
    """The token is the revision of the session's key, which does not grow with the lock's holders."""

    run = _Attempt.run

    def run_and_forget(self: Any, blocking: bool, timeout: float | None) -> HeldLock:
        run(self, blocking, timeout)
        return HeldLock(self.session, self.contender, self.session.epoch)

    _Attempt.run = run_and_forget  # type: ignore[method-assign]


BREAKS: Mapping[str, Callable[[], None]] = {
    "own-key": _own_key,
    "trust": _trust,
    "nolock": _no_lock,
    "overtaking": _overtaking,
    "token": _token,
}


class LateRenewals:
    """A transport whose first renewal is answered late, by `delay` seconds, and whose others are not.

    The rest is `inner`'s.
    """

    def __init__(self, inner: Transport, delay: float) -> None:
        self._inner = inner
        self._delay = delay
        self._renewed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def lease_renew(self, lease: int, *, timeout: float | None = None) -> LeaseReply:
        if self._renewed:
            raise EtcdUnavailable("this renewal was thrown away", True)
        self._renewed = True
        reply = self._inner.lease_renew(lease, timeout=timeout)
        time.sleep(self._delay)
        return reply
