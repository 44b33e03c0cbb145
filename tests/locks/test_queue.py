"""Who may go in: the pure rule against a simple model, what is asked of etcd for it, and random histories."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from celery_etcd_lock.etcd.api import Delete, KeyValue, Put, Range, RangeReply, Txn, prefix_end
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.exceptions import ConfigError, LockContended, LockLost
from celery_etcd_lock.locks import HeldLock, Session
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.queue import (
    EXCLUSIVE,
    SHARED,
    Mode,
    admitted,
    blamed,
    keeping_out,
    kind_of,
    slot_of,
    value_of,
)

NAME = "/a"


@dataclass(frozen=True)
class Asked:
    """A contender as the model has it: what it asks, and whose it is."""

    kind: str
    limit: int = 0
    task_id: str = ""
    foreign: bool = False
    sibling: bool = False

    @property
    def mode(self) -> Mode:
        return Mode(self.kind, self.limit)  # type: ignore[arg-type]


def may_go_in(asked: Asked, ahead: list[Asked]) -> bool:
    """The rule, as one would say it."""
    if asked.task_id and asked.task_id in {other.task_id for other in ahead}:
        return False
    if asked.kind == "write":
        return not ahead
    alike = [other for other in ahead if other.kind == asked.kind and not other.foreign]
    return len(alike) == len(ahead) and (asked.kind == "read" or len(ahead) < asked.limit)


task_ids = st.sampled_from(["", "", "", "t1", "t2"])
askers = st.one_of(
    st.builds(Asked, st.just("write"), task_id=task_ids, sibling=st.booleans()),
    st.builds(Asked, st.just("read"), task_id=task_ids, sibling=st.booleans()),
    st.builds(Asked, st.just("slot"), st.integers(1, 4), task_id=task_ids, sibling=st.booleans()),
    st.just(Asked("write", foreign=True)),
)
slots = st.builds(Asked, st.just("slot"), st.integers(1, 4), sibling=st.booleans())
queues = st.one_of(st.lists(askers, max_size=9), st.lists(slots, max_size=6))


def key_of(asked: Asked, number: int) -> str:
    return f"{NAME}/{number:x}" if asked.foreign else f"{NAME}/{asked.kind}/{number:x}"


def puts_of(asked: Asked, number: int) -> list[Put]:
    """Its key, and that of its sibling."""
    who = {"task": "t", "task_id": asked.task_id} if asked.task_id else None
    value = b"" if asked.foreign else value_of(host="h", pid=1, since="", nonce=str(number), extra=who)
    return [Put(key_of(asked, number) + which, value) for which in ("", "-1")[: 1 + asked.sibling]]


def queued(contenders: list[Asked]) -> list[KeyValue]:
    return [
        KeyValue(put.key, put.value, number, number, 1)
        for number, asked in enumerate(contenders, 1)
        for put in puts_of(asked, number)
    ]


class TestRule:
    @given(queues, st.one_of(askers, slots))
    @settings(deadline=None)
    def test_admits_whom_the_model_admits(self, ahead: list[Asked], asked: Asked) -> None:
        """Nobody to wait for, exactly if the model lets it in; else they are of those ahead."""
        found = queued(ahead)
        out = keeping_out(asked.mode, NAME, reversed(found), asked.task_id)
        assert (not out) is may_go_in(asked, ahead)
        assert set(out) <= set(found)

    @given(queues, st.one_of(askers, slots), st.data())
    @settings(deadline=None)
    def test_while_those_it_waits_for_are_there_it_cannot_go_in(
        self, ahead: list[Asked], asked: Asked, data: st.DataObject
    ) -> None:
        """Whoever else leaves, there is no need to look: whom it watches is enough."""
        found = queued(ahead)
        watched = keeping_out(asked.mode, NAME, found, asked.task_id)
        left = {kv.create_revision for kv in found if kv in watched or data.draw(st.booleans())}
        if watched:
            assert not may_go_in(asked, [each for number, each in enumerate(ahead, 1) if number in left])
        assert len(watched) <= max(1, asked.limit)

    @given(queues, st.one_of(askers, slots), st.lists(askers, max_size=3))
    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def test_what_is_asked_of_etcd_is_enough(self, ahead: list[Asked], asked: Asked, behind: list[Asked]) -> None:
        """The few keys that are asked for give the same answer as all: joining, looking, and trying."""
        store = MemoryEtcd()
        mode, number = asked.mode, len(ahead) + 1

        def ask(ranges: list[Range]) -> list[KeyValue]:
            replies = store.txn(Txn([], ranges)).responses
            return [kv for reply in replies if isinstance(reply, RangeReply) for kv in reply.kvs]

        for index, each in enumerate(ahead, 1):
            store.txn(Txn([], puts_of(each, index)))
        expected = may_go_in(asked, ahead)
        tried = ask(mode.first(NAME, asked.task_id))
        assert (not keeping_out(mode, NAME, tried, asked.task_id)) is expected
        if not expected:
            blocker = blamed(mode, NAME, tried, asked.task_id)
            assert blocker.holder
            if may_go_in(replace(asked, task_id=""), ahead):
                assert blocker.task_id == asked.task_id, "nothing but a run of the same task keeps it out"
        free = store.txn(Txn(mode.free(NAME, 0), [])).succeeded
        if mode.kind == "slot":
            assert free is (not ahead)
            assert store.txn(Txn(mode.free(NAME, store.revision), [])).succeeded
        else:
            assert free is may_go_in(Asked(asked.kind), [Asked(each.kind, foreign=each.foreign) for each in ahead])

        joining = ask(mode.ahead(NAME, 0, asked.task_id))
        assert (not keeping_out(mode, NAME, joining, asked.task_id)) is expected

        created = store.txn(Txn([], puts_of(asked, number))).header.revision
        for index, each in enumerate(behind, number + 1):
            store.txn(Txn([], puts_of(each, index)))
        looking = ask(mode.ahead(NAME, created, asked.task_id))
        assert (not keeping_out(mode, NAME, looking, asked.task_id)) is expected

    def test_asks_for_few_and_for_values_only_where_they_count(self) -> None:
        """Behind 500 waiters a look brings back one key, or two for each slot; no values without a task."""
        store = MemoryEtcd()
        for number in range(1, 501):
            store.txn(Txn([], puts_of(Asked("slot", 4), number)))
        created = store.revision + 1
        for mode, most in ((EXCLUSIVE, 1), (SHARED, 1), (slot_of(4), 8)):
            replies = [store.range(each) for each in mode.ahead(NAME, created, "")]
            kvs = [kv for reply in replies for kv in reply.kvs]
            assert len(kvs) == most
            assert not any(kv.value for kv in kvs)

    @pytest.mark.parametrize(
        ("key", "kind"),
        [
            ("/a/write/5", "write"),
            ("/a/read/5-1", "read"),
            ("/a/slot/5", "slot"),
            ("/a/5", "write"),
            ("/a/read", "write"),
            ("/a/readers/5", "write"),
        ],
    )
    def test_strangers_are_exclusive(self, key: str, kind: str) -> None:
        """A key is what its folder says, and exclusive if that says nothing."""
        assert kind_of("/a", key) == kind

    @pytest.mark.parametrize("limit", [0, -1, True, 1.0, "3", None])
    def test_limits_that_cannot_be(self, limit: Any) -> None:
        """A limit is a whole number from 1 on."""
        with pytest.raises(ConfigError, match="limit"):
            slot_of(limit)


def until(condition: Callable[[], Any], what: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.0005)


@dataclass(eq=False)
class Actor:
    """One acquire, in a thread of its own."""

    number: int
    asked: Asked
    session: Session
    key: str = ""
    held: HeldLock | None = None
    error: Exception | None = None
    ghost: bool = False
    """Only its sibling is left."""
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def inside(self) -> bool:
        return self.held is not None and self.held.is_held()


class Histories(RuleBasedStateMachine):
    """Contenders of four sessions join, try, release, give up and die, in any order; a list is the model.

    After every step, whoever the model lets in goes in, and nobody else does.
    """

    actors = Bundle("actors")

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryEtcd()
        self.sessions = [self.open() for _ in range(4)]
        self.queue: list[Actor] = []
        self.count = 0
        self.entering = threading.Lock()
        self.conflicts: list[tuple[Actor, Actor]] = []

    def open(self) -> Session:
        return Session(MemoryTransport(self.store), ttl=6000, background=False)

    # -- the model

    def expected(self) -> list[Actor]:
        return [
            actor
            for place, actor in enumerate(self.queue)
            if not (actor.asked.foreign or actor.session.lost or actor.ghost)
            and may_go_in(actor.asked, [each.asked for each in self.queue[:place]])
        ]

    def settle(self) -> None:
        """Wait until those are inside whom the model lets in; and nobody goes in whom it does not."""

        def inside() -> set[int]:
            return {actor.number for actor in self.queue if actor.inside}

        expected = {actor.number for actor in self.expected()}
        until(lambda: inside() >= expected, lambda: f"{expected} should be in, and {inside()} are: {self.queue}")
        assert inside() == expected

    # -- what happens

    def start(self, session: Session, asked: Asked) -> Actor:
        self.count += 1
        actor = Actor(self.count, asked, session)

        def come() -> None:
            try:
                stays = 6000 if asked.sibling else 0
                held = acquire(session, NAME, asked.mode, describe=describe(asked), at_least_for=stays)
                with self.entering:
                    others = [each for each in self.queue if each.inside]
                    actor.held = held
                    self.conflicts += [(actor, each) for each in others if conflict(actor, each)]
            except Exception as error:  # noqa: BLE001 - the step that waits for it judges it
                actor.error = error
            finally:
                actor.done.set()

        before = self.store.revision
        self.queue.append(actor)
        threading.Thread(target=come, daemon=True).start()
        until(lambda: self.store.revision > before, lambda: f"{actor} did not join: {actor.error}")
        # It is in, or it has set itself to wait.
        own = (session.contenders._by_key[key] for key, number in self.keys().items() if number == actor.number)
        (contender,) = (each for each in own if each.of is None)
        actor.key = contender.key
        until(lambda: actor.done.is_set() or contender.on_lost, lambda: f"{actor} neither waits nor goes in")
        return actor

    @rule(target=actors, session=st.integers(0, 3), asked=askers.filter(lambda asked: not asked.foreign))
    def join(self, session: int, asked: Asked) -> Actor:
        return self.start(self.sessions[session], asked)

    @rule(target=actors)
    def stranger(self) -> Actor:
        """An exclusive contender by somebody else's client, whose turn nobody tells us."""
        self.count += 1
        actor = Actor(self.count, Asked("write", foreign=True), self.sessions[0], key=f"{NAME}/{self.count:x}")
        self.store.txn(Txn([], [Put(actor.key, b"")]))
        self.queue.append(actor)
        return actor

    @rule(session=st.integers(0, 3), asked=askers.filter(lambda asked: not asked.foreign))
    def try_(self, session: int, asked: Asked) -> None:
        """A try gets in exactly if the model says so, and is out again; else it leaves no trace."""
        revision = self.store.revision
        admitted = may_go_in(asked, [each.asked for each in self.queue])
        asked = replace(asked, sibling=False)
        twin = asked.kind == "read" and asked.task_id in {each.asked.task_id for each in self.queue}
        try:
            held = acquire(self.sessions[session], NAME, asked.mode, blocking=False, describe=describe(asked))
        except LockContended:
            assert not admitted
            assert self.store.revision == revision or twin
        else:
            assert admitted
            assert held.release() == "released"

    @rule(actor=consumes(actors))
    def leave(self, actor: Actor) -> None:
        """A holder releases; of a waiter, the key is deleted by hand, and it must not go in any more."""
        if actor not in self.queue:
            return
        place = self.queue.index(actor)
        if actor.ghost:
            return
        self.queue.remove(actor)
        if actor.asked.foreign:
            self.store.txn(Txn([], [Delete(actor.key)]))
        elif actor.held is not None:
            assert actor.held.release() == ("lost" if actor.session.lost else "released")
            self.leave_ghosts([actor], at=place)
        else:
            self.store.txn(Txn([], [Delete(actor.key)]))
            for contender in actor.session.contenders.existing():
                if contender.key == actor.key:
                    actor.session.contenders.lose(contender, "deleted by hand")
            assert actor.done.wait(20)
            assert isinstance(actor.error, LockLost)

    def leave_ghosts(self, actors: list[Actor], at: int | None = None) -> None:
        """Of `actors`, who held their locks and are gone, the siblings stay, in their places."""
        for actor in actors:
            if actor.held is not None and actor.asked.sibling:
                actor.ghost = True
                if at is not None:
                    self.queue.insert(at, actor)

    @precondition(lambda self: any(actor.ghost for actor in self.queue))
    @rule(data=st.data())
    def time_is_over(self, data: st.DataObject) -> None:
        """The lease of a sibling that was left ends."""
        ghost = data.draw(st.sampled_from([actor for actor in self.queue if actor.ghost]))
        assert ghost.held is not None
        (left,) = [kv for kv in self.kvs() if kv.create_revision == ghost.held.compare().operand]
        self.store.lease_revoke(left.lease)
        self.queue.remove(ghost)

    def kvs(self) -> tuple[KeyValue, ...]:
        return self.store.range(Range(NAME + "/", prefix_end(NAME + "/"), sort="create")).kvs

    def keys(self) -> dict[str, int]:
        """Which key is whose: create revisions are in the order of the queue."""
        kvs = self.kvs()
        revisions = sorted({kv.create_revision for kv in kvs})
        assert len(revisions) == len(self.queue), (kvs, self.queue)
        whose = {revision: actor.number for revision, actor in zip(revisions, self.queue, strict=True)}
        assert len(kvs) == sum(1 + (actor.asked.sibling and not actor.ghost) for actor in self.queue), (kvs, self.queue)
        return {kv.key: whose[kv.create_revision] for kv in kvs}

    @rule(index=st.integers(0, 3), expires=st.booleans())
    def lose_session(self, index: int, expires: bool) -> None:
        """A session ends: closed, or lost first and gone from etcd a while later. Its waiters leave at once."""
        session, self.sessions[index] = self.sessions[index], self.open()
        mine = [each for each in self.queue if each.session is session and not (each.asked.foreign or each.ghost)]
        if expires:
            session._lose("staged")
        else:
            session.close()
        for actor in mine:
            assert actor.done.wait(20)
            assert not actor.inside
            if actor.held is None:
                assert isinstance(actor.error, LockLost)
        if expires:
            until(lambda: not waiting(self.store, mine), lambda: "its waiters are still there")
            self.queue = [actor for actor in self.queue if actor not in mine or actor.held is not None]
            self.settle()  # what it held is taken until the lease is over
            session.transport.lease_revoke(session.lease)
        self.leave_ghosts(mine)
        self.queue = [actor for actor in self.queue if actor.ghost or actor not in mine]

    @invariant()
    def those_are_in_whom_the_model_lets_in(self) -> None:
        self.settle()
        assert not self.conflicts
        self.keys()

    def teardown(self) -> None:
        for session in self.sessions:
            session.close()


def waiting(store: MemoryEtcd, actors: list[Actor]) -> int:
    """How many of the keys of `actors`, who are of one session, are there and not of those that hold the lock."""
    kvs = store.range(Range(NAME + "/", prefix_end(NAME + "/"))).kvs
    held = {actor.held.compare().operand for actor in actors if actor.held is not None}
    leases = {actor.session.lease for actor in actors}
    return len([kv for kv in kvs if kv.lease in leases and kv.create_revision not in held])


def conflict(one: Actor, other: Actor) -> bool:
    """Whether these two may not be inside together, whoever came first."""
    if one.asked.task_id and one.asked.task_id == other.asked.task_id:
        return True
    return one.asked.kind == "write" or one.asked.kind != other.asked.kind


def describe(asked: Asked) -> dict[str, str | int] | None:
    return {"task": "t", "task_id": asked.task_id} if asked.task_id else None


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


def overtaking(mode: Mode, name: str, ahead: list[KeyValue], task_id: str) -> tuple[KeyValue, ...]:
    """Readers go past writers."""
    return () if mode == SHARED else keeping_out(mode, name, ahead, task_id)


def one_too_many(mode: Mode, name: str, ahead: list[KeyValue], task_id: str) -> tuple[KeyValue, ...]:
    return keeping_out(mode._replace(limit=mode.limit + 1), name, ahead, task_id)


@pytest.mark.parametrize(
    ("broken", "comers"),
    [
        (overtaking, [Asked("read"), Asked("write"), Asked("read")]),
        (one_too_many, [Asked("slot", 2), Asked("slot", 2), Asked("slot", 2)]),
    ],
)
def test_the_histories_see_a_broken_rule(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Any], comers: list[Asked]
) -> None:
    """Control: where readers overtake, or one slot too many is given, what is checked after each step fails."""
    for rule_, fails in ((keeping_out, False), (broken, True)):
        monkeypatch.setattr("celery_etcd_lock.locks.queue.keeping_out", rule_)
        history = Histories()
        try:
            for comer in comers[:-1]:
                history.start(history.sessions[0], comer)
                history.those_are_in_whom_the_model_lets_in()
            history.start(history.sessions[1], comers[-1])
            with pytest.raises(AssertionError) if fails else contextlib.nullcontext():
                history.settle()
        finally:
            history.teardown()


STANDING = st.lists(
    st.tuples(st.sampled_from(["write/", "read/", "slot/", ""]), st.sampled_from("abc "), st.booleans())
)


@given(standing=STANDING, limit=st.integers(1, 3))
def test_who_is_in_is_who_is_kept_out_by_nobody(standing: list[tuple[str, str, bool]], limit: int) -> None:
    """For one who looks on at a whole queue: the rule of each contender, asked of each; siblings are one."""
    queue: list[KeyValue] = []
    for number, (kind, task_id, sibling) in enumerate(standing, 1):
        said = value_of(host="h", pid=1, since="", nonce="n", extra={"task_id": task_id} if task_id.strip() else {})
        names = (f"{number}", f"{number}-1")[: 1 + (sibling and bool(kind))]
        queue.extend(KeyValue(f"{NAME}/{kind}{each}", said, number, number, 1) for each in names)
    inside = set()
    for kv in queue:
        own = kind_of(NAME, kv.key)
        mode = Mode(own, limit if own == "slot" else 0)
        ahead = [each for each in queue if each.create_revision < kv.create_revision]
        if not keeping_out(mode, NAME, ahead, json.loads(kv.value).get("task_id", "")):
            inside.add(kv.create_revision)
    assert admitted(NAME, reversed(queue), limit) == inside
