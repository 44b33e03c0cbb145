"""What is said of locks: Celery signals with their records, the log, the worker's events."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery
from celery.events.state import State

from celery_etcd_lock import Conflict, LockContended, LockLost, SingletonTask, signals
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.tasks import reports
from celery_etcd_lock.tasks.runtime import Runtime
from celery_etcd_lock.testing import held_elsewhere
from tests.workers import Project, until

NewProject = Callable[..., Project]

NAMES = ("lock_acquired", "lock_contended", "lock_released", "lock_lost", "session_opened", "session_lost")


@pytest.fixture
def app(etcd_lock_memory: MemoryEtcd) -> Iterator[Any]:
    made: Any = Celery("signals", broker="memory://", backend="cache+memory://", set_as_current=False)
    made.conf.update(task_always_eager=True, task_eager_propagates=True, etcd_lock_eager=True, etcd_lock_ttl=2)
    yield made
    made.close()


@pytest.fixture
def heard() -> Iterator[list[tuple[str, Any, Any]]]:
    """What was sent, as (signal, sender, record)."""
    told: list[tuple[str, Any, Any]] = []

    def receiver_of(name: str) -> Any:
        def receive(sender: Any, record: Any, **_: Any) -> None:
            told.append((name, sender, record))

        return receive

    receivers = {name: receiver_of(name) for name in NAMES}
    for name, receiver in receivers.items():
        getattr(signals, name).connect(receiver)
    yield told
    for name, receiver in receivers.items():
        getattr(signals, name).disconnect(receiver)


def task_of(app: Any, function: Callable[..., Any] = lambda: None, **options: Any) -> Any:
    def body(self: Any, number: int = 0) -> Any:
        return function()

    return app.task(base=SingletonTask, bind=True, name="t", unique_on="number", **options)(body)


class TestSignals:
    def test_of_a_run(self, app: Any, heard: list[tuple[str, Any, Any]]) -> None:
        """The first lock opens a session; then it is taken, and given back."""
        task = task_of(app)
        result = task.apply(task_id="one")
        result.get()
        assert [name for name, _, _ in heard] == ["session_opened", "lock_acquired", "lock_released"]
        (_, sender, opened), (_, by, acquired), (_, _, released) = heard
        assert sender is app
        assert by is app.tasks["t"]
        assert (opened.ttl, opened.key) == (2, Runtime.of(app).session().key)
        assert (acquired.task, acquired.task_id, acquired.lock) == ("t", "one", "/celery/locks/t/-")
        assert (acquired.mode, acquired.waits, acquired.waited) == ("exclusive", 0, 0.0)
        assert acquired.fencing_token > 0
        assert released.lock == acquired.lock
        assert released.answered
        assert 0 <= released.seconds < 60

    @pytest.mark.parametrize(
        ("policy", "outcome"),
        [
            (Conflict.skip(), ["skip"]),
            (Conflict.fail(), ["fail"]),
            (Conflict.wait(timeout=0.05, then="skip"), ["wait", "skip"]),
            (Conflict.retry(), ["fail"]),  # eager: there is no queue to put it back into
        ],
    )
    def test_of_a_conflict(
        self, app: Any, heard: list[tuple[str, Any, Any]], policy: Conflict, outcome: list[str]
    ) -> None:
        """Who holds it, and what becomes of the message."""
        task = task_of(app, on_conflict=policy)
        with held_elsewhere(task) as held:
            result = task.apply(throw=False)
        assert isinstance(result.result, LockContended) is ("fail" in outcome)
        records = [record for name, _, record in heard if name == "lock_contended"]
        assert [record.outcome for record in records] == outcome
        assert {(record.task, record.lock) for record in records} == {("t", held.name)}
        assert "pid" in records[0].holder
        if outcome[0] == "wait":
            assert records[0].pause == 0.05

    def test_of_a_loss(self, app: Any, heard: list[tuple[str, Any, Any]], etcd_lock_memory: MemoryEtcd) -> None:
        """When the lock is lost, and not when the body has ended; the session too is said to be lost. Once each."""

        def body() -> None:
            MemoryTransport(etcd_lock_memory).lease_revoke(Runtime.of(app).session().lease)
            until(lambda: any(name == "lock_lost" for name, _, _ in heard), "the signal, while the body runs")

        task = task_of(app, body, on_lost="warn")
        task.apply().get()
        until(lambda: any(name == "session_lost" for name, _, _ in heard), "the session's loss")
        names = [name for name, _, _ in heard]
        assert names.count("lock_lost") == names.count("session_lost") == 1
        assert "lock_released" not in names
        (lost,) = [record for name, _, record in heard if name == "lock_lost"]
        assert "expired or was revoked" in lost.reason
        assert (lost.task, lost.on_lost) == ("t", "warn")

    def test_closing_a_session_is_no_loss(self, app: Any, heard: list[tuple[str, Any, Any]]) -> None:
        """A worker that ends in good order has nothing to report."""
        task_of(app).apply().get()
        Runtime.of(app).close()
        assert "session_lost" not in [name for name, _, _ in heard]

    def test_observing_says_what_would_have_been(self, app: Any, heard: list[tuple[str, Any, Any]]) -> None:
        """``"observed"``, and the outcome that there would be."""
        app.conf.etcd_lock_enabled = "observe"
        task = task_of(app, on_conflict="skip")
        with held_elsewhere(task):
            task.apply().get()
        (record,) = [record for name, _, record in heard if name == "lock_contended"]
        assert (record.outcome, record.would) == ("observed", "skip")

    @pytest.mark.parametrize("name", NAMES[:3])
    def test_a_receiver_that_raises_harms_nothing(self, app: Any, name: str) -> None:
        """The body runs, the lock comes free, the caller gets its result."""

        def receiver(**_: Any) -> None:
            raise RuntimeError(name)

        getattr(signals, name).connect(receiver)
        try:
            task = task_of(app, lambda: 7, on_conflict="skip")
            with held_elsewhere(task):
                assert task.apply().get() is None
            assert task.apply().get() == 7
            assert task.apply().get() == 7, "free again"
        finally:
            getattr(signals, name).disconnect(receiver)

    def test_a_receiver_that_blocks_keeps_no_other_body_from_being_told(
        self, app: Any, etcd_lock_memory: MemoryEtcd
    ) -> None:
        """Two bodies lose their locks with their session; the receiver of the first loss takes its time."""
        release, told = threading.Event(), []

        def receiver(record: Any, **_: Any) -> None:
            told.append(record)
            release.wait(60)

        def body() -> None:
            inside.append(threading.get_ident())
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                time.sleep(0.01)

        inside: list[int] = []
        task = task_of(app, body)
        results: list[Any] = []

        def run(number: int) -> None:
            results.append(task.apply((number,), throw=False).result)

        signals.lock_lost.connect(receiver)
        app.finalize()  # Celery's lazy tasks are not made by two threads at once
        try:
            threads = [threading.Thread(target=run, args=(number,)) for number in (1, 2)]
            for thread in threads:
                thread.start()
            until(lambda: len(inside) == 2, "both bodies")
            MemoryTransport(etcd_lock_memory).lease_revoke(Runtime.of(app).session().lease)
            until(lambda: len(told) == 2, "both receivers")
        finally:
            release.set()
            for thread in threads:
                thread.join(60)
            signals.lock_lost.disconnect(receiver)
        assert [type(result) for result in results] == [LockLost, LockLost]

    def test_records_are_frozen(self) -> None:
        """A receiver cannot change what the next one is told."""
        record = signals.SessionLostRecord("/k", 1, "gone")
        with pytest.raises(AttributeError):
            record.reason = "no"  # type: ignore[misc]


class TestLog:
    def test_events_have_constant_names_and_their_record(self, app: Any, caplog: pytest.LogCaptureFixture) -> None:
        """What to grep for stands first, and the fields are there for a structured log. A skip is never silent."""
        caplog.set_level(logging.DEBUG, "celery_etcd_lock")
        task = task_of(app, on_conflict="skip")
        task.apply().get()
        with held_elsewhere(task):
            task.apply(task_id="two").get()
        lines = {record.getMessage().split(":")[0]: record for record in caplog.records}
        assert {"etcd_lock.session_opened", "etcd_lock.acquired", "etcd_lock.released", "etcd_lock.skipped"} <= set(
            lines
        )
        skipped = lines["etcd_lock.skipped"]
        assert skipped.levelno == logging.INFO
        assert "t[two] is skipped: /celery/locks/t/- is held by" in skipped.getMessage()
        assert skipped.__dict__["etcd_lock"]["outcome"] == "skip"

    def test_a_long_wait_is_said_once_with_the_holder(
        self, app: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In a slot: as soon as it is long. Put back: by the try that finds that it has become long, and no other."""
        monkeypatch.setattr(reports, "_LONG", 0.1)
        task = task_of(app, on_conflict=Conflict.wait(timeout=0.5, then="skip"))
        with held_elsewhere(task):
            task.apply().get()
        (said,) = [record for record in caplog.records if "etcd_lock.waits_long" in record.message]
        assert "has waited for" in said.message
        assert "is held by" in said.message
        caplog.clear()
        with held_elsewhere(task):
            for before in (0.0, 0.2):  # seconds, when it was last put back
                header = {"count": 1, "seconds": before, "at": time.time() - 0.15}
                task.apply(headers={"etcd_lock": header}, on_conflict="skip").get()
        assert [record.message.count("etcd_lock.waits_long") for record in caplog.records].count(1) == 1


@contextmanager
def events_of(project: Project) -> Iterator[list[dict[str, Any]]]:
    """The events of its workers, as a monitor gets them."""
    seen: list[dict[str, Any]] = []
    with project.app.connection_for_read() as connection:
        receiver = project.app.events.Receiver(connection, handlers={"*": seen.append})
        thread = threading.Thread(target=receiver.capture, kwargs={"wakeup": False}, daemon=True)
        thread.start()
        try:

            def probe() -> bool:
                with project.app.events.default_dispatcher(hostname="probe") as dispatcher:
                    dispatcher.send("test-probe", retry=False)
                return bool(seen)

            until(probe, "the monitor's first event")
            yield seen
        finally:
            receiver.should_stop = True
            thread.join(60)


def kinds(seen: list[dict[str, Any]], result: Any) -> list[str]:
    return [each["type"] for each in seen if each.get("uuid") == result.id and each["type"].startswith("lock-")]


class TestEvents:
    def test_monitors_see_them_and_the_states_stay(self, new_project: NewProject) -> None:
        """``worker -E``: each event is there with the task's id, and the task's state is Celery's own."""
        project = new_project()
        with events_of(project) as seen:
            project.worker("-P", "prefork", "-c", "2", "-E")
            first = project.send("skipping", 0, 2.0)
            until(lambda: project.runs("skipping"), "the start")
            second = project.send("skipping", 1)
            assert [second.get(timeout=60), first.get(timeout=60)] == ["skipped", 0]
            until(lambda: kinds(seen, first) == ["lock-acquired", "lock-released"], "the first's events")
            until(lambda: kinds(seen, second) == ["lock-contended"], "the second's event")
            done = [("task-succeeded", result.id) for result in (first, second)]
            until(lambda: {(e["type"], e.get("uuid")) for e in seen}.issuperset(done), "the ends")
        (contended,) = [event for event in seen if event["type"] == "lock-contended"]
        assert contended["outcome"] == "skip"
        assert f"skipping[{first.id}]" in contended["holder"]
        assert contended["hostname"].endswith("@test")
        state: Any = State()
        for event in seen:
            state.event(dict(event))
        assert {state.tasks[result.id].state for result in (first, second)} == {"SUCCESS"}

    def test_none_without_e(self, new_project: NewProject) -> None:
        """A worker whose events are off sends none of ours either."""
        project = new_project()
        with events_of(project) as seen:
            quiet = project.worker("-P", "prefork", "-c", "1")
            result = project.send("skipping", 0)
            assert result.get(timeout=60) == 0
            quiet.stop()
            project.worker("-P", "prefork", "-c", "1", "-E")
            other = project.send("skipping", 1)
            until(lambda: "lock-released" in kinds(seen, other), "the events of another worker")
            assert kinds(seen, result) == []
