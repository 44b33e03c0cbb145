"""Who was in line for which lock, and who was let in, from what happened to its keys. Pure.

A `Timeline` is told of the keys that were there at one revision and then of each change, in order; it says of each
contender at which revisions it came, was let in and went. Who may go in is decided by `locks.queue`, as always.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any
from urllib.parse import unquote

from celery_etcd_lock.etcd.api import Event, KeyValue
from celery_etcd_lock.locks.queue import Kind, Mode, describe, keeping_out, kind_of

__all__ = ["Scope", "Stay", "Timeline"]

_created = attrgetter("create_revision")


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose history is wanted: all locks of a namespace, those of a task, or one."""

    namespace: str
    lock: str = ""
    """One lock's name; empty: all, or those of `owner`."""
    owner: str = ""
    """One task, as it is in names of locks."""

    @property
    def prefix(self) -> str:
        """What the keys begin with."""
        if self.lock:
            return f"{self.lock}/"
        return f"/{self.namespace}/locks/{self.owner}/" if self.owner else f"/{self.namespace}/locks/"

    def lock_of(self, key: str) -> str:
        """The lock in whose line `key` stands; empty if it is no contender."""
        if not key.startswith(self.prefix):
            return ""
        if self.lock:
            return self.lock
        parts = key.split("/", 5)  # "", namespace, "locks", owner, key, contender
        return "/".join(parts[:5]) if len(parts) == 6 else ""


def task_and_key(scope: Scope, lock: str) -> tuple[str, str]:
    """Of a lock's name, for people: the task it belongs to, and the key; both empty if it is no task's."""
    start = f"/{scope.namespace}/locks/"
    if not lock.startswith(start) or lock.count("/") != 4:
        return "", ""
    owner, key = lock[len(start) :].split("/")
    return ("" if owner == "@shared" else unquote(owner)), unquote(key)


@dataclass(slots=True)
class Stay:
    """One contender, from when it came to when it went. All revisions."""

    lock: str
    key: str
    kind: Kind
    came: int
    holder: str
    """For people."""
    record: dict[str, Any]
    """What it said of itself; empty of a stranger."""
    let_in: int | None = None
    """At which it had the lock; None: not so far, or it went without."""
    let_in_before: bool = False
    """It had the lock already when the history begins; `let_in` is where that is."""
    gone: int | None = None
    """None: it is there still."""
    with_its_session: bool = False
    """Its session ended at the same revision: it was closed, or its process died or was cut off."""
    limit_known: bool = True
    """False of a slot of which nobody says how many there are: it was let in at `let_in` at the latest."""

    @property
    def task(self) -> str:
        return str(self.record.get("task", ""))

    @property
    def task_id(self) -> str:
        return str(self.record.get("task_id", ""))


@dataclass(slots=True)
class _Contender:
    stay: Stay
    keys: dict[str, KeyValue]
    """One, or two with a sibling."""


@dataclass(slots=True)
class _Line:
    by_created: dict[int, _Contender] = field(default_factory=dict)
    """In the order in which they came: that in which they are put, but for those found at the beginning."""
    by_key: dict[str, _Contender] = field(default_factory=dict)


class Timeline:
    """`limit_of` says how many slots the locks of a task have, None if it does not know. Keeps the last `keep` stays
    that have ended, all that have not, and in `dropped` how many it has not kept.
    """

    def __init__(self, scope: Scope, limit_of: Callable[[str], int | None], keep: int) -> None:
        self._scope = scope
        self._limit_of = limit_of
        self._lines: dict[str, _Line] = {}
        self._ended: deque[Stay] = deque(maxlen=keep)
        self.dropped = 0
        self._revision = 0
        self._touched: set[str] = set()
        self._left: list[Stay] = []
        self._ended_sessions: set[str] = set()

    def begin(self, revision: int, kvs: Iterable[KeyValue]) -> None:
        """`kvs`: what was there at `revision`."""
        self._revision = revision
        for kv in kvs:
            self._put(kv)
        self._settle(at_first=True)

    def see(self, event: Event) -> None:
        """The next change; those of one revision follow each other."""
        revision = event.kv.mod_revision
        if revision != self._revision:
            self._settle()
            self._revision = revision
        if event.kind == "put":
            self._put(event.kv)
        else:
            self._delete(event.kv.key)

    def finish(self) -> list[Stay]:
        """All stays so far, by lock and then in the order in which they came."""
        self._settle()
        there = [each.stay for line in self._lines.values() for each in line.by_created.values()]
        return sorted([*self._ended, *there], key=lambda stay: (stay.lock, stay.came))

    def live(self) -> dict[str, int]:
        """The contenders' keys that are there now, with their mod revisions."""
        contenders = [each for line in self._lines.values() for each in line.by_created.values()]
        return {kv.key: kv.mod_revision for each in contenders for kv in each.keys.values()}

    def _put(self, kv: KeyValue) -> None:
        lock = self._scope.lock_of(kv.key)
        if not lock:
            return
        line = self._lines.setdefault(lock, _Line())
        contender = line.by_created.get(kv.create_revision)
        if contender is None:
            stay = Stay(lock, kv.key, kind_of(lock, kv.key), kv.create_revision, describe(kv).holder, _record(kv))
            contender = line.by_created[kv.create_revision] = _Contender(stay, {})
        contender.keys[kv.key] = kv
        line.by_key[kv.key] = contender
        self._touched.add(lock)

    def _delete(self, key: str) -> None:
        if key.startswith(f"/{self._scope.namespace}/sessions/"):
            self._ended_sessions.add(key.rpartition("-")[2])
        lock = self._scope.lock_of(key)
        line = self._lines.get(lock)
        contender = line.by_key.pop(key, None) if line else None
        if line is None or contender is None:
            return
        del contender.keys[key]
        self._touched.add(lock)
        if not contender.keys:
            del line.by_created[contender.stay.came]
            contender.stay.gone = self._revision
            self._left.append(contender.stay)
            if not line.by_created:
                del self._lines[lock]

    def _settle(self, *, at_first: bool = False) -> None:
        """What the changes of one revision come to, now that all of them are known."""
        for stay in self._left:
            lease = stay.key.rpartition("/")[2].partition("-")[0]
            stay.with_its_session = lease in self._ended_sessions
            self.dropped += len(self._ended) == self._ended.maxlen
            self._ended.append(stay)
        for lock in self._touched & self._lines.keys():
            self._let_in(lock, at_first)
        self._left, self._touched, self._ended_sessions = [], set(), set()

    def _let_in(self, lock: str, at_first: bool) -> None:
        line = self._lines[lock]
        if at_first:
            line.by_created = dict(sorted(line.by_created.items()))
        ahead: list[KeyValue] = []
        closed: set[Kind] = set()
        for contender in line.by_created.values():
            stay = contender.stay
            if stay.let_in is None and stay.kind not in closed:
                mode, stay.limit_known = self._mode(stay)
                keepers = keeping_out(mode, lock, ahead, stay.task_id)
                if not keepers:
                    stay.let_in, stay.let_in_before = self._revision, at_first
                elif not all(stay.task_id and describe(each).task_id == stay.task_id for each in keepers):
                    closed.add(stay.kind)  # nobody overtakes: those of its kind behind it wait, too
            if stay.kind == "write":
                break  # and behind one that wants to be alone everybody does
            ahead.extend(contender.keys.values())

    def _mode(self, stay: Stay) -> tuple[Mode, bool]:
        """How it wants in, and whether that is known: a slot does not say of how many."""
        if stay.kind != "slot":
            return Mode(stay.kind), True
        limit = self._limit_of(stay.task or task_and_key(self._scope, stay.lock)[0])
        return Mode("slot", limit or 1), limit is not None


def _record(kv: KeyValue) -> dict[str, Any]:
    try:
        record = json.loads(kv.value)
    except ValueError:
        return {}
    return record if isinstance(record, dict) and "host" in record else {}
