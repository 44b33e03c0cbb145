"""The queue of a lock: its contenders in the order in which they came, and who of them may go in.

A lock named ``NAME`` is the set of keys ``NAME/…``, in etcd's own recipe: everybody who wants it puts one key
there, under a lease, and the create revisions are the order. ``etcdctl lock NAME``, the server's Lock RPC and
Go's ``concurrency`` do the same with ``NAME/<lease hex>``, so they stand in the same queue::

    NAME/write/694d9…       ours, exclusive; the first contender of that lease
    NAME/write/694d9…-1     another thread of the same session, at the same time
    NAME/read/694d9…        ours, shared
    NAME/slot/694d9…        ours, one of a number
    NAME/694d9…             somebody else's, exclusive

What a contender asks of those who came before it is its `Mode`: nobody (exclusive), readers only (shared), or
slots only and fewer than N of them. Nobody overtakes, so nobody starves: a reader that finds a writer waiting
waits behind it. In every mode two contenders with the same task id exclude each other.

A contender that stays taken for some time after it was released has a *sibling*, a second key of its kind and of its
create revision (see `sibling`). The two count as one: so what is counted are create revisions, not keys.

Everything here is pure: it says what to ask etcd and what an answer means.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import Literal, NamedTuple, TypeAlias

from celery_etcd_lock.etcd.api import Compare, KeyValue, Range, prefix_end
from celery_etcd_lock.exceptions import ConfigError

__all__ = [
    "EXCLUSIVE",
    "SHARED",
    "Description",
    "Kind",
    "Mode",
    "admitted",
    "blamed",
    "checked_name",
    "contender_key",
    "describe",
    "is_contender",
    "keeping_out",
    "kind_of",
    "slot_of",
    "value_of",
]

Kind: TypeAlias = Literal["write", "read", "slot"]
_KINDS: frozenset[str] = frozenset({"write", "read", "slot"})
_created = attrgetter("create_revision")
_dump = json.JSONEncoder(separators=(",", ":")).encode


class Mode(NamedTuple):
    """How a contender wants in: alone, beside other readers, or as one of `limit`. And what to ask etcd for that."""

    kind: Kind
    limit: int = 0
    """Of a slot: how many may be in at once, itself included."""

    def _outside(self, name: str) -> list[tuple[str, str]]:
        """The ranges of keys where everybody ahead keeps it out."""
        start, end = name + "/", prefix_end(name + "/")
        if self.kind == "write":
            return [(start, end)]
        return [(start, f"{start}{self.kind}/"), (prefix_end(f"{start}{self.kind}/"), end)]

    def _inside(self, name: str) -> tuple[str, str]:
        """The range of those of its own kind."""
        start = f"{name}/{self.kind}/"
        return start, prefix_end(start)

    def ahead(self, name: str, created: int, task_id: str) -> list[Range]:
        """Asks for as much of what is ahead of the contender created at `created` as `keeping_out` needs.

        0: of one that is not there yet, see `before`.
        """
        asked = [_newest(span, created, 1, keys_only=True) for span in self._outside(name)]
        if self.kind == "slot":
            asked.append(_newest(self._inside(name), created, 2 * self.limit, keys_only=not task_id))
        return asked + self.twins(name, task_id, created)

    def before(self, name: str, task_id: str) -> tuple[Range, ...]:
        """As `ahead`, of a contender that is not there yet."""
        return _before(self, name, bool(task_id))

    def twins(self, name: str, task_id: str, created: int = 0) -> list[Range]:
        """Asks for whoever might have the same task id and yet keep nobody out by its kind: the other readers."""
        return [_newest(self._inside(name), created, 0)] if self.kind == "read" and task_id else []

    def first(self, name: str, task_id: str) -> list[Range]:
        """Asks for those who came first, as many as show whether a newcomer may go in, and who they are."""
        asked = [Range(*span, limit=1, sort="create") for span in self._outside(name)]
        if self.kind == "slot":
            asked.append(Range(*self._inside(name), limit=2 * self.limit, sort="create"))
        return asked + self.twins(name, task_id)

    def free(self, name: str, seen: int) -> list[Compare]:
        """The condition that a newcomer may go in.

        No comparison counts: for a slot it is that nobody came after revision `seen`, at which there was room.
        """
        if self.kind == "slot":
            return [Compare(name + "/", "create", "<", seen + 1, range_end=prefix_end(name + "/"))]
        return [Compare(start, "create", "==", 0, range_end=end) for start, end in self._outside(name)]


EXCLUSIVE = Mode("write")
SHARED = Mode("read")


@lru_cache(maxsize=256)
def _before(mode: Mode, name: str, says_task_id: bool) -> tuple[Range, ...]:
    """Kept for the locks that were wanted last: they are wanted again."""
    return tuple(mode.ahead(name, 0, "any" if says_task_id else ""))


def slot_of(limit: object) -> Mode:
    """One of `limit`. `ConfigError` unless that is a whole number from 1 on."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"a limit is how many may be in at once, a whole number from 1 on, not {limit!r}")
    return Mode("slot", limit)


def _newest(span: tuple[str, str], created: int, limit: int, *, keys_only: bool = False) -> Range:
    return Range(
        *span,
        limit=limit,
        sort="create",
        descending=True,
        keys_only=keys_only,
        max_create_revision=max(0, created - 1),
    )


def kind_of(name: str, key: str) -> Kind:
    """What the contender `key` is in the queue of `name`. Strangers are exclusive."""
    inside = key[len(name) + 1 :]
    return "read" if inside.startswith("read/") else "slot" if inside.startswith("slot/") else "write"


def keeping_out(mode: Mode, name: str, ahead: Iterable[KeyValue], task_id: str = "") -> tuple[KeyValue, ...]:
    """Whom a contender has to wait for, `ahead` being those with a lower create revision. Empty: it may go in.

    While all of them are there it cannot go in; when one goes, it should look again.
    """
    nearest = sorted(ahead, key=_created, reverse=True)
    for contender in nearest:
        if mode.kind == "write" or kind_of(name, contender.key) != mode.kind:
            return (contender,)
    if mode.kind == "slot":
        one_of_each = {contender.create_revision: contender for contender in nearest}
        if len(one_of_each) >= mode.limit:
            return tuple(one_of_each.values())[: mode.limit]
    return tuple(twin for twin in nearest if task_id and describe(twin).task_id == task_id)[:1]


def admitted(name: str, contenders: Iterable[KeyValue], limit: int = 1) -> frozenset[int]:
    """The create revisions of those who are in, `contenders` being all of the queue of `name`.

    For somebody who looks on. `limit` is that of its slots, which do not say it themselves.
    """
    inside: set[int] = set()
    ahead: list[KeyValue] = []
    twins: dict[str, list[KeyValue]] = {}
    for created, keys in groupby(sorted(contenders, key=_created), _created):
        same = list(keys)
        kind, task_id = kind_of(name, same[0].key), describe(same[0]).task_id
        mode = Mode(kind, limit if kind == "slot" else 0)
        if ahead and (kind == "write" or kind != kind_of(name, ahead[0].key)):
            break  # it is kept out, and keeps out all that come after it
        # Of readers behind none but readers only its twins matter: a queue of thousands is gone through once.
        nearest = twins.get(task_id, []) if kind == "read" else ahead[-2 * limit :] + twins.get(task_id, [])
        if not keeping_out(mode, name, nearest, task_id):
            inside.add(created)
        ahead += same
        if task_id:
            twins.setdefault(task_id, []).extend(same)
    return frozenset(inside)


def blamed(mode: Mode, name: str, found: Iterable[KeyValue], task_id: str = "") -> Description:
    """Whom to name as the one that keeps us out: a run of the same task, else who came first of those who do."""
    first = sorted(found, key=_created)
    outside = [each for each in first if mode.kind == "write" or kind_of(name, each.key) != mode.kind]
    twins = [each for each in first if task_id and describe(each).task_id == task_id]
    named = twins or outside or (first if mode.kind == "slot" else [])
    return describe(named[0]) if named else Description("")


def checked_name(name: object) -> str:
    """`name`, if a lock can have it. `ConfigError` otherwise."""
    if not isinstance(name, str) or not name.strip("/"):
        raise ConfigError(f"a lock's name is a non-empty string such as '/maintenance', not {name!r}")
    if name.endswith("/"):
        raise ConfigError(f"a lock's name does not end in '/': write {name.rstrip('/')!r} instead of {name!r}")
    return name


def contender_key(name: str, kind: Kind, lease: int, number: int) -> str:
    """The key of contender `number` (0 is the first) of `lease` in the queue of `name`."""
    return f"{name}/{kind}/{lease:x}" + (f"-{number}" if number else "")


def is_contender(key: str, lease: int) -> bool:
    """Whether `key` is a contender of `lease`, made by `contender_key`."""
    parts = key.rsplit("/", 2)
    return len(parts) == 3 and parts[1] in _KINDS and parts[2].partition("-")[0] == f"{lease:x}"


class Description(NamedTuple):
    """What a contender says of itself, as far as it says anything: strangers need not."""

    holder: str
    """For people: ``"worker-1 (pid 42) for shop.sync[3f2c…]"``."""
    since: str = ""
    task_id: str = ""
    nonce: str = ""
    task: str = ""


def value_of(*, host: str, pid: int, since: str, nonce: str, extra: Mapping[str, str | int] | None = None) -> bytes:
    """The value of a contender: who it is, as JSON. Short, because every acquire leaves one in etcd's history."""
    more = f",{_dump(extra)[1:-1]}" if extra else ""
    return f'{{"host":{_quoted(host)},"pid":{pid},"since":"{since}","nonce":"{nonce}"{more}}}'.encode()


_quoted = lru_cache(maxsize=8)(_dump)
"""As `_dump`, of a text that comes again."""


def describe(kv: KeyValue) -> Description:
    """Who the contender `kv` is. Values that are not ours, or no JSON at all, are "somebody else", never an error."""
    try:
        record = json.loads(kv.value)
    except ValueError:
        record = None
    if not isinstance(record, dict) or "host" not in record:
        lease = f"lease {kv.lease:x}" if kv.lease else "without a lease: it stays until somebody deletes it"
        return Description(f"another etcd client ({lease})")
    user = f"{record['user']}@" if record.get("user") else ""
    task = f"{record['task']}[{record.get('task_id', '')}]" if record.get("task") else record.get("for")
    purpose = f" for {task}" if task else ""
    return Description(
        f"{user}{record['host']} (pid {record.get('pid', '?')}){purpose}",
        since=str(record.get("since", "")),
        task_id=str(record.get("task_id", "")),
        nonce=str(record.get("nonce", "")),
        task=str(record.get("task", "")),
    )
