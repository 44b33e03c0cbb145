"""What ``celery inspect`` shows of a worker's locks: ``stats``, and ``etcd_lock_messages`` of messages that wait."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from celery_etcd_lock.etcd.api import KeyValue, Range, prefix_end
from celery_etcd_lock.exceptions import EtcdLockError
from celery_etcd_lock.orphans import pid_of
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.errands import Errands
from celery_etcd_lock.tasks.instance import instance
from celery_etcd_lock.tasks.message import Waits, header_of
from celery_etcd_lock.tasks.runtime import Runtime

if TYPE_CHECKING:
    from celery import Celery

    from celery_etcd_lock.locks.session import Session

__all__ = ["MESSAGES", "add_commands", "locks_of_children", "locks_of_process", "sessions_prefix"]

MESSAGES = "etcd_lock_messages"
"""The name of the command by which a worker says what it has of the messages of some task ids."""

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


def add_commands() -> None:
    """Let this process, a worker's, answer ``celery inspect etcd_lock_messages ID…``. Safe to call twice."""
    from celery.worker.control import inspect_command  # what only workers need

    inspect_command(name=MESSAGES, variadic="ids", signature="[id1 [id2 [... [idN]]]]")(_messages)


def _messages(state: Any, ids: Iterable[str] = (), **_: Any) -> dict[str, Any]:
    """How long messages have waited for their locks, by task id."""
    asked, found = set(ids or ()), dict[str, dict[str, Any]]()
    for where, request in _requests(state.consumer.timer):
        if request.id in asked:
            said = _message(state.app, where, request)
            # Of a message that has just been put back both the old and the new one may be there.
            if request.id not in found or said["waits"]["times"] > found[request.id]["waits"]["times"]:
                found[request.id] = said
    return found


def _requests(timer: Any) -> Iterator[tuple[str, Any]]:
    """Of all messages that this worker has, each with its state.

    Not Celery's own list by id, which ``query_task`` asks: from there a message that was put back and is here again
    is dropped when the one that put it back ends.
    """
    from celery.worker import state as worker_state
    from celery.worker.request import Request

    active = set(worker_state.active_requests)
    yield from (("active", request) for request in active)
    yield from (("reserved", request) for request in set(worker_state.reserved_requests) - active)
    for waiting in list(timer.schedule.queue):
        first = (getattr(waiting.entry, "args", None) or (None,))[0]
        if isinstance(first, Request):
            yield "scheduled", first


def _message(app: Celery, where: str, request: Any) -> dict[str, Any]:
    from celery.app.task import Context

    headers = request.request_dict
    said: dict[str, Any] = {
        "task": headers["task"],
        "state": where,
        "eta": request.eta.isoformat() if request.eta else None,
        "waits": Waits.of(header_of(Context(headers)))._asdict(),
    }
    with suppress(Exception):  # it is no singleton task, or its arguments give no key
        info, task = request.info(), app.tasks[headers["task"]]
        said["lock"] = getattr(task, "lock_name")(info["args"], info["kwargs"])  # noqa: B009 - other tasks have none
    return said
