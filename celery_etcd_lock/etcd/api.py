"""etcd v3 as a handful of verbs: the `Transport` protocol and the frozen values it takes and returns.

Nothing here opens a socket, and nothing here knows what a lock is. `gateway` and `memory` implement the
protocol; `tests/contract` holds both to the same behaviour.

The rules every transport keeps:

* ``timeout`` is in seconds and bounds the whole call, over all endpoints and attempts; None means the
  transport's own default.
* A call returns etcd's reply, or raises: `EtcdUnavailable` when no member answered in time (its
  `unanswered` says whether the request may still be carried out), `EtcdRejected` or one of its kinds when
  etcd said no, `NoSpace` when the quota is reached.
* A call may be tried again on another endpoint. So it may be carried out twice, or long after it returned:
  whoever sends a write must make it conditional. `Header.unanswered` on a reply says that an earlier
  attempt of the same call is still without an answer.
* Nothing survives a fork: used in a child, a transport starts over with connections of its own.
* Keys are text. Bytes that are no UTF-8 (somebody else's key) come as surrogate escapes, and go back the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, overload

__all__ = [
    "TLS",
    "Compare",
    "Delete",
    "DeleteReply",
    "Event",
    "Header",
    "KeyValue",
    "LeaseKeys",
    "LeaseReply",
    "Put",
    "PutReply",
    "Range",
    "RangeReply",
    "Replies",
    "Status",
    "Transport",
    "Txn",
    "TxnReply",
    "Watch",
    "WatchReply",
    "WatchStream",
    "created_at",
    "prefix_end",
]


class Header(NamedTuple):
    """What every reply says of the member that gave it."""

    revision: int
    raft_term: int
    member_id: int = 0
    cluster_id: int = 0
    unanswered: bool = False
    """An earlier attempt of this call got no answer: it may still be carried out."""


class KeyValue(NamedTuple):
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


class Compare(NamedTuple):
    """One condition of a transaction, on one key or (`range_end`) on every key of ``[key, range_end)``.

    Over an empty range a number compares as 0, as it does for a key that does not exist.
    """

    key: str
    target: Literal["create", "mod", "version", "lease", "value"]
    operator: Literal["==", "!=", "<", ">"]
    operand: int | bytes
    range_end: str | None = None


class Range(NamedTuple):
    """Read one key, or the keys of ``[key, range_end)``. `limit` 0: all of them."""

    key: str
    range_end: str | None = None
    limit: int = 0
    revision: int = 0
    sort: Literal["key", "create", "mod"] | None = None
    descending: bool = False
    keys_only: bool = False
    count_only: bool = False
    max_create_revision: int = 0


class Put(NamedTuple):
    key: str
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    key: str
    range_end: str | None = None


Operation: TypeAlias = "Range | Put | Delete"


class Txn(NamedTuple):
    """If every comparison holds do `success`, in order, else `failure`; all at one revision."""

    compare: Sequence[Compare]
    success: Sequence[Operation]
    failure: Sequence[Operation] = ()


class RangeReply(NamedTuple):
    header: Header
    kvs: tuple[KeyValue, ...]
    count: int  # type: ignore[assignment]  # instead of tuple's
    """Keys in the range; larger than ``len(kvs)`` under a limit."""
    more: bool = False


class PutReply(NamedTuple):
    header: Header


class DeleteReply(NamedTuple):
    header: Header
    deleted: int


OperationReply: TypeAlias = "RangeReply | PutReply | DeleteReply"


class Replies(Sequence["OperationReply"]):
    """Replies that are made when they are looked at: of most transactions it is enough to know that they were done."""

    def __init__(self, raw: Sequence[Any], made: Callable[[Any], OperationReply]) -> None:
        self._raw = raw
        self._made = made

    @overload
    def __getitem__(self, index: int) -> OperationReply: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[OperationReply]: ...
    def __getitem__(self, index: int | slice) -> OperationReply | Sequence[OperationReply]:
        found = self._raw[index]
        return list(map(self._made, found)) if isinstance(index, slice) else self._made(found)

    def __len__(self) -> int:
        return len(self._raw)

    def __reduce__(self) -> tuple[type[tuple[OperationReply, ...]], tuple[tuple[OperationReply, ...]]]:
        return tuple, (tuple(self),)  # to another process, see `apart`


class TxnReply(NamedTuple):
    header: Header
    succeeded: bool
    responses: Sequence[OperationReply]
    """One for each operation of the branch that ran, in its order."""

    def range(self, index: int) -> RangeReply:
        """The reply to the operation at `index`, which was a `Range`."""
        reply = self.responses[index]
        assert isinstance(reply, RangeReply)
        return reply


class LeaseReply(NamedTuple):
    header: Header
    lease: int
    ttl: int
    """Seconds, as the server granted them; 0 in answer to a renewal: there is no such lease any more."""


class LeaseKeys(NamedTuple):
    header: Header
    lease: int
    ttl: int
    """Seconds left; -1: there is no such lease."""
    granted_ttl: int
    keys: tuple[str, ...] = ()


class Status(NamedTuple):
    """One member's own word about itself."""

    endpoint: str
    version: str
    db_size: int
    """Bytes on disk."""
    db_size_in_use: int
    leader: int
    raft_term: int
    member_id: int
    revision: int
    errors: tuple[str, ...] = ()
    """What ails it: alarms, as ``alarm:NOSPACE``, and that it has no leader."""
    db_size_quota: int = 0
    """Bytes at which it takes no more writes; 0: it does not say (before 3.6 none does)."""


class Watch(NamedTuple):
    """Changes of one key, or of ``[key, range_end)``, from `start_revision` on (0: from now)."""

    key: str
    range_end: str | None = None
    start_revision: int = 0
    deletes_only: bool = False


class Event(NamedTuple):
    kind: Literal["put", "delete"]
    kv: KeyValue
    """Of a delete: the key, and as `mod_revision` the revision of the deletion."""


class WatchReply(NamedTuple):
    header: Header
    events: tuple[Event, ...]
    """Empty: the server confirms that it watches, or only that it is there."""


class WatchStream(Protocol):
    """A watch under way. Iterate it in one thread; close it from any.

    Iterating connects at the first step, ends quietly after `close`, and raises `EtcdUnavailable` when the
    stream breaks and `Compacted` when `start_revision` is gone. It does not resume: whoever reads it knows
    from which revision to go on. The first reply has no events: from there on nothing is missed.
    """

    def __iter__(self) -> Iterator[WatchReply]: ...

    def close(self) -> None:
        """End the iteration, at once, from any thread. Never raises."""


class TLS(NamedTuple):
    """Files, as paths. `ca_certs` None: the system's; `cert_reqs` as in Celery's ``redis_backend_use_ssl``."""

    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    cert_reqs: Literal["required", "optional", "none"] = "required"


class Transport(Protocol):
    """A connection to one etcd cluster, shared by all threads of a process."""

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The URLs, as given, for messages."""

    def range(self, request: Range, *, timeout: float | None = None) -> RangeReply: ...

    def txn(self, request: Txn, *, timeout: float | None = None) -> TxnReply: ...

    def delete(self, request: Delete, *, timeout: float | None = None) -> DeleteReply: ...

    def lease_grant(self, ttl: int, *, timeout: float | None = None) -> LeaseReply: ...

    def lease_renew(self, lease: int, *, timeout: float | None = None) -> LeaseReply:
        """Start the lease's time anew. A lease that is gone is a reply with ``ttl == 0``, not an error."""

    def lease_revoke(self, lease: int, *, timeout: float | None = None) -> None:
        """End the lease, and with it its keys. `LeaseNotFound` if there is none."""

    def lease_time_to_live(self, lease: int, *, keys: bool = False, timeout: float | None = None) -> LeaseKeys: ...

    def watch(self, request: Watch) -> WatchStream: ...

    def status(self, *, timeout: float | None = None) -> tuple[Status, ...]:
        """Of every member that answers. `EtcdUnavailable` if none does."""

    def close(self) -> None:
        """Close connections and watches. Safe to call twice, and in a forked child."""


def prefix_end(prefix: str) -> str:
    """The end of the range that holds every key which begins with `prefix` (ASCII at its end, not empty)."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def created_at(key: str, revision: int) -> Compare:
    """The condition that `key` is the very key created at `revision` (0: that it does not exist)."""
    return Compare(key, "create", "==", revision)
