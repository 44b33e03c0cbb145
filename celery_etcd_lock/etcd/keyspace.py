"""etcd's keys in memory: revisions, history, transactions. No clock, lock or thread: `memory` has those.

What is refused, in which order and in which words, and what a comparison says of keys that are not there, is
what etcd 3.5 does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from celery_etcd_lock.etcd.api import (
    Compare,
    Delete,
    DeleteReply,
    Event,
    Header,
    KeyValue,
    Operation,
    OperationReply,
    Put,
    PutReply,
    Range,
    RangeReply,
    Txn,
    TxnReply,
    Watch,
)
from celery_etcd_lock.exceptions import Compacted, EtcdRejected, LeaseNotFound

__all__ = ["Keyspace", "compacted", "no_lease", "wanted"]

_MAX_OPERATIONS = 128
_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_FIELDS = {"create": "create_revision", "mod": "mod_revision"}
_FROM_KEY_ON = b"\0"

_Keys: TypeAlias = dict[bytes, KeyValue]


class Keyspace:
    """The keys, at `revision` and at those before it that are not compacted. Not thread-safe."""

    def __init__(self) -> None:
        self.revision = 1
        self.raft_term = 2
        self.compacted = -1
        self.history: list[Event] = []
        """Every change since `compacted`, oldest first."""
        self._floor: _Keys = {}  # the keys as they were at `compacted`
        self._keys: _Keys = {}

    def header(self) -> Header:
        return Header(self.revision, self.raft_term, member_id=1, cluster_id=1)

    def attached(self, lease: int) -> list[str]:
        """The keys on that lease, in their order."""
        return [self._keys[key].key for key in sorted(self._keys) if self._keys[key].lease == lease]

    def compact(self, revision: int) -> None:
        """Forget what was before `revision`. `Compacted` if that is done already."""
        if revision <= self.compacted:
            raise compacted()
        self._floor = self._at(revision)
        self.history = [event for event in self.history if event.kv.mod_revision >= revision]
        self.compacted = revision

    def range(self, request: Range) -> RangeReply:
        _check_key(request.key)
        keys = self._keys if request.revision <= 0 else self._at(request.revision)
        found = _Span.of(request).find(keys)
        count = len(found)  # of the whole range: `max_create_revision` comes only afterwards
        if request.count_only:
            return RangeReply(self.header(), (), count)
        if request.max_create_revision:
            found = [kv for kv in found if kv.create_revision <= request.max_create_revision]
        if request.sort or request.descending:
            field = _FIELDS.get(request.sort or "key")
            found.sort(key=operator.attrgetter(field) if field else _order, reverse=request.descending)
        more = 0 < request.limit < len(found)
        if more:
            found = found[: request.limit]
        if request.keys_only:
            found = [kv._replace(value=b"") for kv in found]
        return RangeReply(self.header(), tuple(found), count, more)

    def delete(self, request: Delete) -> DeleteReply:
        _check_key(request.key)
        return self._delete(request, self.revision + 1)

    def delete_all(self, keys: Iterable[str]) -> None:
        """At one revision."""
        revision = self.revision + 1
        for key in keys:
            self._delete(Delete(key), revision)

    def txn(self, request: Txn, leases: Container[int]) -> TxnReply:
        """`leases` are those that exist; `LeaseNotFound` for a put on any other."""
        _check(request)
        succeeded = all(map(self._holds, request.compare))
        operations = request.success if succeeded else request.failure
        for put in operations:
            if isinstance(put, Put) and put.lease and put.lease not in leases:
                raise no_lease()
        for read in operations:
            if isinstance(read, Range):
                self._check_revision(read.revision)
        revision = self.revision + 1
        responses = [self._carry_out(operation, revision) for operation in operations]
        header = self.header()
        return TxnReply(header, succeeded, tuple(response._replace(header=header) for response in responses))

    def _carry_out(self, operation: Operation, revision: int) -> OperationReply:
        if isinstance(operation, Range):
            return self.range(operation)
        if isinstance(operation, Delete):
            return self._delete(operation, revision)
        old = self._keys.get(_encoded(operation.key))
        created, version = (old.create_revision, old.version + 1) if old else (revision, 1)
        kv = KeyValue(operation.key, operation.value, created, revision, version, operation.lease)
        self._record(Event("put", kv))
        return PutReply(self.header())

    def _delete(self, request: Delete, revision: int) -> DeleteReply:
        doomed = _Span.of(request).find(self._keys)
        for kv in doomed:
            self._record(Event("delete", _absent(kv.key, revision)))
        return DeleteReply(self.header(), len(doomed))

    def _record(self, event: Event) -> None:
        self.history.append(event)
        _play(self._keys, event)
        self.revision = event.kv.mod_revision

    def _holds(self, compare: Compare) -> bool:
        found = _Span.of(compare).find(self._keys)
        if compare.target == "value" and not found:
            return False  # not even "!=": what is not there has no value
        field = _FIELDS.get(compare.target, compare.target)
        holds = _OPERATORS[compare.operator]
        return all(holds(getattr(kv, field), compare.operand) for kv in found or [_absent(compare.key)])

    def _at(self, revision: int) -> _Keys:
        self._check_revision(revision)
        keys = dict(self._floor)
        for event in self.history:
            if event.kv.mod_revision > revision:
                break
            _play(keys, event)
        return keys

    def _check_revision(self, revision: int) -> None:
        if revision > self.revision:
            raise EtcdRejected("etcdserver: mvcc: required revision is a future revision", 11)
        if 0 < revision < self.compacted:
            raise compacted()


def wanted(request: Watch, events: Iterable[Event]) -> tuple[Event, ...]:
    """Those of `events` that a watch asks for. `EtcdRejected` if there can be none."""
    span = _Span.of(request)
    if span.empty:
        raise EtcdRejected("mvcc: watcher range is empty", 3)
    return tuple(
        event
        for event in events
        if (event.kind == "delete" or not request.deletes_only)
        and event.kv.mod_revision >= request.start_revision
        and span.holds(_encoded(event.kv.key))
    )


def compacted() -> Compacted:
    return Compacted("etcdserver: mvcc: required revision has been compacted", 11)


def no_lease() -> LeaseNotFound:
    return LeaseNotFound("etcdserver: requested lease not found", 5)


class _Span(NamedTuple):
    """The keys a request names: `start` alone, or from there to before `end`, in the order of their bytes."""

    start: bytes
    end: bytes | None

    @classmethod
    def of(cls, request: Range | Delete | Compare | Watch) -> _Span:
        return cls(_encoded(request.key), _encoded(request.range_end) if request.range_end else None)

    @property
    def empty(self) -> bool:
        return self.end is not None and self.end != _FROM_KEY_ON and self.end <= self.start

    def holds(self, key: bytes) -> bool:
        if self.end is None:
            return key == self.start
        return key >= self.start and (self.end == _FROM_KEY_ON or key < self.end)

    def find(self, keys: _Keys) -> list[KeyValue]:
        if self.end is None:
            return [keys[self.start]] if self.start in keys else []
        return [keys[key] for key in sorted(filter(self.holds, keys))]


def _encoded(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _order(kv: KeyValue) -> bytes:
    return _encoded(kv.key)


def _absent(key: str, revision: int = 0) -> KeyValue:
    """A key that is not there; deleted at `revision`."""
    return KeyValue(key, b"", 0, revision, 0)


def _play(keys: _Keys, event: Event) -> None:
    if event.kind == "put":
        keys[_encoded(event.kv.key)] = event.kv
    else:
        keys.pop(_encoded(event.kv.key), None)


def _check(request: Txn) -> None:
    """What is refused before any key is looked at."""
    if max(len(request.compare), len(request.success), len(request.failure)) > _MAX_OPERATIONS:
        raise EtcdRejected("etcdserver: too many operations in txn request", 3)
    for named in (*request.compare, *request.success, *request.failure):
        _check_key(named.key)
    for compare in request.compare:
        if isinstance(compare.operand, bytes) != (compare.target == "value"):
            raise TypeError(f"a {compare.target} is not to be compared with {compare.operand!r}")
    if any(map(_collide, (request.success, request.failure))):
        raise EtcdRejected("etcdserver: duplicate key given in txn request", 3)


def _collide(operations: Sequence[Operation]) -> bool:
    """Whether a key is put twice, or put and deleted."""
    puts = [_encoded(put.key) for put in operations if isinstance(put, Put)]
    deletes = [_Span.of(delete) for delete in operations if isinstance(delete, Delete)]
    # a delete "from the key on" slips through this check of etcd's
    deleted = any(span.holds(key) for key in puts for span in deletes if span.end != _FROM_KEY_ON)
    return deleted or len(set(puts)) < len(puts)


def _check_key(key: str) -> None:
    if not key:
        raise EtcdRejected("etcdserver: key is not provided", 3)
