"""May we do what the settings have us do? Tried, harmlessly, with a key of its own for each kind of key.

The keys are where ours are and no name of ours is; they hang on a short lease, and go at the end in any case.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from celery_etcd_lock.cli.doctor.findings import Finding
from celery_etcd_lock.cli.doctor.members import MAKE_ROOM
from celery_etcd_lock.etcd.api import Delete, Put, Range, Transport, Txn
from celery_etcd_lock.exceptions import EtcdLockError, NoSpace, PermissionDenied
from celery_etcd_lock.settings import Settings

__all__ = ["TTL", "about_permissions", "reading_key"]

TTL = 10
"""Seconds for which a key of ours stays if we die, at the most."""

_MARK = "@doctor"


@dataclass(frozen=True, slots=True)
class _Kind:
    """Keys below one prefix, and what does not work without them."""

    prefix: str
    needed_for: str
    always: bool = False


def _kinds(settings: Settings) -> tuple[_Kind, ...]:
    own = f"/{settings.namespace}"
    return (
        _Kind(f"{own}/locks/", "every lock", always=True),
        _Kind(f"{own}/sessions/", "every lock", always=True),
        _Kind(f"{own}/done/", "tasks with acks_late, and messages that are delivered twice", always=True),
        _Kind(f"{own}/queued/", "unique_queued"),
        _Kind(f"{own}/waiting/", 'on_conflict="coalesce"'),
        _Kind(f"{own}/asked/", "`celery etcd-lock release`"),
        _Kind(f"{own}/beat/{settings.beat_name}/", "`celery beat -S etcd_lock`"),
    )


def reading_key(settings: Settings) -> str:
    """A key that every user of these settings may read, and that is never there."""
    return f"/{settings.namespace}/locks/{_MARK}"


def about_permissions(transport: Transport, settings: Settings, timeout: float) -> Iterator[Finding]:
    """What may not be done of what has to be. Writes and removes; raises nothing of etcd's."""
    try:
        granted = transport.lease_grant(TTL, timeout=timeout)
    except NoSpace as error:
        yield Finding("wrong", "permissions", str(error), MAKE_ROOM)
        return
    except EtcdLockError as error:
        yield Finding("unknown", "permissions", f"no lease could be had, so nothing was tried: {error}")
        return
    if granted.ttl > max(TTL, settings.ttl):  # it has made more of what was asked for
        what = f"etcd grants none shorter than {granted.ttl} s, so that holds, and not etcd_lock_ttl = {settings.ttl}"
        yield Finding("note", "leases", what, "etcd's --election-timeout is long: this is one and a half of it")
    try:
        yield from _try_all(transport, settings, granted.lease, timeout)
    finally:
        with contextlib.suppress(EtcdLockError):
            transport.lease_revoke(granted.lease, timeout=timeout)


def _try_all(transport: Transport, settings: Settings, lease: int, timeout: float) -> Iterator[Finding]:
    allowed: list[str] = []
    refused: list[tuple[_Kind, str]] = []
    who = f"user {settings.username!r}" if settings.username else "whoever has no user name"
    for kind in _kinds(settings):
        try:
            missing = _missing(transport, kind.prefix + f"{_MARK}-{secrets.token_hex(6)}", lease, timeout)
        except NoSpace:
            yield Finding("wrong", "permissions", "etcd is full, and takes no writes", MAKE_ROOM)
            return
        except EtcdLockError as error:
            yield Finding("unknown", "permissions", f"not tried from {kind.prefix} on: {error}")
            return
        if missing:
            refused.append((kind, missing))
        else:
            allowed.append(kind.prefix)
    for kind, missing in refused:
        yield Finding(
            "wrong" if kind.always else "warning",
            f"permission below {kind.prefix}",
            f"{who} may not {missing} there: it is needed for {kind.needed_for}",
            f"etcdctl role grant-permission ROLE readwrite --prefix {shlex.quote(f'/{settings.namespace}/')}",
        )
    if not refused:
        yield Finding("ok", "permissions", f"to read, write and delete, tried below {', '.join(allowed)}")


def _missing(transport: Transport, key: str, lease: int, timeout: float) -> str:
    """What may not be done with `key`; empty: all of it may. Leaves nothing there."""
    missing = []
    attempts: dict[str, Callable[[], object]] = {
        "write": lambda: transport.txn(Txn([], [Put(key, b"{}", lease)]), timeout=timeout),
        "read": lambda: transport.range(Range(key), timeout=timeout),
        "delete": lambda: transport.delete(Delete(key), timeout=timeout),
    }
    for what, attempt in attempts.items():
        try:
            attempt()
        except PermissionDenied:
            missing.append(what)
    return " or ".join(missing)
