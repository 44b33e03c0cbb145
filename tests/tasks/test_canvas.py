"""A conflict in every place of a canvas, beside a twin of plain tasks: the same results, states and callbacks.

Each case is one canvas with one step, "x", whose lock somebody else holds until that step has met it. Its twin is the
same canvas of plain tasks, in which x simply does what the policy says: runs, returns the skip's result, or fails.
All cases are sent at once, to one worker; the tests then look at what came of them.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from celery import _state, chain, chord, group
from celery.canvas import Signature
from celery.exceptions import TimeoutError as TimedOut
from celery.result import AsyncResult, GroupResult

from celery_etcd_lock import SingletonTask
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Range, prefix_end
from celery_etcd_lock.locks import Session
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.testing import EtcdServer
from tests.servers import RedisServer
from tests.workers import Project, project, until

# Celery 5.4 speaks to the newest redis-py in words that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")

Step = Callable[[str], Any]
"""Makes the step of that label."""

BOUND = 240.0
"""Seconds for all of it: several times what it takes."""

POLICIES = ("retry", "skip", "continue", "wait", "fail")

SHAPES: dict[str, Callable[[Step], Any]] = {
    "alone": lambda s: s("x"),
    "first of a chain": lambda s: chain(s("x"), s("b"), s("c")),
    "middle of a chain": lambda s: chain(s("a"), s("x"), s("c")),
    "last of a chain": lambda s: chain(s("a"), s("b"), s("x")),
    "member of a group": lambda s: group(s("a"), s("x"), s("c")),
    "member of a chord": lambda s: chord([s("a"), s("x"), s("c")], s("z")),
    "body of a chord": lambda s: chord([s("a"), s("b")], s("x")),
    "body of a chord, and on": lambda s: chain(chord([s("a"), s("b")], s("x")), s("c")),
    "first of a chain in a chord": lambda s: chord([chain(s("x"), s("b")), s("c")], s("z")),
    "last of a chain in a chord": lambda s: chord([chain(s("a"), s("x")), s("c")], s("z")),
    "in a group in a chain": lambda s: chain(s("a"), group(s("b"), s("x")), s("c")),
    "in a group at a chain's end": lambda s: chain(s("a"), group(s("b"), s("x"))),
    "in a chord in a chord": lambda s: chord([chord([s("a"), s("x")], s("y")), s("c")], s("z")),
}

ENDED = re.compile(r"\[(\S+)\] (?:retry|succeeded|raised)")
RECEIVED = re.compile(r"\[\S+\] received")
"""As the worker's log says it."""

DOES = {"retry": "run", "wait": "run", "skip": "skip", "continue": "skip", "fail": "fail"}
"""What x does, once its lock is held by another."""

GOES_ON = {"first of a chain", "middle of a chain", "body of a chord, and on", "first of a chain in a chord"}
"""Where a message names the next in its chain: there `skip` fails, unless it is told to continue."""


def twin_of(policy: str, shape: str) -> str:
    return "fail" if policy == "skip" and shape in GOES_ON else DOES[policy]


LATE = ("alone", "middle of a chain", "member of a chord", "body of a chord, and on", "first of a chain in a chord")
WITHOUT_RESULTS = ("alone", "first of a chain", "last of a chain", "member of a group", "in a group at a chain's end")
"""A chord needs them, with and without locks."""

WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "acks early": ({}, tuple(SHAPES)),
    "acks late": ({"task_acks_late": True}, LATE),
    "ignored results": ({"task_ignore_result": True}, WITHOUT_RESULTS),
    "no results": ({"result_backend": "disabled://"}, WITHOUT_RESULTS),
}
"""Settings, and the shapes that are tried with them."""


@dataclass
class Case:
    """One canvas that was sent, and what came of it."""

    name: str
    steps: list[str]
    result: Any
    outcome: Any = None
    states: dict[str, Any] = field(default_factory=dict)
    ran: Counter[str] = field(default_factory=Counter)

    def of(self, label: str) -> str:
        """The task id of the step of that label."""
        return f"{self.name}-{label}"

    @property
    def seen(self) -> dict[str, Any]:
        return {"outcome": self.outcome, "states": self.states, "ran": dict(self.ran)}


class Canvases:
    """All cases on one worker."""

    def __init__(self, running: Project, shapes: tuple[str, ...], *, results: bool) -> None:
        self.running = running
        self.shapes = shapes
        self.results = results
        self.cases: dict[tuple[str, str], Case] = {}
        self.entries: list[dict[str, Any]] = []
        self._until = time.monotonic() + BOUND

    def send(self, kind: str, shape: str, task: str, *, one_lock: bool = False, **of_x: str) -> Case:
        """Send the canvas of that shape, all its steps on one lock or each on its own; x has arguments besides."""
        name, steps = uuid.uuid4().hex[:8], []
        signature = self.running.app.signature

        def step(label: str) -> Signature[Any]:
            steps.append(label)
            arguments = {"case": name, "label": label, "key": name if one_lock else f"{name}-{label}"}
            if label != "x":
                return signature(task, kwargs=arguments, task_id=f"{name}-{label}")
            x = signature(task, kwargs={**arguments, **of_x}, task_id=f"{name}-x")
            x.link(signature("called_back", kwargs={"case": name}))
            x.link_error(signature("erred_inline", kwargs={"case": name}))
            return x

        canvas = SHAPES[shape](step)
        canvas._app = self.running.app  # Celery 5.4 would take the current one for a chain that begins with a group
        canvas.link_error(signature("erred", kwargs={"case": name}))
        case = self.cases[kind, shape] = Case(name, steps, canvas.apply_async())
        return case

    def collect(self) -> None:
        """Wait until all have ended and the queue is empty, and note what came of each."""
        for case in self.cases.values():
            case.outcome, case.result = self._outcome(case.result) if self.results else None, None
        until(self._all_ended, "the end of all that was sent", seconds=BOUND)
        by_name = {case.name: case for case in self.cases.values()}
        self.entries = [json.loads(line) for line in self.running.record.read_text().splitlines()]
        for entry in self.entries:
            if entry["event"] == "start":
                by_name[entry["case"]].ran[entry["label"]] += 1
        for case in self.cases.values() if self.results else ():
            for label in case.steps:
                result: AsyncResult[Any] = self.running.app.AsyncResult(case.of(label))
                case.states[label] = [result.state, self._outcome(result) if result.ready() else None]

    def _all_ended(self) -> bool:
        """Whether no message is left, and none is to come from a task that runs."""
        output = self.running.workers[0].output
        received, ended = (len(pattern.findall(output)) for pattern in (RECEIVED, ENDED))
        # A message is said to be received before it is acknowledged: so no more lines, no more messages.
        return received == ended and not self._queued() and self.running.workers[0].output == output

    def _queued(self) -> int:
        """How many messages wait in the queue, or are not acknowledged yet."""
        with self.running.app.connection_for_read() as connection:
            channel: Any = connection.default_channel
            taken = [json.loads(each)[2] for each in channel.client.hvals("unacked")]
            return int(channel.client.llen(self.running.queue)) + taken.count(self.running.queue)

    def _outcome(self, result: Any) -> Any:
        """What `get` gives: a value, an error's name, or a list of those; "hangs" if it does neither in time."""
        if isinstance(result, GroupResult):
            return [self._outcome(one) for one in result.results or ()]
        try:
            return result.get(timeout=max(0.1, self._until - time.monotonic()))
        except Exception as error:  # noqa: BLE001
            return "hangs" if isinstance(error, TimedOut) else type(error).__name__


@pytest.fixture(scope="module", params=WAYS)
def canvases(
    request: pytest.FixtureRequest, redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Canvases]:
    special, shapes = WAYS[request.param]
    settings = {"imports": ["canvases"], "task_allow_error_cb_on_chord_header": True, **special}
    with project(redis.url, etcd.url, tmp_path_factory.mktemp("canvas"), **settings) as running:
        running.app.conf.task_allow_error_cb_on_chord_header = True
        running.app.conf.etcd_lock_namespace = running.queue
        running.worker("-P", "prefork", "-c", str(len(shapes) + 3))  # all that wait, and some to go on
        made = Canvases(running, shapes, results=shapes != WITHOUT_RESULTS)
        try:
            running.app.set_current()  # Celery 5.4 asks for it when it makes a chord of parts
            send_twins(made)
            send_free(made)
            contend(made, etcd.url)
        finally:
            state: Any = _state
            state._tls.current_app = None
        made.collect()
        yield made


def send_twins(canvases: Canvases) -> None:
    for how in ("run", "skip", "fail"):
        for shape in canvases.shapes:
            canvases.send(f"plain {how}", shape, "plain", how=how)


def send_free(canvases: Canvases) -> None:
    """What meets nobody's lock but, where they share one, that of the other steps of its own canvas."""
    for shape in canvases.shapes:
        # One by one they may share the lock even so: it is let go before the next is sent.
        canvases.send("free", shape, "fail_step", one_lock=shape.endswith("of a chain"))
        for policy in ("retry", "wait"):
            canvases.send(f"crowded {policy}", shape, f"{policy}_step", one_lock=True)


def of_key(key: str) -> None:
    """Its lock is that of the step of that key."""


def contend(canvases: Canvases, etcd_url: str) -> None:
    """Send each shape with each policy while x's lock is held; let it go when x has met it."""
    (worker,) = canvases.running.workers
    locking: Any = canvases.running.app.task(base=SingletonTask, name="locking", lock_key="/{key}", shared=False)(
        of_key
    )
    transport = connect(etcd_url)
    waiting: list[str] = []
    others: set[str] = set()
    with Session(transport, ttl=30) as session, ExitStack() as held:
        for policy in POLICIES:
            for shape in canvases.shapes:
                key = uuid.uuid4().hex[:8]
                lock = locking.lock_name((key,))
                held.enter_context(acquire(session, lock, blocking=False))
                x = canvases.send(policy, shape, f"{policy}_step", key=key).of("x")
                if policy == "wait":
                    waiting.append(f"{lock}/")
                else:
                    others.add(x)
        for prefix in waiting:
            contenders = partial(transport.range, Range(prefix, prefix_end(prefix)))
            until(lambda: len(contenders().kvs) == 2, "a waiter", seconds=BOUND)  # noqa: B023 - called at once
        until(lambda: others <= set(ENDED.findall(worker.output)), "the meeting of each lock", seconds=BOUND)
    transport.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_conflict_does_what_the_policy_says_and_nothing_else(canvases: Canvases, policy: str) -> None:
    """Results, states, bodies run and callbacks called are those of plain tasks, one of which does what x does."""
    seen = {shape: canvases.cases[policy, shape].seen for shape in canvases.shapes}
    assert "hangs" not in str(seen)
    assert all(case["ran"] for case in seen.values()), "the twins too have done something"
    assert seen == {shape: canvases.cases[f"plain {twin_of(policy, shape)}", shape].seen for shape in canvases.shapes}


@pytest.mark.parametrize("kind", ["free", "crowded retry", "crowded wait"])
def test_what_ends_by_running_is_as_without_the_lock(canvases: Canvases, kind: str) -> None:
    """Where nobody holds the lock, with all steps of a canvas on one lock too: as plain tasks, and one at a time."""
    seen = {shape: canvases.cases[kind, shape].seen for shape in canvases.shapes}
    assert seen == {shape: canvases.cases["plain run", shape].seen for shape in canvases.shapes}
    crowded = {canvases.cases[kind, shape].name for shape in canvases.shapes} if kind != "free" else set()
    inside: dict[str, set[str]] = {name: set() for name in crowded}
    for entry in canvases.entries:
        if entry["case"] in crowded and "key" in entry:
            running = inside[entry["case"]]
            assert not running - {entry["label"]}, "beside another"
            (running.add if entry["event"] == "start" else running.discard)(entry["label"])
