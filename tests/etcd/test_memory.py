"""The store in memory: its clock, its history, its faults to stage; and that it answers as a real etcd does."""

from __future__ import annotations

import itertools
import json
import os
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from celery_etcd_lock.etcd import Transport, connect
from celery_etcd_lock.etcd.api import (
    Compare,
    Delete,
    Event,
    Header,
    KeyValue,
    LeaseKeys,
    LeaseReply,
    Operation,
    Put,
    Range,
    Txn,
    Watch,
    WatchReply,
)
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.exceptions import Compacted, EtcdLockError, EtcdRejected, EtcdUnavailable, LeaseNotFound
from celery_etcd_lock.testing import EtcdServer
from tests.clock import Clock

EVERYTHING = "\0"


class Reader:
    """Reads a watch in a thread of its own, as its users do."""

    def __init__(self, transport: Transport, request: Watch) -> None:
        self.replies: list[WatchReply] = []
        self.failure: EtcdLockError | None = None
        self.stream = transport.watch(request)
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.wait_for(lambda: bool(self.replies))

    @property
    def events(self) -> list[Event]:
        return [event for reply in self.replies for event in reply.events]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._news:
            assert self._news.wait_for(condition, timeout=20)

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _read(self) -> None:
        try:
            for reply in self.stream:
                with self._news:
                    self.replies.append(reply)
                    self._news.notify_all()
        except EtcdLockError as failure:
            self.failure = failure


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryEtcd:
    return MemoryEtcd(clock)


@pytest.fixture
def transport(store: MemoryEtcd) -> Iterator[MemoryTransport]:
    transport = MemoryTransport(store)
    yield transport
    transport.close()


def put(transport: Transport, key: str, value: bytes = b"", lease: int = 0) -> int:
    return transport.txn(Txn([], [Put(key, value, lease)])).header.revision


def keys(transport: Transport, revision: int = 0) -> list[str]:
    return [kv.key for kv in transport.range(Range(EVERYTHING, EVERYTHING, revision=revision)).kvs]


def test_a_lease_ends_when_its_time_is_over(clock: Clock, transport: MemoryTransport) -> None:
    """All keys of a lease go at one revision, at the moment its TTL has passed, and not before."""
    lease = transport.lease_grant(10).lease
    put(transport, "mine", lease=lease)
    put(transport, "mine too", lease=lease)
    before = put(transport, "nobody's")
    clock.now += 9.5
    assert transport.lease_time_to_live(lease).ttl == 0
    assert keys(transport) == ["mine", "mine too", "nobody's"]
    clock.now += 0.5
    assert keys(transport) == ["nobody's"]
    assert transport.range(Range("x")).header.revision == before + 1
    assert transport.lease_renew(lease).ttl == 0
    assert transport.lease_time_to_live(lease).ttl == -1
    with pytest.raises(LeaseNotFound):
        transport.lease_revoke(lease)
    with pytest.raises(LeaseNotFound):
        put(transport, "late", lease=lease)


def test_a_renewal_starts_the_time_anew(clock: Clock, transport: MemoryTransport) -> None:
    """A lease that is renewed in time lives on, for its whole TTL."""
    lease = transport.lease_grant(10).lease
    put(transport, "mine", lease=lease)
    clock.now += 9
    assert transport.lease_renew(lease).ttl == 10
    clock.now += 9
    assert keys(transport) == ["mine"]
    clock.now += 1
    assert keys(transport) == []


def test_leases_that_end_together_end_in_order(clock: Clock, transport: MemoryTransport) -> None:
    """Whoever looks late sees each expired lease end at a revision of its own, the oldest first."""
    long, short = transport.lease_grant(20).lease, transport.lease_grant(10).lease
    put(transport, "long", lease=long)
    start = put(transport, "short", lease=short)
    clock.now += 100
    assert keys(transport, start) == ["long", "short"]
    assert keys(transport, start + 1) == ["long"]
    assert keys(transport) == []
    assert transport.store.revision == start + 2


def test_the_shortest_ttl_is_the_servers() -> None:
    """A TTL under the server's minimum is granted as that minimum."""
    assert MemoryTransport(MemoryEtcd(min_ttl=2)).lease_grant(1).ttl == 2
    assert MemoryTransport(MemoryEtcd()).lease_grant(1).ttl == 1


def test_wake_shows_waiting_watches_the_clock(clock: Clock, store: MemoryEtcd, transport: MemoryTransport) -> None:
    """A watch that waits learns of an expiry without any request, once it is made to look at the clock."""
    put(transport, "mine", lease=transport.lease_grant(60).lease)
    reader = Reader(transport, Watch("mine"))
    clock.now += 60
    store.wake()
    reader.wait_for(lambda: bool(reader.events))
    assert reader.events == [Event("delete", KeyValue("mine", b"", 0, store.revision, 0))]


def test_a_waiting_watch_sees_an_expiry_by_itself() -> None:
    """With the real clock a watch that waits ends what has expired, though nobody asks for anything."""
    transport = MemoryTransport(MemoryEtcd())
    reader = Reader(transport, Watch("mine"))
    put(transport, "mine", lease=transport.lease_grant(1).lease)
    reader.wait_for(lambda: [event.kind for event in reader.events] == ["put", "delete"])
    transport.close()
    reader.join()


def test_history_can_be_read_until_it_is_compacted(store: MemoryEtcd, transport: MemoryTransport) -> None:
    """A range sees any past revision down to the compacted one, a watch starts from any of them."""
    revisions = [put(transport, "a", b"1"), put(transport, "b", b"2"), put(transport, "a", b"3")]
    transport.delete(Delete("b"))
    assert keys(transport, revisions[0]) == ["a"]
    assert keys(transport, revisions[1]) == ["a", "b"]
    store.compact(revisions[1])
    assert keys(transport, revisions[1]) == ["a", "b"]
    assert transport.range(Range("a", revision=revisions[1])).kvs[0].value == b"1"
    assert keys(transport) == ["a"]
    for lost in (
        lambda: keys(transport, revisions[0]),
        lambda: store.compact(revisions[1]),
        lambda: list(transport.watch(Watch("a", start_revision=revisions[0]))),
    ):
        with pytest.raises(Compacted) as caught:
            lost()
        assert caught.value.code == 11
    with pytest.raises(EtcdRejected, match="future"):
        store.compact(store.revision + 1)
    replies = iter(transport.watch(Watch(EVERYTHING, EVERYTHING, start_revision=revisions[1])))
    assert next(replies).events == ()
    assert [(event.kind, event.kv.key) for event in next(replies).events] == [
        ("put", "b"),
        ("put", "a"),
        ("delete", "b"),
    ]


def test_compaction_takes_nothing_from_a_watch_under_way(store: MemoryEtcd, transport: MemoryTransport) -> None:
    """A watch that has not yet read what happened still gets it after it was compacted away."""
    replies = iter(transport.watch(Watch("a")))
    next(replies)
    first, second = put(transport, "a"), put(transport, "a")
    store.compact(put(transport, "b"))
    assert [next(replies).header.revision for _ in range(2)] == [first, second]


def test_the_same_url_is_the_same_store() -> None:
    """Two transports to one memory:// URL see each other's keys, another URL's do not."""
    one, two, other = connect("memory://shared"), connect("memory://shared"), connect("memory://other")
    reader = Reader(two, Watch("a"))
    put(one, "a")
    reader.wait_for(lambda: bool(reader.events))
    assert keys(two) == ["a"]
    assert keys(other) == []
    assert one.endpoints == ("memory://shared",)
    two.close()
    reader.join()
    assert reader.failure is None
    with pytest.raises(EtcdUnavailable):
        keys(two)
    assert keys(one) == ["a"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_goes_on_with_a_copy(transport: MemoryTransport) -> None:
    """After a fork parent and child each have the keys of before, a lock that works, and nothing in common."""
    put(transport, "before")
    reader = Reader(transport, Watch(EVERYTHING, EVERYTHING))
    stop = threading.Event()
    writer = threading.Thread(target=lambda: [put(transport, "busy") for _ in iter(stop.is_set, True)])
    writer.start()  # so that a fork can fall into the middle of a change
    try:
        for _ in range(20):
            child = os.fork()
            if not child:
                try:
                    found = "before" in keys(transport)
                    put(transport, "child's")
                    os._exit(0 if found and "child's" in keys(transport) else 1)
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        writer.join()
    assert "child's" not in keys(transport)
    transport.close()
    reader.join()


def test_hooks_stage_a_request_that_is_not_carried_out(transport: MemoryTransport) -> None:
    """What `before` raises reaches the caller, and nothing has happened; it is told the verb and the request."""
    seen: list[tuple[str, Any]] = []

    def before(verb: str, request: Any) -> None:
        seen.append((verb, request))
        if verb in {"txn", "watch"}:
            raise EtcdUnavailable("staged")

    transport.before = before
    with pytest.raises(EtcdUnavailable):
        put(transport, "a")
    stream = transport.watch(Watch("a"))
    with pytest.raises(EtcdUnavailable):
        next(iter(stream))
    assert transport.lease_renew(7).ttl == 0
    assert seen == [("txn", Txn([], [Put("a", b"")])), ("watch", Watch("a")), ("lease_renew", 7)]
    assert transport.requests == 3
    transport.before = None
    assert keys(transport) == []


def test_hooks_stage_a_lost_answer(transport: MemoryTransport) -> None:
    """What `after` raises reaches the caller, though the request was carried out."""

    def after(verb: str, request: Any) -> None:
        raise EtcdUnavailable(f"staged: {verb} {request}", unanswered=True)

    transport.after = after
    with pytest.raises(EtcdUnavailable) as caught:
        put(transport, "a")
    assert caught.value.unanswered
    transport.after = None
    assert keys(transport) == ["a"]


def test_a_broken_watch_raises_in_its_reader(transport: MemoryTransport) -> None:
    """`break_watches` ends a watch as a lost connection would; the same transport watches again."""
    reader = Reader(transport, Watch("a"))
    transport.break_watches()
    reader.join()
    assert isinstance(reader.failure, EtcdUnavailable)
    replies = iter(transport.watch(Watch("a")))
    next(replies)
    put(transport, "a")
    assert [event.kv.key for event in next(replies).events] == ["a"]


def test_a_closed_watch_ends_at_once(transport: MemoryTransport) -> None:
    """After `close`, called by anybody and twice, iterating ends without a word, even if there was more to read."""
    stream = transport.watch(Watch("a"))
    next(iter(stream))
    put(transport, "a")
    stream.close()
    stream.close()
    transport.break_watches()
    assert list(stream) == []


def test_a_watch_can_be_taken_up_again(transport: MemoryTransport) -> None:
    """A reader that leaves the loop and comes back has missed nothing; once ended, a watch stays so."""
    stream = transport.watch(Watch("a"))
    next(iter(stream))
    put(transport, "a")
    for reply in stream:
        assert len(reply.events) == 1
        break
    transport.break_watches()
    with pytest.raises(EtcdUnavailable):
        next(iter(stream))
    assert list(stream) == []


def test_a_reader_may_use_the_store(transport: MemoryTransport) -> None:
    """Whoever reads a watch holds no lock: another thread's request goes through while a reply is in hand."""
    for _ in transport.watch(Watch("a")):
        other = threading.Thread(target=put, args=(transport, "b"), daemon=True)
        other.start()
        other.join(20)
        assert not other.is_alive()
        break
    assert keys(transport) == ["b"]


def test_a_watch_that_is_dropped_is_forgotten(store: MemoryEtcd, transport: MemoryTransport) -> None:
    """A watch whose reader just stops reading leaves nothing behind in the store."""
    stream = transport.watch(Watch("a"))
    next(stream)
    assert len(store._watches) == 1
    del stream
    assert not store._watches


def test_the_raft_term_is_the_tests_to_set(store: MemoryEtcd, transport: MemoryTransport) -> None:
    """Replies show the term that a test has set, to stage a change of leader."""
    store.raft_term = 7
    assert transport.range(Range("a")).header.raft_term == 7
    assert transport.status()[0].raft_term == 7


# The same random history on a real etcd and in memory. What differs between the two by nature is symbolic in the
# steps and in the replies compared: a lease is the number of its grant in this history, a revision is counted
# from where the history began.

# Refusals are rare, so that most transactions get as far as doing something.

LEASES = st.sampled_from([0, 0, 1, 1, 2, 2, 2, 3])
REVISIONS = st.integers(-1, 8)
KEYS = st.sampled_from(["a", "a/b", "a0", "b", "\N{SNOWMAN}", "b\udcff"] * 6 + [""])
ENDS = st.sampled_from([None, None, None, "a0", "b", "c", "\uffff", "\uffff", EVERYTHING, EVERYTHING])
VALUES = st.sampled_from([b"", b"1", b"\xff\x00"])


@dataclass(frozen=True)
class Step:
    """One call: the transport's verb, its request or the lease it is about, and its keywords."""

    verb: str
    request: Any
    options: dict[str, Any] = field(default_factory=dict)


RANGES = st.builds(
    Range,
    key=KEYS,
    range_end=ENDS,
    limit=st.integers(0, 3),
    revision=st.sampled_from([0] * 12 + [1, 2, 3, 4, 5, 9]),
    sort=st.sampled_from([None, "key", "create", "mod"]),
    descending=st.booleans(),
    keys_only=st.booleans(),
    count_only=st.sampled_from([False, False, True]),
    max_create_revision=st.one_of(st.just(0), REVISIONS),
)
PUTS = st.builds(Put, key=KEYS, value=VALUES, lease=LEASES)
DELETES = st.builds(Delete, key=KEYS, range_end=ENDS)
OPERATIONS = st.lists(st.one_of(RANGES, PUTS, PUTS, DELETES), max_size=4)
COMPARES = st.one_of(
    st.builds(
        Compare,
        key=KEYS,
        target=st.sampled_from(["create", "mod", "version", "lease"]),
        operator=st.sampled_from(["==", "!=", "<", ">"]),
        operand=st.integers(0, 4),
        range_end=ENDS,
    ),
    st.builds(
        Compare,
        key=KEYS,
        target=st.just("value"),
        operator=st.sampled_from(["==", "!=", "<", ">"]),
        operand=VALUES,
        range_end=ENDS,
    ),
)
STEPS = st.one_of(
    st.builds(
        lambda compare, success, failure: Step("txn", Txn(compare, success, failure)),
        st.lists(COMPARES, max_size=2),
        OPERATIONS,
        OPERATIONS,
    ),
    st.builds(lambda puts: Step("txn", Txn([], puts)), st.lists(PUTS, min_size=1, max_size=3)),
    RANGES.map(lambda request: Step("range", request)),
    DELETES.map(lambda request: Step("delete", request)),
    st.just(Step("lease_grant", 100)),
    st.just(Step("lease_grant", 100)),
    st.integers(1, 3).map(lambda lease: Step("lease_revoke", lease)),
    st.integers(1, 3).map(lambda lease: Step("lease_renew", lease)),
    st.integers(1, 3).map(lambda lease: Step("lease_time_to_live", lease, {"keys": True})),
)


# What every history begins with, so that there is something to find.
BEGINNING = [
    Step("txn", Txn([], [Put("b\udcff", b"1", 1), Put("a/b", b"")])),
    Step("txn", Txn([], [Put("a", b"1", 1)])),
    Step("txn", Txn([], [Put("b", b"\xff\x00"), Put("\N{SNOWMAN}", b"1", 1)])),
    Step("txn", Txn([], [Put("a/b", b"1")])),
]


class World:
    """One etcd, real or not, emptied; it carries out steps and tells their replies in symbols."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.start = transport.delete(Delete(EVERYTHING, EVERYTHING)).header.revision
        self.leases = [transport.lease_grant(100).lease]

    def carry_out(self, step: Step) -> Any:
        request: Any = step.request
        if step.verb.startswith("lease_") and step.verb != "lease_grant":
            request = self._lease(request)
        elif step.verb == "txn":
            branches = [[self._operation(one) for one in branch] for branch in (request.success, request.failure)]
            request = Txn([self._compare(one) for one in request.compare], *branches)
        elif isinstance(request, Range):
            request = self._operation(request)
        try:
            reply = getattr(self.transport, step.verb)(request, **step.options)
        except EtcdLockError as refused:
            return type(refused), refused.args
        if step.verb == "lease_grant":
            self.leases.append(reply.lease)
        return self.told(reply)

    def history(self, start: int = 1) -> Any:
        """Every event from there on, as a watch tells them."""
        tip = self.transport.range(Range("a")).header.revision
        stream = self.transport.watch(Watch(EVERYTHING, EVERYTHING, start_revision=self.start + start))
        events: list[Event] = []
        try:
            if tip >= self.start + start:
                for reply in stream:
                    events += reply.events
                    if events and events[-1].kv.mod_revision == tip:
                        break
        finally:
            stream.close()
        return self.told(events)

    def close(self) -> None:
        for lease in self.leases:
            try:
                self.transport.lease_revoke(lease)
            except LeaseNotFound:
                continue

    def told(self, reply: Any) -> Any:
        if isinstance(reply, Header):
            return reply.revision - self.start
        if isinstance(reply, KeyValue):
            return (
                reply.key,
                reply.value,
                reply.create_revision and reply.create_revision - self.start,
                reply.mod_revision - self.start,
                reply.version,
                self._number(reply.lease),
            )
        if not hasattr(reply, "_asdict"):
            plain = isinstance(reply, (str, bytes)) or not isinstance(reply, Sequence)
            return reply if plain else [self.told(one) for one in reply]
        told = {name: self.told(value) for name, value in reply._asdict().items()}
        if isinstance(reply, (LeaseReply, LeaseKeys)):
            told["lease"] = self._number(reply.lease)
            told["ttl"] = (reply.ttl > 0) - (reply.ttl < 0)
        if isinstance(reply, LeaseKeys):
            told["keys"] = sorted(reply.keys)
        return type(reply).__name__, told

    def _operation(self, operation: Operation) -> Operation:
        if isinstance(operation, Put):
            return operation._replace(lease=self._lease(operation.lease))
        if isinstance(operation, Range):
            return operation._replace(
                revision=self._revision(operation.revision),
                max_create_revision=self._revision(operation.max_create_revision),
            )
        return operation

    def _compare(self, compare: Compare) -> Compare:
        if isinstance(compare.operand, bytes) or compare.target == "version":
            return compare
        symbol = self._lease if compare.target == "lease" else self._revision
        return compare._replace(operand=symbol(compare.operand))

    def _revision(self, number: int) -> int:
        return number and max(self.start + number, 1)

    def _lease(self, number: int) -> int:
        if not number:
            return 0
        return self.leases[number - 1] if number <= len(self.leases) else 4_711

    def _number(self, lease: int) -> int:
        return self.leases.index(lease) + 1 if lease in self.leases else 0


@pytest.fixture(scope="module")
def alone() -> Iterator[EtcdServer]:
    """An etcd in which nobody else's leases run out."""
    with EtcdServer() as server:
        yield server


@pytest.fixture(scope="module")
def real(alone: EtcdServer) -> Iterator[Transport]:
    transport = connect(alone.url)
    yield transport
    transport.close()


class Pair:
    """A real etcd and a store in memory that have the same history, and are held to the same replies."""

    def __init__(self, real: Transport) -> None:
        self.etcd = World(real)
        self.memory = World(MemoryTransport(MemoryEtcd(Clock())))
        for step in BEGINNING:
            self.carry_out(step)

    def carry_out(self, step: Step) -> None:
        expected = self.etcd.carry_out(step)
        assert self.memory.carry_out(step) == expected, step

    def close(self) -> None:
        assert self.memory.history() == self.etcd.history()
        self.etcd.close()


@given(steps=st.lists(STEPS, min_size=1, max_size=10))
@example(steps=[Step("txn", Txn([], [Put("a", b"1"), Range("a", EVERYTHING), Put("b", b"2"), Delete("c")]))])
@example(steps=[Step("txn", Txn([], [Range("a"), Delete("a", "b"), Put("b", b"")]))])
@example(steps=[Step("lease_revoke", 1), Step("lease_time_to_live", 1, {"keys": True})])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_memory_answers_as_etcd_does(real: Transport, steps: list[Step]) -> None:
    """Any short history of requests gets the same replies and errors, and leaves the same events, on both."""
    pair = Pair(real)
    for step in steps:
        pair.carry_out(step)
    pair.close()


SPANS: list[tuple[str, str | None]] = [
    ("a", None),
    ("none", None),
    ("a", "b"),
    ("a", "\uffff"),
    ("b", EVERYTHING),
    ("c", "d"),
    ("b", "a"),
    ("b", "b"),
]


def test_memory_reads_as_etcd_does(real: Transport) -> None:
    """Every combination of a range's options gets the same reply on both, in a transaction and alone."""
    pair = Pair(real)
    ranges = [
        Range(key, end, limit, revision, sort, descending, keys_only, count_only, max_create)  # type: ignore[arg-type]
        for (key, end), limit, revision, sort, descending, (keys_only, count_only), max_create in itertools.product(
            SPANS,
            (0, 1, 2),
            (0, 2),
            (None, "key", "create", "mod"),
            (False, True),
            ((False, False), (True, False), (False, True)),
            (0, 1, 3, 4),
        )
    ]
    for start in range(0, len(ranges), 128):
        pair.carry_out(Step("txn", Txn([], ranges[start : start + 128])))
        pair.carry_out(Step("range", ranges[start]))
    pair.close()


def test_memory_compares_as_etcd_does(real: Transport) -> None:
    """Every kind of comparison, with keys that are there and that are not, comes out the same on both."""
    pair = Pair(real)
    targets: tuple[Literal["create", "mod", "version", "lease"], ...] = ("create", "mod", "version", "lease")
    operators: tuple[Literal["==", "!=", "<", ">"], ...] = ("==", "!=", "<", ">")
    for (key, end), operator in itertools.product(SPANS, operators):
        for target, operand in itertools.product(targets, range(5)):
            pair.carry_out(Step("txn", Txn([Compare(key, target, operator, operand, end)], [])))
        for value in (b"", b"1", b"\xff\x00"):
            pair.carry_out(Step("txn", Txn([Compare(key, "value", operator, value, end)], [])))
    pair.close()


def test_memory_refuses_as_etcd_does(real: Transport) -> None:
    """The same transactions are refused, whichever branch they would take; and with the same words."""
    pair = Pair(real)
    operations: list[Operation] = [
        Put("a", b""),
        Put("b", b""),
        Put("a", b"", lease=3),
        Put("", b""),
        Delete("a"),
        Delete("a", "c"),
        Delete("a", EVERYTHING),
        Delete("b", "a"),
        Delete(""),
        Range("a", revision=1),
        Range("a", revision=1_000_000),
        Range(""),
    ]
    for first, second in itertools.product(operations, operations):
        pair.carry_out(Step("txn", Txn([], [first, second])))
        pair.carry_out(Step("txn", Txn([], [], [first, second])))
    many = [Range("a")] * 129
    for transaction in (Txn([], many), Txn([], [], many), Txn([Compare("a", "mod", "==", 0)] * 129, [])):
        pair.carry_out(Step("txn", transaction))
    pair.carry_out(Step("lease_grant", 9_000_000_001))
    pair.close()


def test_memory_forgets_as_etcd_does(alone: EtcdServer, real: Transport) -> None:
    """After a compaction the same past can be read and watched on both, and what cannot is refused by both."""
    store = MemoryEtcd(Clock())
    etcd, memory = World(real), World(MemoryTransport(store))
    for world in (etcd, memory):
        for key in ("a", "b", "a", "c", "a"):
            put(world.transport, key)
    body = json.dumps({"revision": etcd.start + 3}).encode()
    urllib.request.urlopen(f"{alone.url}/v3/kv/compaction", body, timeout=20).close()
    store.compact(memory.start + 3)

    def ranged(world: World, revision: int) -> Any:
        try:
            return world.told(world.transport.range(Range(EVERYTHING, EVERYTHING, revision=world.start + revision)))
        except EtcdRejected as refused:
            return type(refused), refused.args

    for revision in range(1, 7):
        assert ranged(memory, revision) == ranged(etcd, revision)
    for start in (3, 4, 5):
        assert memory.history(start) == etcd.history(start)
    for world in (etcd, memory):
        with pytest.raises(Compacted):
            world.history(2)


@pytest.mark.parametrize("operand", [b"1", 1])
def test_a_comparison_of_the_wrong_kind_is_refused(transport: MemoryTransport, operand: int | bytes) -> None:
    """A value is compared with bytes, all else with numbers: memory is no laxer than the wire."""
    target: Literal["mod", "value"] = "mod" if isinstance(operand, bytes) else "value"
    with pytest.raises(TypeError):
        transport.txn(Txn([Compare("a", target, "==", operand)], []))


def test_a_watch_of_nothing_is_refused(transport: MemoryTransport) -> None:
    """A range without a key in it cannot be watched."""
    with pytest.raises(EtcdRejected, match="empty"):
        next(iter(transport.watch(Watch("b", "a"))))
