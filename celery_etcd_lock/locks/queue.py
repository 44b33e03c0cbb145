"""The queue of a lock: its contenders in the order in which they came, and who of them may go in.

A lock named ``NAME`` is the set of keys ``NAME/…``, in etcd's own recipe: everybody who wants it puts one key
there, under a lease, and the create revisions are the order. ``etcdctl lock NAME``, the server's Lock RPC and
Go's ``concurrency.Mutex`` do the same with ``NAME/<lease hex>``, so they stand in the same queue::

    NAME/write/694d9…       ours, exclusive; the first contender of that lease
    NAME/write/694d9…-1     another thread of the same session, at the same time
    NAME/694d9…             somebody else's, exclusive

Everything here is pure: it says what to ask etcd and what an answer means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from celery_etcd_lock.etcd.api import Compare, KeyValue, Range, prefix_end
from celery_etcd_lock.exceptions import ConfigError

__all__ = [
    "EXCLUSIVE",
    "Description",
    "checked_name",
    "contender_key",
    "describe",
    "first",
    "is_contender",
    "nearest_ahead",
    "nobody",
    "value_of",
]

EXCLUSIVE = "write"
_KINDS = frozenset({EXCLUSIVE, "read", "slot"})


def first(name: str) -> Range:
    """Asks who came first: the holder, of an exclusive lock."""
    return Range(name + "/", prefix_end(name + "/"), limit=1, sort="create")


def nearest_ahead(name: str, create_revision: int = 0, *, limit: int = 1) -> Range:
    """Asks for the nearest contender ahead of the one created at `create_revision` (0: the newest of all)."""
    return Range(
        name + "/",
        prefix_end(name + "/"),
        limit=limit,
        sort="create",
        descending=True,
        keys_only=True,
        max_create_revision=max(0, create_revision - 1),
    )


def checked_name(name: object) -> str:
    """`name`, if a lock can have it. `ConfigError` otherwise."""
    if not isinstance(name, str) or not name.strip("/"):
        raise ConfigError(f"a lock's name is a non-empty string such as '/maintenance', not {name!r}")
    if name.endswith("/"):
        raise ConfigError(f"a lock's name does not end in '/': write {name.rstrip('/')!r} instead of {name!r}")
    return name


def nobody(name: str) -> Compare:
    """The condition that the queue of `name` is empty."""
    return Compare(name + "/", "create", "==", 0, range_end=prefix_end(name + "/"))


def contender_key(name: str, kind: str, lease: int, number: int) -> str:
    """The key of contender `number` (0 is the first) of `lease` in the queue of `name`."""
    return f"{name}/{kind}/{lease:x}" + (f"-{number}" if number else "")


def is_contender(key: str, lease: int) -> bool:
    """Whether `key` is a contender of `lease`, made by `contender_key`."""
    parts = key.rsplit("/", 2)
    return len(parts) == 3 and parts[1] in _KINDS and parts[2].partition("-")[0] == f"{lease:x}"


@dataclass(frozen=True, slots=True)
class Description:
    """What a contender says of itself, as far as it says anything: strangers need not."""

    holder: str
    """For people: ``"worker-1 (pid 42) for shop.sync[3f2c…]"``."""
    since: str = ""
    task_id: str = ""
    nonce: str = ""


def value_of(*, host: str, pid: int, since: str, nonce: str, extra: Mapping[str, str | int] | None = None) -> bytes:
    """The value of a contender: who it is, as JSON. Short, because every acquire leaves one in etcd's history."""
    record = {"host": host, "pid": pid, "since": since, "nonce": nonce, **(extra or {})}
    return json.dumps(record, separators=(",", ":")).encode()


def describe(kv: KeyValue) -> Description:
    """Who the contender `kv` is. Values that are not ours, or no JSON at all, are "somebody else", never an error."""
    try:
        record = json.loads(kv.value)
    except ValueError:
        record = None
    if not isinstance(record, dict) or "host" not in record:
        lease = f"lease {kv.lease:x}" if kv.lease else "without a lease: it stays until somebody deletes it"
        return Description(f"another etcd client ({lease})")
    task = f" for {record['task']}[{record.get('task_id', '')}]" if record.get("task") else ""
    return Description(
        f"{record['host']} (pid {record.get('pid', '?')}){task}",
        since=str(record.get("since", "")),
        task_id=str(record.get("task_id", "")),
        nonce=str(record.get("nonce", "")),
    )
