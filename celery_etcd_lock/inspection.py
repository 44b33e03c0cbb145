"""What ``celery inspect stats`` shows of a worker's locks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from celery_etcd_lock.etcd.api import KeyValue, Range, prefix_end
from celery_etcd_lock.exceptions import EtcdLockError
from celery_etcd_lock.orphans import pid_of
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.errands import Errands
from celery_etcd_lock.tasks.instance import instance
from celery_etcd_lock.tasks.runtime import Runtime

if TYPE_CHECKING:
    from celery import Celery

    from celery_etcd_lock.locks.session import Session

__all__ = ["locks_of_children", "locks_of_process", "sessions_prefix"]

_WITHIN = 0.7
"""Seconds to wait for etcd: ``celery inspect`` itself waits for one."""


def sessions_prefix(settings: Settings) -> str:
    """What the keys of this worker's sessions begin with."""
    return f"/{settings.namespace}/sessions/{instance()}/"


def locks_of_process(app: Celery) -> dict[str, Any]:
    """Of a worker whose tasks run in its own process: its session, if it has one, and how it stands."""
    session = Runtime.of(app).opened
    return {**_settings(app), "sessions": [] if session is None or session.lost else [_session(session)]}


def locks_of_children(app: Celery) -> dict[str, Any]:
    """Of a worker whose tasks run in its children: their sessions, as etcd has them. ``error``: it did not say."""
    settings = Settings.from_app(app)
    shown = _settings(app)
    if not settings.enabled:
        return {**shown, "sessions": []}
    prefix = sessions_prefix(settings)
    try:
        reply = Errands.of(app).ask(
            lambda transport: transport.range(Range(prefix, prefix_end(prefix)), timeout=_WITHIN), within=_WITHIN
        )
    except EtcdLockError as error:
        return {**shown, "sessions": [], "error": str(error)}
    return {**shown, "sessions": [_child(session) for session in reply.kvs]}


def _settings(app: Celery) -> dict[str, Any]:
    settings = Settings.from_app(app)
    lent = settings.client is not None and settings.default_endpoints
    return {
        "endpoints": [] if lent else list(settings.endpoints),
        "namespace": settings.namespace,
        "ttl": settings.ttl,
        "instance": instance(),
        "enabled": settings.enabled,
    }


def _session(session: Session) -> dict[str, Any]:
    return {
        "lease": f"{session.lease:x}",
        "trusted_for": round(session.remaining(), 1),
        "locks": len(session.contenders),
    }


def _child(session: KeyValue) -> dict[str, Any]:
    try:
        since = json.loads(session.value)["start"]
    except (ValueError, TypeError, KeyError):
        since = ""
    return {"pid": pid_of(session.key), "lease": f"{session.lease:x}", "since": since}
