"""Worker events, for Flower and ``celery events``: receivers of the signals that pass them on.

``lock-acquired``, ``lock-contended``, ``lock-released``, ``lock-lost``, each with the task's ``uuid`` and the fields of
its record. Not ``task-…``: a monitor would take what follows for the state of the task. They are sent from where the
task runs, so only a worker that was started with its events on (``-E``, ``worker_send_task_events``) sends them, and
none that was told to by ``celery control enable_events``.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from celery_etcd_lock import signals

__all__ = ["begin_worker", "connect"]

logger = logging.getLogger("celery_etcd_lock")

_VARIABLE = "CELERY_ETCD_LOCK_EVENTS"


def _handed_on() -> str:
    parent, _, hostname = os.environ.get(_VARIABLE, "").partition(":")
    return hostname if parent == str(os.getppid()) else ""


_hostname = _handed_on()
"""The worker's name, if its events are on."""


def begin_worker(hostname: str, *, on: bool) -> None:
    """This is the main process of the worker of that name, about to start children, with its events `on` or off."""
    global _hostname  # noqa: PLW0603 children are forked from this very module
    _hostname = hostname if on else ""
    os.environ[_VARIABLE] = f"{os.getpid()}:{_hostname}"  # for those that are spawned


def connect() -> None:
    """Begin to pass events on. Done once, with the import of `tasks.task`."""
    for kind in ("acquired", "contended", "released", "lost"):
        getattr(signals, f"lock_{kind}").connect(_sender(f"lock-{kind}"), weak=False)


def _sender(event: str) -> Any:
    def send(sender: Any, record: Any, **_: Any) -> None:
        if not (_hostname and sender.send_events):
            return
        fields = record._asdict()
        uuid = fields.pop("task_id")
        try:
            with sender.app.events.default_dispatcher(hostname=_hostname) as dispatcher:
                dispatcher.send(event, uuid=uuid, retry=False, **fields)
        except Exception as error:  # noqa: BLE001 whatever the broker has: it is an event
            logger.debug("etcd_lock.event_not_sent: %s: %r", event, error)

    signals.hears(send, lambda: bool(_hostname))
    return send
