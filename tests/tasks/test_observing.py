"""`etcd_lock_enabled="observe"`: nothing is prevented or delayed, and what would have been is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from celery_etcd_lock import Conflict, SingletonTask, signals
from celery_etcd_lock.tasks.outage import Outage
from celery_etcd_lock.testing import EtcdServer, held_elsewhere, memory_locks
from tests.clock import Clock
from tests.workers import Project, overlaps, until

NewProject = Callable[..., Project]

BOUND = 120
"""Seconds, several times what anything here takes."""


@pytest.fixture
def app() -> Iterator[Any]:
    made: Any = Celery("observed", broker="memory://", backend="cache+memory://", set_as_current=True)
    made.conf.update(
        etcd_lock_endpoints="http://127.0.0.1:9", etcd_lock_eager=True, etcd_lock_enabled="observe", etcd_lock_ttl=30
    )
    with memory_locks():
        yield made
    made.close()


@pytest.fixture
def records() -> Iterator[list[Any]]:
    """Those of all signals of locks."""
    seen: list[Any] = []

    def keep(record: Any, **_: Any) -> None:
        seen.append(record)

    sent = [getattr(signals, f"lock_{kind}") for kind in ("acquired", "contended", "released", "lost")]
    for signal in sent:
        signal.connect(keep, weak=False)
    yield seen
    for signal in sent:
        signal.disconnect(keep)


@pytest.mark.parametrize(
    ("options", "would"),
    [
        ({"on_conflict": "fail"}, "fail"),
        ({"on_conflict": "skip"}, "skip"),
        ({"on_conflict": Conflict.wait(timeout=600)}, "wait"),
        ({"on_conflict": "fail", "lock_limit": 1}, "fail"),
        ({"on_conflict": "skip", "lock_at_least_for": 5, "lock_at_most_for": 60}, "skip"),
    ],
)
def test_what_each_policy_would_have_done(app: Any, records: list[Any], options: dict[str, Any], would: str) -> None:
    """The body runs, at once; one record says what would have become of it, and where the lock is free it is taken."""

    @app.task(base=SingletonTask, name="observed", bind=True, **options)
    def observed(self: Any) -> bool:
        return bool(self.lock.key)

    with held_elsewhere(observed):
        assert observed.apply().get() is False
    (record,) = records
    assert (record.outcome, record.would) == ("observed", would)
    records.clear()
    assert observed.apply().get() is True
    assert [type(record).__name__ for record in records] == ["AcquiredRecord", "ReleasedRecord"]


def test_what_would_fail_runs(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A key that cannot be made, a function for it that raises, options in a header that cannot be meant: all run."""

    def wrong(thing: Any) -> str:
        raise KeyError("no such thing")

    @app.task(base=SingletonTask, name="unstable", bind=True)
    def unstable(self: Any, thing: Any) -> bool:
        return bool(self.lock.is_held())

    @app.task(base=SingletonTask, name="raising", lock_key=wrong)
    def raising(thing: Any) -> bool:
        return True

    bad = {"etcd_lock": {"on_conflict": "skipp"}}
    assert unstable.apply((object(),)).get() is True
    assert raising.apply((1,)).get() is True
    assert super(SingletonTask, unstable).apply((1,), headers=bad).get() is True
    said = [record.getMessage() for record in caplog.records if "etcd_lock.observed" in record.getMessage()]
    assert [
        ("fail: UnstableKeyError" in line, "fail: KeyError" in line, "fail: ConfigError" in line) for line in said
    ] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert all("with etcd_lock_enabled=True it would fail" in line for line in said)


def test_a_lock_held_for_too_long_ends_nobody(app: Any, records: list[Any]) -> None:
    """Its loss is said, as a warning, and the body goes on, whatever its `on_lost`."""

    @app.task(base=SingletonTask, name="slow", lock_at_most_for=0.1, on_lost="abort")
    def slow() -> str:
        until(lambda: [each for each in records if type(each) is signals.LostRecord], "the loss")
        return "ended"

    assert slow.apply(throw=True).get() == "ended"
    (lost,) = [each for each in records if type(each) is signals.LostRecord]
    assert "lock_at_most_for=0.1" in lost.reason
    assert lost.on_lost == "warn"


def test_an_etcd_that_hangs_holds_nobody_up(new_project: NewProject) -> None:
    """One task in thirty seconds waits for it, a second at most; one word at the beginning, and one at the end."""
    with EtcdServer() as own:
        made = new_project(own.url, etcd_lock_enabled="observe", etcd_lock_ttl=3)
        worker = made.worker("-P", "threads", "-c", "4")
        assert made.send("failing", 0, 0.0).get(timeout=BOUND) == 0
        own.pause()
        began = time.monotonic()
        results = [made.send("failing", number, 0.0, key=f"k{number}") for number in range(300)]
        assert [result.get(timeout=BOUND) for result in results] == list(range(300))
        assert time.monotonic() - began < 45, "300 tasks, four at a time: 75 s and more if each waited a second"
        assert worker.output.count("etcd_lock.unavailable") == 1
        said = worker.output[worker.output.index("etcd_lock.unavailable") :]
        assert 'run, as every task is under etcd_lock_enabled="observe"' in said.splitlines()[1]
        own.resume()


def test_many_at_once_and_no_fewer(new_project: NewProject) -> None:
    """All that overlaps without locking does, and for each that began beside another one line says so."""
    made = new_project(etcd_lock_enabled="observe")
    worker = made.worker("-P", "threads", "-c", "8")
    results = [made.send(task, number, 1.0) for task in ("retrying", "waiting", "failing") for number in range(2)]
    assert [result.get(timeout=BOUND) for result in results] == [0, 1] * 3
    for task, would in (("retrying", "be put back"), ("waiting", "wait"), ("failing", "fail")):
        assert len(overlaps(made.runs(task))) == worker.output.count(f"it would {would}: /{made.queue}/locks/{task}/")


class TestRespite:
    def test_one_in_thirty_seconds(self, app: Any) -> None:
        """After a failure nobody asks for so long, then one does; an answer ends it."""
        from celery_etcd_lock import EtcdUnavailable
        from celery_etcd_lock.settings import Settings

        clock = Clock()
        outage = Outage(Settings.from_app(app), clock)
        assert outage.may_try()
        outage.affects("t", EtcdUnavailable("away"), "observe")
        assert not outage.may_try()
        clock.now += 31
        assert outage.may_try()
        assert not outage.may_try()
        clock.now += 31
        assert outage.may_try()
        outage.over()
        assert outage.may_try()
        assert outage.may_try()
