"""What is in etcd right now: locks with who holds them and who waits, and beats.

As ``celery -A example_project.shop etcd-lock ls`` and ``… etcd-lock beat`` show it, by the same functions. They are the
package's own and may change; what the commands print with ``--json`` does not.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

from celery import Celery

from celery_etcd_lock import EtcdLockError
from celery_etcd_lock.beat.record import leader_name
from celery_etcd_lock.cli.pages import keys_below
from celery_etcd_lock.cli.queues import Contender, Queue, limits_of, queues
from celery_etcd_lock.settings import Settings


def seen(app: Celery) -> dict[str, Any]:
    """``{"locks": […], "beats": […], "etcd": ""}``; in ``"etcd"`` why nothing is known, where that is so."""
    settings = Settings.from_app(app)
    try:
        with closing(settings.connect()) as etcd:
            held = list(queues(keys_below(etcd, f"/{settings.namespace}/locks/"), limits_of(app)))
            election = leader_name(settings.namespace, settings.beat_name)
            beats = list(queues(keys_below(etcd, election + "/"), limits_of(app), election))
    except EtcdLockError as error:
        return {"locks": [], "beats": [], "etcd": str(error)}
    return {
        "locks": [_lock(queue) for queue in held],
        "beats": [_contender(each) for queue in beats for each in queue.contenders],
        "etcd": "",
    }


def _lock(queue: Queue) -> dict[str, Any]:
    return {
        "title": queue.lock.title,
        "name": queue.lock.name,
        "mode": queue.mode,
        "holders": [_contender(each) for each in queue.holders],
        "waiting": [_contender(each) for each in queue.waiting],
    }


def _contender(each: Contender) -> dict[str, Any]:
    said = each.record
    return {
        "host": each.host,
        "pid": each.pid,
        "task": said.get("task", ""),
        "task_id": said.get("task_id", ""),
        "since": said.get("since", ""),
        "token": each.kv.create_revision,
        "holds": each.holds,
    }
