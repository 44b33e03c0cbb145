"""Marks of messages that stand in a queue: where they are in etcd, and what they say. Pure.

* ``/<namespace>/queued/<task>/<key>``: a message of a task with `unique_queued` is in its queue; under ``"until_end"``
  also while it runs.
* ``/<namespace>/waiting/<task>/<key>``: a message has found the lock taken, and its `Conflict.coalesce` lets it wait.

Task and key are those of the lock's name, ``/<namespace>/locks/<task>/<key>``. A mark is of one task also where several
share a lock (``/<namespace>/locks/@shared/<key>``), for a message does the work of no other task:
``/<namespace>/queued/<task>/%2F<key>``.

The value is ``{"task_id":"…"}``, written one way, so that it can be compared: whose a mark is decides who may move or
delete it. The layout is public: a rolling deploy mixes versions.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from celery_etcd_lock.etcd.api import Compare, Delete, Put, created_at
from celery_etcd_lock.tasks.keys import lock_name

__all__ = ["Mark", "task_id_in"]

_SHARED = "@shared"
_SLASH = "%2F"


class Mark(NamedTuple):
    """One message's mark: the same key for all that exclude each other, a value of its own."""

    key: str
    value: bytes

    @classmethod
    def queued(cls, lock: str, task: str, task_id: str) -> Mark:
        """Of the message `task_id` of `task`, whose lock's name is `lock`."""
        return cls(_key("queued", lock, task), _value(task_id))

    @classmethod
    def waiting(cls, lock: str, task: str, task_id: str) -> Mark:
        """Of the message `task_id` of `task`, whose lock's name is `lock`."""
        return cls(_key("waiting", lock, task), _value(task_id))

    def is_ours(self) -> Compare:
        return Compare(self.key, "value", "==", self.value)

    def is_absent(self) -> Compare:
        return created_at(self.key, 0)

    def put(self, lease: int) -> Put:
        return Put(self.key, self.value, lease)

    def delete(self) -> Delete:
        return Delete(self.key)


def _key(kind: str, lock: str, task: str) -> str:
    _, namespace, _, owner, key = lock.split("/", 4)
    if owner == _SHARED:
        owner, key = lock_name("-", task, "-").split("/")[3], _SLASH + key
    return f"/{namespace}/{kind}/{owner}/{key}"


def _value(task_id: str) -> bytes:
    return json.dumps({"task_id": task_id}, separators=(",", ":")).encode()


def task_id_in(value: bytes) -> str:
    """Whose mark it is; ``""`` if it is none of ours."""
    try:
        task_id = json.loads(value)["task_id"]
    except (ValueError, TypeError, KeyError):
        return ""
    return task_id if isinstance(task_id, str) else ""
