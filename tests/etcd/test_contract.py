"""What every transport does, whatever it is made of: one suite, run on each of them."""

from __future__ import annotations

import json
import queue
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from celery_etcd_lock.etcd import Transport, gateway_codec, grpc_messages
from celery_etcd_lock.etcd.api import (
    Compare,
    Delete,
    DeleteReply,
    Event,
    KeyValue,
    Operation,
    Put,
    PutReply,
    Range,
    RangeReply,
    Txn,
    TxnReply,
    Watch,
    WatchReply,
    created_at,
    prefix_end,
)
from celery_etcd_lock.etcd.gateway import GatewayTransport
from celery_etcd_lock.etcd.grpc import GrpcTransport
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.exceptions import Compacted, ConfigError, EtcdLockError, EtcdRejected, LeaseNotFound
from tests.servers import skip_or_fail

NO_SUCH_LEASE = 0x1234_5678_9ABC_DEF0


@dataclass
class Store:
    """A transport, its own part of the keys, and what clients have no verb for."""

    transport: Transport
    prefix: str
    compact: Callable[[int], None]

    def key(self, name: str) -> str:
        return self.prefix + name

    @property
    def all(self) -> tuple[str, str]:
        return self.prefix, prefix_end(self.prefix)

    def put(self, name: str, value: bytes = b"", lease: int = 0) -> int:
        """The revision at which it was put."""
        return self.do(Put(self.key(name), value, lease)).header.revision

    def do(self, *operations: Operation) -> TxnReply:
        return self.transport.txn(Txn([], operations))

    def get(self, name: str) -> KeyValue | None:
        kvs = self.transport.range(Range(self.key(name))).kvs
        return kvs[0] if kvs else None

    def names(self, **options: Any) -> list[str]:
        return [kv.key.removeprefix(self.prefix) for kv in self.transport.range(Range(*self.all, **options)).kvs]

    def holds(self, *compare: Compare) -> bool:
        return self.transport.txn(Txn(compare, [])).succeeded


@pytest.fixture(params=["gateway", "memory", "grpc"])
def store(request: pytest.FixtureRequest, prefix: str) -> Iterator[Store]:
    if request.param == "memory":
        memory = MemoryEtcd()
        transport: Transport = MemoryTransport(memory)
        compact: Callable[[int], None] = memory.compact
    else:
        url = request.getfixturevalue("etcd").url
        transport = grpc_transport([url]) if request.param == "grpc" else GatewayTransport([url])
        compact = compacting(url)

    yield Store(transport, prefix, compact)
    transport.close()


def compacting(url: str) -> Callable[[int], None]:
    """What compacts the etcd there."""

    def compact(revision: int) -> None:
        body = json.dumps({"revision": revision, "physical": True}).encode()
        urllib.request.urlopen(url + "/v3/kv/compaction", data=body, timeout=20).close()

    return compact


def grpc_transport(urls: list[str]) -> Transport:
    try:
        return GrpcTransport(urls)
    except ConfigError as missing:
        skip_or_fail(missing)


class Reader:
    """A watch, read in a thread as users of it do."""

    def __init__(self, transport: Transport, request: Watch) -> None:
        self.stream = transport.watch(request)
        self._replies: queue.Queue[WatchReply | EtcdLockError | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for reply in self.stream:
                self._replies.put(reply)
            self._replies.put(None)
        except EtcdLockError as error:
            self._replies.put(error)

    def next(self) -> WatchReply | None:
        """The next reply; None at the quiet end."""
        reply = self._replies.get(timeout=20)
        if isinstance(reply, EtcdLockError):
            raise reply
        return reply

    def reply(self) -> WatchReply:
        reply = self.next()
        assert reply
        return reply

    def events(self, count: int) -> list[Event]:
        """At least `count` further events."""
        found: list[Event] = []
        while len(found) < count:
            found += self.reply().events
        return found

    def end(self) -> None:
        """Close the stream; whatever else comes before its quiet end is lost."""
        self.stream.close()
        while self.next() is not None:
            pass
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def watch(store: Store) -> Iterator[Callable[..., Reader]]:
    """Starts a reader of `[name, …)`, and waits until the server confirms the watch."""
    readers = []

    def start(request: Watch) -> Reader:
        reader = Reader(store.transport, request)
        readers.append(reader)
        assert reader.reply().events == ()
        return reader

    yield start
    for reader in readers:
        reader.stream.close()
        reader._thread.join(20)


# -- keys and revisions


def test_a_key_knows_when_it_was_created_and_changed(store: Store) -> None:
    """A put creates at version 1 and keeps the create revision; after a delete it all starts again."""
    first = store.put("a", b"1")
    assert store.get("a") == KeyValue(store.key("a"), b"1", first, first, 1)
    second = store.put("a", b"2")
    assert second == first + 1
    assert store.get("a") == KeyValue(store.key("a"), b"2", first, second, 2)
    deleted = store.transport.delete(Delete(store.key("a")))
    assert (deleted.deleted, deleted.header.revision) == (1, second + 1)
    assert store.get("a") is None
    third = store.put("a")
    assert store.get("a") == KeyValue(store.key("a"), b"", third, third, 1)


def test_only_changes_move_the_revision(store: Store) -> None:
    """Reads, failed conditions and deletes of nothing leave the revision where it is; the term stands still."""
    put = store.do(Put(store.key("a"), b""))
    headers = [
        store.transport.range(Range(store.key("a"))).header,
        store.transport.delete(Delete(store.key("b"))).header,
        store.transport.txn(Txn([created_at(store.key("a"), 0)], [Put(store.key("a"), b"x")])).header,
        store.transport.lease_grant(60).header,
    ]
    assert set(headers) == {put.header}
    assert put.header.raft_term > 0
    assert not put.header.unanswered


@pytest.mark.parametrize("name", ["ü/ß/☃", "a b%2F", "\udcff\udcfe", "\udc80x", "\x00", '"\\\n', "a\0b"])
def test_keys_of_any_bytes(store: Store, name: str) -> None:
    """Any key comes back as it went, be it no UTF-8, and so it does from ranges and leases."""
    lease = store.transport.lease_grant(60).lease
    store.put(name, b"v", lease)
    found = store.get(name)
    assert found
    assert (found.key, found.value, found.lease) == (store.key(name), b"v", lease)
    assert store.names() == [name]
    assert store.transport.lease_time_to_live(lease, keys=True).keys == (store.key(name),)
    assert store.transport.delete(Delete(*store.all)).deleted == 1


@pytest.mark.parametrize("value", [b"", b"\x00\xff\n", bytes(range(256)) * 2_000])
def test_values_of_any_bytes(store: Store, value: bytes) -> None:
    """A value comes back as it went: empty, binary, half a megabyte."""
    store.put("a", value)
    found = store.get("a")
    assert found
    assert found.value == value


def test_an_empty_key_is_refused(store: Store) -> None:
    """There is no empty key."""
    with pytest.raises(EtcdRejected, match="key is not provided") as error:
        store.transport.range(Range(""))
    assert error.value.code == 3


# -- ranges


def test_a_range_is_half_open_and_in_the_order_of_bytes(store: Store) -> None:
    """``[key, range_end)``, sorted by key; of an end that is not behind its start there is nothing."""
    for name in ("b", "a", "ab", "c"):
        store.put(name)
    assert store.names() == ["a", "ab", "b", "c"]
    found = store.transport.range(Range(store.key("a"), store.key("b")))
    assert [kv.key for kv in found.kvs] == [store.key("a"), store.key("ab")]
    assert (found.count, found.more) == (2, False)
    assert store.transport.range(Range(store.key("b"), store.key("a"))).kvs == ()
    assert store.transport.range(Range(store.key("none"))) == RangeReply(found.header, (), 0)


def test_sorted_by_create_or_mod_revision_with_a_limit(store: Store) -> None:
    """Sorting comes before the limit, in both directions."""
    for name in ("c", "a", "b"):
        store.put(name)
    store.put("c")
    assert store.names(sort="create") == ["c", "a", "b"]
    assert store.names(sort="create", descending=True) == ["b", "a", "c"]
    assert store.names(sort="mod") == ["a", "b", "c"]
    assert store.names(sort="mod", descending=True) == ["c", "b", "a"]
    assert store.names(sort="key", descending=True) == ["c", "b", "a"]
    assert store.names(sort="create", limit=1) == ["c"]
    assert store.names(sort="create", descending=True, limit=2) == ["b", "a"]


def test_what_was_created_up_to_a_revision(store: Store) -> None:
    """`max_create_revision` leaves out what came later; with sort and limit that is the nearest before it."""
    store.put("c")
    second = store.put("a")
    store.put("b")
    store.put("c", b"changed later")
    assert store.names(max_create_revision=second) == ["a", "c"]
    assert store.names(max_create_revision=second, sort="create", descending=True, limit=1) == ["a"]


def test_count_and_more(store: Store) -> None:
    """Under a limit `count` is still that of the whole range, and `more` says that there is more."""
    for name in ("a", "b", "c"):
        store.put(name, b"v")
    reply = store.transport.range(Range(*store.all, limit=2))
    assert (len(reply.kvs), reply.count, reply.more) == (2, 3, True)
    reply = store.transport.range(Range(*store.all, limit=3))
    assert (len(reply.kvs), reply.count, reply.more) == (3, 3, False)
    reply = store.transport.range(Range(*store.all, count_only=True))
    assert (reply.kvs, reply.count) == ((), 3)


def test_keys_only(store: Store) -> None:
    """`keys_only` leaves out the values and nothing else."""
    revision = store.put("a", b"v")
    (kv,) = store.transport.range(Range(*store.all, keys_only=True)).kvs
    assert kv == KeyValue(store.key("a"), b"", revision, revision, 1)


def test_a_range_of_the_past(store: Store) -> None:
    """`revision` reads what was then; of the future there is nothing to read."""
    first = store.put("a", b"1")
    second = store.put("a", b"2")
    store.transport.delete(Delete(store.key("a")))
    (kv,) = store.transport.range(Range(store.key("a"), revision=first)).kvs
    assert kv.value == b"1"
    (kv,) = store.transport.range(Range(store.key("a"), revision=second)).kvs
    assert kv.value == b"2"
    with pytest.raises(EtcdRejected, match="future revision"):
        store.transport.range(Range(store.key("a"), revision=second + 1_000_000))


def test_a_range_of_the_compacted_past(store: Store) -> None:
    """What is compacted away is `Compacted`."""
    first = store.put("a", b"1")
    second = store.put("a", b"2")
    store.compact(second)
    with pytest.raises(Compacted):
        store.transport.range(Range(store.key("a"), revision=first))
    assert store.names(revision=second) == ["a"]


def test_deleting_a_range(store: Store) -> None:
    """All of the range goes, at one revision, and nothing else."""
    for name in ("a", "b", "c"):
        last = store.put(name)
    reply = store.transport.delete(Delete(store.key("a"), store.key("c")))
    assert (reply.deleted, reply.header.revision) == (2, last + 1)
    assert store.names() == ["c"]


# -- transactions


def test_a_transaction_takes_one_branch(store: Store) -> None:
    """`success` if every comparison holds, else `failure`; one reply for each operation, in its order."""
    key, other = store.key("a"), store.key("b")
    txn = Txn(
        [created_at(key, 0)],
        [Put(key, b"1"), Range(key), Delete(other)],
        [Range(*store.all), Delete(key), Range(key)],
    )
    store.put("b")
    done = store.transport.txn(txn)
    revision = done.header.revision
    assert done.succeeded
    assert tuple(done.responses) == (
        PutReply(done.header),
        RangeReply(done.header, (KeyValue(key, b"1", revision, revision, 1),), 1),
        DeleteReply(done.header, 1),
    )
    assert done.range(1).kvs[0].mod_revision == revision
    done = store.transport.txn(txn)
    assert not done.succeeded
    assert done.header.revision == revision + 1
    assert [kv.key for kv in done.range(0).kvs] == [key]
    assert tuple(done.responses)[1:] == (DeleteReply(done.header, 1), RangeReply(done.header, (), 0))


def test_a_transaction_is_one_revision(store: Store) -> None:
    """Everything in it happens at once: the keys share their revision."""
    revision = store.do(Put(store.key("a"), b""), Put(store.key("b"), b"")).header.revision
    assert {kv.create_revision for kv in store.transport.range(Range(*store.all)).kvs} == {revision}


def test_every_comparison_must_hold(store: Store) -> None:
    """One that fails is enough for the other branch; none at all is success."""
    first = store.put("a", b"1")
    holds, fails = created_at(store.key("a"), first), created_at(store.key("b"), 1)
    assert store.holds()
    assert store.holds(holds, created_at(store.key("b"), 0))
    assert not store.holds(holds, fails)
    assert not store.holds(fails, holds)


@pytest.mark.parametrize("target", ["create", "mod", "version", "lease"])
@pytest.mark.parametrize("operator", ["==", "!=", "<", ">"])
def test_every_number_with_every_operator(
    store: Store,
    target: Literal["create", "mod", "version", "lease"],
    operator: Literal["==", "!=", "<", ">"],
) -> None:
    """A key's number is on the left of the operator."""
    lease = store.transport.lease_grant(60).lease
    created = store.put("a", b"")
    changed = store.put("a", b"", lease)
    actual = {"create": created, "mod": changed, "version": 2, "lease": lease}[target]
    for operand in (actual - 1, actual, actual + 1):
        expected = {
            "==": actual == operand,
            "!=": actual != operand,
            "<": actual < operand,
            ">": actual > operand,
        }[operator]
        assert store.holds(Compare(store.key("a"), target, operator, operand)) is expected, operand


def test_values_compare_as_bytes(store: Store) -> None:
    """Equal, different, smaller and larger; but a key that does not exist has no value, not even a different one."""
    store.put("a", b"m")
    key = store.key("a")
    assert store.holds(Compare(key, "value", "==", b"m"))
    assert store.holds(Compare(key, "value", "!=", b"mm"))
    assert store.holds(Compare(key, "value", "<", b"ma"))
    assert store.holds(Compare(key, "value", ">", b""))
    assert not store.holds(Compare(key, "value", ">", b"\xff"))
    missing = store.key("none")
    assert not store.holds(Compare(missing, "value", "==", b""))
    assert not store.holds(Compare(missing, "value", "!=", b"x"))


@pytest.mark.parametrize("target", ["create", "mod", "version", "lease"])
def test_what_does_not_exist_compares_as_zero(
    store: Store, target: Literal["create", "mod", "version", "lease"]
) -> None:
    """A missing key and an empty range alike."""
    for end in (None, store.key("b")):
        key = store.key("a")
        assert store.holds(Compare(key, target, "==", 0, end))
        assert not store.holds(Compare(key, target, "!=", 0, end))
        assert not store.holds(Compare(key, target, ">", 0, end))
        assert store.holds(Compare(key, target, "<", 1, end))


def test_a_comparison_over_a_range_is_of_every_key_in_it(store: Store) -> None:
    """All the keys must satisfy it, not one of them."""
    first = store.put("a", b"x")
    second = store.put("b", b"x")
    assert not store.holds(Compare(*_over(store, "create", "==", 0)))
    assert store.holds(Compare(*_over(store, "create", ">", 0)))
    assert store.holds(Compare(*_over(store, "create", "<", second + 1)))
    assert not store.holds(Compare(*_over(store, "create", "<", second)))
    assert not store.holds(Compare(*_over(store, "create", "==", first)))
    assert store.holds(Compare(*_over(store, "value", "==", b"x")))
    store.put("b", b"y")
    assert not store.holds(Compare(*_over(store, "value", "==", b"x")))


def _over(store: Store, target: Any, operator: Any, operand: Any) -> tuple[str, Any, Any, Any, str]:
    start, end = store.all
    return start, target, operator, operand, end


def test_a_try_lock_by_range(store: Store) -> None:
    """The condition that a range holds no key lets exactly one of two in."""
    free = Compare(*_over(store, "create", "==", 0))
    assert store.transport.txn(Txn([free], [Put(store.key("a"), b"")])).succeeded
    assert not store.transport.txn(Txn([free], [Put(store.key("b"), b"")])).succeeded
    assert store.names() == ["a"]


def test_two_puts_of_one_key_are_refused(store: Store) -> None:
    """A transaction changes a key once: two puts, or a put and a delete, of one key are no transaction."""
    put = Put(store.key("a"), b"")
    for operations in ([put, put], [put, Delete(store.key("a"))], [Delete(*store.all), put]):
        with pytest.raises(EtcdRejected, match="duplicate key given in txn request") as error:
            store.do(*operations)
        assert error.value.code == 3
    assert store.names() == []
    assert store.transport.txn(Txn([], [put], [put])).succeeded


# -- leases


def test_a_lease_is_granted_renewed_and_ended(store: Store) -> None:
    """The TTL is the server's word; a renewal starts it anew; of a lease that is gone a renewal says 0."""
    granted = store.transport.lease_grant(60)
    assert granted.lease > 0
    assert granted.ttl == 60
    renewed = store.transport.lease_renew(granted.lease)
    assert (renewed.lease, renewed.ttl) == (granted.lease, 60)
    store.transport.lease_revoke(granted.lease)
    assert store.transport.lease_renew(granted.lease).ttl == 0
    with pytest.raises(LeaseNotFound):
        store.transport.lease_revoke(granted.lease)


def test_what_is_left_of_a_lease(store: Store) -> None:
    """Seconds left, seconds granted, and its keys in order if they are asked for."""
    lease = store.transport.lease_grant(60).lease
    store.put("b", b"", lease)
    store.put("a", b"", lease)
    known = store.transport.lease_time_to_live(lease)
    assert (known.lease, known.granted_ttl, known.keys) == (lease, 60, ())
    assert 50 <= known.ttl <= 60
    assert sorted(store.transport.lease_time_to_live(lease, keys=True).keys) == [store.key("a"), store.key("b")]
    unknown = store.transport.lease_time_to_live(NO_SUCH_LEASE, keys=True)
    assert (unknown.lease, unknown.ttl, unknown.keys) == (NO_SUCH_LEASE, -1, ())


def test_a_put_takes_the_key_to_another_lease(store: Store) -> None:
    """A key hangs on the lease of its last put, or on none."""
    one, two = (store.transport.lease_grant(60).lease for _ in range(2))
    store.put("a", b"", one)
    store.put("b", b"", one)
    store.put("a", b"", two)
    store.put("b", b"")
    assert store.transport.lease_time_to_live(one, keys=True).keys == ()
    store.transport.lease_revoke(one)
    assert store.names() == ["a", "b"]
    store.transport.lease_revoke(two)
    assert store.names() == ["b"]


def test_a_put_on_a_lease_that_is_not_there(store: Store) -> None:
    """`LeaseNotFound`, and nothing of the transaction is done."""
    store.put("a", b"before")
    with pytest.raises(LeaseNotFound) as error:
        store.do(Delete(store.key("a")), Put(store.key("b"), b"", NO_SUCH_LEASE))
    assert error.value.code == 5
    assert store.names() == ["a"]


def test_a_lease_ends_with_its_keys(store: Store) -> None:
    """Not renewed, it is gone soon after its TTL, and its keys with it: renewals say 0, time-to-live -1."""
    granted = store.transport.lease_grant(1)
    store.put("a", b"", granted.lease)
    assert store.names() == ["a"]
    deadline = time.monotonic() + granted.ttl + 20
    while store.names():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert store.transport.lease_renew(granted.lease).ttl == 0
    assert store.transport.lease_time_to_live(granted.lease, keys=True).ttl == -1


def test_a_lease_that_is_renewed_lives_on(store: Store) -> None:
    """Renewed in time, it and its key outlive the first TTL."""
    granted = store.transport.lease_grant(2)
    store.put("a", b"", granted.lease)
    end = time.monotonic() + granted.ttl * 1.75
    while time.monotonic() < end:
        assert store.transport.lease_renew(granted.lease).ttl == granted.ttl
        time.sleep(granted.ttl / 5)
    assert store.names() == ["a"]
    store.transport.lease_revoke(granted.lease)


def test_a_ttl_beyond_reason_is_refused(store: Store) -> None:
    """The server has its limits."""
    with pytest.raises(EtcdRejected, match="too large lease TTL"):
        store.transport.lease_grant(10_000_000_000)


# -- watches


def test_a_watch_tells_puts_and_deletes(store: Store, watch: Callable[[Watch], Reader]) -> None:
    """Each change once and in order, with its revisions; of a delete the key and when."""
    reader = watch(Watch(store.key("a")))
    first = store.put("a", b"1")
    second = store.put("a", b"2")
    store.put("b")
    store.transport.delete(Delete(store.key("a")))
    assert reader.events(3) == [
        Event("put", KeyValue(store.key("a"), b"1", first, first, 1)),
        Event("put", KeyValue(store.key("a"), b"2", first, second, 2)),
        Event("delete", KeyValue(store.key("a"), b"", 0, second + 2, 0)),
    ]
    reader.end()


def test_a_watch_of_a_range(store: Store, watch: Callable[[Watch], Reader]) -> None:
    """Every key in it and none outside."""
    reader = watch(Watch(store.key("a"), store.key("c")))
    for name in ("c", "b", "a", "ab"):
        store.put(name)
    assert [event.kv.key for event in reader.events(3)] == [store.key(name) for name in ("b", "a", "ab")]
    reader.end()


def test_a_watch_from_the_past(store: Store, watch: Callable[[Watch], Reader]) -> None:
    """From `start_revision` on nothing is missed, then come the news."""
    store.put("a", b"0")
    first = store.put("a", b"1")
    store.put("a", b"2")
    reader = watch(Watch(store.key("a"), start_revision=first))
    store.put("a", b"3")
    assert [event.kv.value for event in reader.events(3)] == [b"1", b"2", b"3"]
    reader.end()


def test_a_watch_from_the_future(store: Store, watch: Callable[[Watch], Reader]) -> None:
    """What happens before `start_revision` is not told."""
    now = store.put("b")
    reader = watch(Watch(store.key("a"), start_revision=now + 2))
    store.put("a", b"too early")
    store.put("a", b"told")
    assert [event.kv.value for event in reader.events(1)] == [b"told"]
    reader.end()


def test_a_watch_for_deletes(store: Store, watch: Callable[[Watch], Reader]) -> None:
    """`deletes_only` leaves out the puts, of the past as of the present."""
    first = store.put("a")
    reader = watch(Watch(*store.all, start_revision=first, deletes_only=True))
    store.put("b")
    store.transport.delete(Delete(store.key("a")))
    (event,) = reader.events(1)
    assert (event.kind, event.kv.key) == ("delete", store.key("a"))
    reader.end()


def test_a_watch_tells_a_transaction_as_one(store: Store, watch: Callable[[Watch], Reader]) -> None:
    """Its changes come together, at one revision."""
    reader = watch(Watch(*store.all))
    revision = store.do(Put(store.key("a"), b""), Put(store.key("b"), b"")).header.revision
    reply = reader.reply()
    assert [event.kv.mod_revision for event in reply.events] == [revision, revision]
    assert reply.header.revision >= revision
    reader.end()


def test_a_revoked_lease_is_watched(store: Store, watch: Callable[[Watch], Reader]) -> None:
    """A revocation deletes each of the lease's keys once, all at one revision."""
    lease = store.transport.lease_grant(60).lease
    store.put("a", b"", lease)
    store.put("b", b"", lease)
    kept = store.put("c")
    reader = watch(Watch(*store.all))
    store.transport.lease_revoke(lease)
    events = reader.events(2)
    assert sorted(event.kv.key for event in events) == [store.key("a"), store.key("b")]
    assert {(event.kind, event.kv.mod_revision) for event in events} == {("delete", kept + 1)}
    assert store.names() == ["c"]
    reader.end()


def test_an_expired_lease_is_watched(store: Store, watch: Callable[[Watch], Reader]) -> None:
    """Who watches a key learns of its lease's end without asking."""
    lease = store.transport.lease_grant(1).lease
    store.put("a", b"", lease)
    reader = watch(Watch(store.key("a"), deletes_only=True))
    (event,) = reader.events(1)
    assert event.kind == "delete"
    reader.end()


def test_a_watch_from_the_compacted_past(store: Store) -> None:
    """`Compacted`, not silence and not a gap; at the compacted revision itself it still works."""
    first = store.put("a", b"1")
    second = store.put("a", b"2")
    store.compact(second)
    reader = Reader(store.transport, Watch(store.key("a"), start_revision=first))
    with pytest.raises(Compacted):
        reader.events(1)
    reader = Reader(store.transport, Watch(store.key("a"), start_revision=second))
    assert [event.kv.value for event in reader.events(1)] == [b"2"]
    reader.end()


def test_closing_a_watch_from_another_thread(store: Store, watch: Callable[[Watch], Reader]) -> None:
    """`close` ends a read that waits, at once and quietly, and may be called again."""
    reader = watch(Watch(store.key("a")))
    begun = time.monotonic()
    reader.end()
    assert time.monotonic() - begun < 5
    reader.stream.close()
    assert list(reader.stream) == []


def test_closing_a_watch_while_reading_it(store: Store) -> None:
    """The thread that reads may close it in between, and read no further."""
    stream = store.transport.watch(Watch(store.key("a")))
    for reply in stream:
        assert reply.events == ()
        stream.close()


def test_closing_a_watch_before_it_begins(store: Store) -> None:
    """It never does."""
    stream = store.transport.watch(Watch(store.key("a")))
    stream.close()
    assert list(stream) == []


def test_closing_the_transport_ends_its_watches(store: Store, watch: Callable[[Watch], Reader]) -> None:
    """Quietly, and `close` may be called twice."""
    reader = watch(Watch(store.key("a")))
    store.transport.close()
    assert reader.next() is None
    store.transport.close()


def test_many_watches_at_once(store: Store, watch: Callable[[Watch], Reader]) -> None:
    """Each sees its own key only."""
    readers = [watch(Watch(store.key(str(number)))) for number in range(20)]
    for number in range(20):
        store.put(str(number))
    for number, reader in enumerate(readers):
        assert [event.kv.key for event in reader.events(1)] == [store.key(str(number))]
        reader.end()


# -- the transport itself


def test_status_is_of_each_member(store: Store) -> None:
    """A member's own word: its version, its leader, the revision it is at."""
    revision = store.put("a")
    (status,) = store.transport.status()
    assert status.endpoint == store.transport.endpoints[0]
    assert status.version
    assert status.revision == revision
    assert status.leader == status.member_id
    assert status.errors == ()
    assert status.db_size_quota >= 0


def test_a_member_that_knows_its_quota_says_it() -> None:
    """From etcd 3.6 on, over both transports."""
    said = gateway_codec.status_in({"header": {}, "version": "3.6.14", "dbSizeQuota": "2147483648"}, "http://a:1")
    assert said.db_size_quota == 2**31
    if grpc_messages.INSTALLED:
        message = grpc_messages.messages.StatusResponse(version="3.6.14", dbSizeQuota=2**31)
        assert grpc_messages.status_in(message, "http://a:1") == said


def test_threads_share_a_transport(store: Store) -> None:
    """Eight threads, one key: every put that wins by condition counts exactly once."""
    key = store.key("counter")
    store.put("counter", b"0")

    def count(_: int) -> None:
        for _ in range(20):
            done = False
            while not done:
                kv = store.get("counter")
                assert kv
                more = Put(key, str(int(kv.value) + 1).encode())
                done = store.transport.txn(Txn([Compare(key, "mod", "==", kv.mod_revision)], [more])).succeeded

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(count, range(8)))
    kv = store.get("counter")
    assert kv
    assert kv.value == b"160"


def test_one_call_is_one_request(store: Store) -> None:
    """`requests` counts them, so that others can count on it."""
    transport: Any = store.transport
    before = transport.requests
    store.put("a")
    assert transport.requests == before + 1
    transport.range(Range(*store.all))
    lease = transport.lease_grant(60).lease
    transport.lease_renew(lease)
    transport.lease_time_to_live(lease)
    transport.lease_revoke(lease)
    transport.delete(Delete(store.key("a")))
    transport.status()
    assert transport.requests == before + 8


def test_errors_are_pickled_whole(store: Store) -> None:
    """What a transport raises survives the way to another process."""
    import pickle

    with pytest.raises(EtcdRejected) as error:
        store.transport.lease_revoke(NO_SUCH_LEASE)
    copy = pickle.loads(pickle.dumps(error.value))
    assert (type(copy), copy.args) == (LeaseNotFound, error.value.args)


@pytest.mark.parametrize("codec", [gateway_codec, *([grpc_messages] if grpc_messages.INSTALLED else [])])
def test_values_that_were_sent_are_not_kept(codec: Any) -> None:
    """Parts of requests are, since most are sent again and again; a value may be large."""
    large = [bytes([number]) * 100_000 for number in range(200)]
    tracemalloc.start()
    try:
        for value in large:
            assert len(codec.txn_out(Txn([Compare("/k", "value", "==", value)], [Put("/k", value)]))) >= 200_000
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1_000_000
