"""The queues of locks, as etcd has them: whose lock it is, who holds it, who waits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from celery_etcd_lock.etcd.api import KeyValue
from celery_etcd_lock.locks.queue import admitted, describe, is_contender, kind_of
from celery_etcd_lock.tasks.task import SingletonTask

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["Contender", "Lock", "Queue", "limits_of", "lock_name_in", "queues"]

_DEPTH = 5
"""Parts of a lock's name between slashes: ``/<namespace>/locks/<task>/<key>`` has an empty one in front."""

_MODES = {"write": "exclusive", "read": "shared", "slot": "limited"}

Limits = Callable[[str], int]
"""How many runs of a task, by its name, may be in at once; 0: not known here."""


@dataclass(frozen=True)
class Contender:
    """One that holds a lock or waits for it."""

    kv: KeyValue
    holds: bool
    leftover: bool
    """Its run has ended, and ``lock_at_least_for`` keeps its place."""

    @property
    def record(self) -> dict[str, Any]:
        """What it says of itself: host, pid, since, nonce, task, task_id, retries. Empty: it is a stranger."""
        try:
            said = json.loads(self.kv.value)
        except ValueError:
            return {}
        return said if isinstance(said, dict) and "host" in said else {}

    @property
    def who(self) -> str:
        """For people."""
        return describe(self.kv).holder

    @property
    def host(self) -> str:
        return str(self.record.get("host", "")) or "another client"

    @property
    def pid(self) -> str:
        return str(self.record.get("pid", "-"))

    @property
    def run(self) -> str:
        """The id of its task; of one that is of no task: what it is for, or its lease."""
        record = self.record
        if record:
            return str(record.get("task_id") or record.get("for") or "-")
        return f"lease {self.kv.lease:x}" if self.kv.lease else "no lease"

    def to_json(self) -> dict[str, Any]:
        """The record, and its token: see ``ls --help``."""
        stranger = {"lease": f"{self.kv.lease:x}" if self.kv.lease else None}
        return {**(self.record or stranger), "token": self.kv.create_revision}


@dataclass(frozen=True)
class Lock:
    """Which lock it is."""

    name: str
    task: str
    """``""``: no task's own, because its `lock_key` begins with a slash or it is none of a task's."""
    key: str

    @classmethod
    def named(cls, name: str) -> Lock:
        parts = name.split("/")
        if len(parts) != _DEPTH:
            return cls(name, "", name)
        if parts[3] == "@shared":
            return cls(name, "", "/" + unquote(parts[4]))
        return cls(name, unquote(parts[3]), unquote(parts[4]))

    @property
    def title(self) -> str:
        """For people: ``shop.sync account_id=42``."""
        return f"{self.task} {self.key}".strip() if self.key != "-" else self.task


@dataclass(frozen=True)
class Queue:
    """A lock that is held, and all who stand in line for it, first come first."""

    lock: Lock
    mode: str
    contenders: tuple[Contender, ...]
    sure: bool
    """False: how many may hold it at once is not known here. The first does, and of the others some may."""

    @property
    def holders(self) -> tuple[Contender, ...]:
        return tuple(each for each in self.contenders if each.holds)

    @property
    def waiting(self) -> tuple[Contender, ...]:
        return tuple(each for each in self.contenders if not each.holds)

    def to_json(self) -> dict[str, Any]:
        return {
            "lock": self.lock.name,
            "task": self.lock.task,
            "key": self.lock.key,
            "mode": self.mode,
            "holders": [each.to_json() for each in self.holders],
            "waiting": len(self.waiting),
        }


def queues(kvs: Iterable[KeyValue], limits: Limits, name: str | None = None) -> Iterator[Queue]:
    """The queues that `kvs` are, those of each lock side by side, as etcd has them in the order of their keys.

    With `name` they are all of one, which may be none of a task's.
    """
    for each, keys in groupby(kvs, lambda kv: name or lock_name_in(kv.key)):
        yield _queue(each, list(keys), limits)


def _queue(name: str, keys: list[KeyValue], limits: Limits) -> Queue:
    keys.sort(key=lambda kv: kv.create_revision)
    lock, kind = Lock.named(name), kind_of(name, keys[0].key)
    limit = limits(lock.task or _task_said(keys[0])) if kind == "slot" else 1
    inside = admitted(name, keys, limit or 1)
    contenders = []
    for created, same in groupby(keys, lambda kv: kv.create_revision):
        pair = list(same)  # with the sibling that `lock_at_least_for` gives it
        own = next((kv for kv in pair if is_contender(kv.key, kv.lease)), None)
        kv = own or pair[0]
        leftover = own is None and bool(kv.lease and describe(kv).nonce)
        contenders.append(Contender(kv, created in inside, leftover))
    sure = bool(limit) or len(contenders) == 1
    return Queue(lock, _MODES[kind], tuple(contenders), sure)


def _task_said(kv: KeyValue) -> str:
    """The task that `kv` says it runs; ``""`` where it says none."""
    return str(Contender(kv, holds=False, leftover=False).record.get("task", ""))


def lock_name_in(key: str) -> str:
    """The lock whose contender `key` is."""
    parts = key.split("/")
    if len(parts) > _DEPTH:
        return "/".join(parts[:_DEPTH])
    return key.rpartition("/")[0]  # a stranger's, on a name that no task has


def limits_of(app: Celery) -> Limits:
    """The `lock_limit` of the tasks of `app`, which are imported when it is first asked for one."""
    known: dict[str, int] = {}
    imported = False

    def limit(task: str) -> int:
        nonlocal imported
        if not imported:
            imported = True
            with suppress(Exception):  # whatever keeps the project's tasks from being imported: one less is known
                app.loader.import_default_modules()
        if task not in known:
            found: Any = app.tasks.get(task)
            known[task] = found._mode.limit if isinstance(found, SingletonTask) else 0
        return known[task]

    return limit
