"""One in the queue: publishing where nobody takes the messages, with real workers, and with an etcd in every state."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.beat import Scheduler
from kombu.exceptions import OperationalError

from celery_etcd_lock import ConfigError, DuplicateTaskError, LockContended, UnstableKeyError
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Put, Txn
from celery_etcd_lock.exceptions import EtcdUnavailable, LeaseNotFound
from celery_etcd_lock.tasks import queued
from celery_etcd_lock.tasks.marks import Mark, task_id_in
from celery_etcd_lock.tasks.message import addressed
from celery_etcd_lock.tasks.runtime import Runtime
from celery_etcd_lock.testing import EtcdServer
from tests.servers import RedisServer
from tests.tasks.publishing import IMPORTS, Publisher, publishing, race
from tests.workers import Project, overlaps, project, until

NewProject = Callable[..., Project]

SLACK = 10.0
"""How many times as long as promised a publish may take on this machine, which does other things too."""

PATIENT: dict[str, Any] = {"etcd_lock_timeout": 60}
"""So that who waits as anything else does would be found out."""


class TestLayout:
    def test_where_marks_are(self) -> None:
        """The public layout: a rolling deploy mixes versions."""
        assert Mark.queued("/celery/locks/app.sync/account_id=42", "app.sync", "i-1") == Mark(
            "/celery/queued/app.sync/account_id=42", b'{"task_id":"i-1"}'
        )
        assert Mark.waiting("/celery/locks/app.sync/account_id=42", "app.sync", "i-1") == Mark(
            "/celery/waiting/app.sync/account_id=42", b'{"task_id":"i-1"}'
        )
        assert Mark.queued("/celery/locks/@shared/import:42", "app.sync", "i-1").key == (
            "/celery/queued/app.sync/%2Fimport:42"
        )
        assert Mark.waiting("/celery/locks/@shared/import:42", "app.sync", "é").key == (
            "/celery/waiting/app.sync/%2Fimport:42"
        )
        assert Mark.queued("/n/locks/a/-", "a", "é").value == b'{"task_id":"\\u00e9"}'
        assert Mark.waiting("/n/locks/@shared/x", "@shared", "i").key == "/n/waiting/%40shared/%2Fx"

    def test_whose_a_mark_is(self) -> None:
        """An id goes through; what somebody else has put there is nobody's."""
        assert task_id_in(Mark.queued("/n/locks/a/-", "a", 'q"é').value) == 'q"é'
        for foreign in (b"", b"\xff", b"1", b"[]", b"{}", b'{"task_id":1}', b"mine"):
            assert task_id_in(foreign) == ""


@pytest.fixture(scope="module")
def idle(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    """A queue from which nobody takes anything."""
    with (
        project(redis.url, etcd.url, tmp_path_factory.mktemp("idle")) as one,
        publishing(one) as publisher,
    ):
        yield publisher


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key of the test's own."""
    return f"k{abs(hash(request.node.nodeid))}"


def published(publisher: Publisher, publish: Callable[[], Any]) -> int:
    """How many messages `publish` adds to the queue."""
    before = publisher.messages()
    publish()
    return publisher.messages() - before


class TestPublishing:
    def test_the_second_returns_the_first(self, idle: Publisher, key: str) -> None:
        """`delay`, `apply_async` and signatures of the same key: one message, one id; of another key, another."""
        first = idle.until_start.delay(1, key=key)
        assert published(idle, lambda: None) == 0
        others: list[Any] = []

        def publish() -> None:
            others.append(idle.until_start.delay(2, key=key))
            others.append(idle.until_start.apply_async((3,), {"key": key}, countdown=60))
            others.append(idle.until_start.apply_async((4, 0.1, key), eta=datetime.now(timezone.utc)))
            others.append(idle.until_start.apply_async((4,), {"key": key}, expires=60, task_id="given"))
            others.append(idle.until_start.s(5, key=key).delay())
            others.append(idle.until_start.s(6, key=key).set(countdown=1).apply_async())

        assert published(idle, publish) == 0
        assert {other.id for other in others} == {first.id}
        assert others[0].backend is idle.until_start.backend
        assert published(idle, lambda: idle.until_start.delay(1, key=key + "x")) == 1
        assert published(idle, lambda: idle.until_end.delay(1, key=key)) == 1, "another task"

    def test_beat_sends_one(self, idle: Publisher, key: str) -> None:
        """Beat's own way to send the entries of registered tasks."""
        idle.app.conf.beat_schedule = {"every": {"task": "until_end", "schedule": 1.0, "args": (1, 0.1, key)}}
        scheduler = Scheduler(idle.app)
        entry = scheduler.schedule["every"]
        assert published(idle, lambda: [scheduler.apply_async(entry) for _ in range(3)]) == 1

    def test_raise(self, idle: Publisher, key: str) -> None:
        """`on_duplicate="raise"`, of the task or for the call, says which message is queued."""
        first = idle.raises.delay(1, key=key)
        with pytest.raises(DuplicateTaskError, match="raises is queued already") as refused:
            idle.raises.delay(2, key=key)
        assert refused.value.task_id == first.id
        assert idle.raises.apply_async((2,), {"key": key}, on_duplicate="return").id == first.id
        idle.until_end.delay(1, key=key)
        with pytest.raises(DuplicateTaskError):
            idle.until_end.s(1, key=key).set(on_duplicate="raise").apply_async()
        with pytest.raises(ConfigError, match="perhaps 'raise'"):
            idle.raises.apply_async((2,), {"key": key}, on_duplicate="rais")

    def test_tasks_that_share_a_key_have_marks_of_their_own(self, idle: Publisher, key: str) -> None:
        """A `lock_key` with a leading slash: a message of one task does not do the work of another."""
        first = idle.shares_one.delay(1, key=key)
        assert idle.shares_other.delay(1, key=key).id != first.id
        assert idle.shares_one.delay(1, key=key).id == first.id
        keys = {mark.key for mark in idle.marks() if key in mark.key}
        assert keys == {f"/{idle.namespace}/queued/shares_{name}/%2Fshared%2F{key}" for name in ("one", "other")}

    def test_namespaces_are_apart(self, idle: Publisher, key: str) -> None:
        """Two projects on one etcd do not keep each other from publishing."""
        idle.until_start.delay(1, key=key)
        with publishing(idle.project, etcd_lock_namespace=idle.namespace + "-2") as other:
            assert published(idle, lambda: other.until_start.delay(1, key=key)) == 1
            assert len(other.marks()) == 1

    def test_hidden_arguments(self, idle: Publisher, key: str) -> None:
        """`etcd_lock_hide_arguments`: no argument shows in the key of the mark, and it works all the same."""
        with publishing(idle.project, etcd_lock_hide_arguments=True, etcd_lock_namespace=key) as hiding:
            first = hiding.until_start.delay(1, key="secret")
            assert hiding.until_start.delay(1, key="secret").id == first.id
            (mark,) = hiding.marks()
            assert "secret" not in mark.key
            assert "/queued/until_start/sha256-" in mark.key

    def test_how_long_a_mark_stands(self, idle: Publisher, key: str) -> None:
        """`etcd_lock_queued_ttl` from the eta on, but not for long after the message's own end."""

        def lasts(**options: Any) -> int:
            mine = f"{key}-{len(idle.marks())}"
            idle.until_start.apply_async((1,), {"key": mine}, **options)
            return idle.lasts(idle.mark(mine))

        day, hour = 86_400, 3_600
        assert day <= lasts() <= 1.6 * day
        assert 10 * day <= lasts(countdown=9 * day) <= 1.6 * 10 * day
        assert 10 * day <= lasts(eta=datetime.now(timezone.utc) + timedelta(days=9)) <= 1.6 * 10 * day
        assert (
            10 * day - 60 <= lasts(eta=(datetime.now(timezone.utc) + timedelta(days=9)).isoformat()) <= 1.6 * 10 * day
        )
        assert hour <= lasts(expires=hour) <= 1.6 * (hour + 60)
        assert hour <= lasts(expires=datetime.now(timezone.utc) + timedelta(seconds=hour)) <= 1.6 * (hour + 60)
        assert hour <= lasts(countdown=60, expires=hour) <= 1.6 * (hour + 60)
        assert lasts(expires=-5) <= 1.6 * 60 + 1
        assert lasts(eta=datetime(9999, 1, 1, tzinfo=timezone.utc)) > 9 * 365 * day

    def test_a_message_that_is_lost_blocks_for_the_ttl(self, idle: Publisher, key: str) -> None:
        """The queue is purged: the mark stands until its lease ends, then the task is published again."""
        with publishing(idle.project, etcd_lock_queued_ttl=2, etcd_lock_namespace=key) as brief:
            first = brief.until_start.delay(1)
            brief.purge()
            assert brief.until_start.delay(1).id == first.id
            until(lambda: not brief.marks(), "the end of its lease")
            assert published(brief, lambda: brief.until_start.delay(1)) == 1

    def test_many_at_once_make_one_message(self, idle: Publisher, key: str) -> None:
        """Two processes of eight threads each publish the same at once: exactly one message, and all know its id."""
        context = multiprocessing.get_context("spawn")
        gate, ids = context.Barrier(2), context.Queue()
        processes = [
            context.Process(
                target=race, args=(idle.project.broker_url, dict(idle.app.conf.changes or {}), key, gate, ids)
            )
            for _ in range(2)
        ]
        before = idle.messages()
        for process in processes:
            process.start()
        found = [ids.get(timeout=60) for _ in range(16)]
        for process in processes:
            process.join(60)
        assert idle.messages() - before == 2, "one, and the one by which they have warmed up"
        assert len(set(found)) == 1
        assert task_id_in((idle.mark(key) or pytest.fail("no mark")).value) == found[0]

    def test_a_foreign_mark_is_no_duplicate(self, idle: Publisher, key: str) -> None:
        """What somebody else has put under the key names no message: the task is published, unmarked."""
        transport = connect(idle.project.etcd_url)
        transport.txn(Txn([], [Put(f"/{idle.namespace}/queued/until_start/key={key}", b"x")]))
        transport.close()
        assert published(idle, lambda: idle.until_start.delay(1, key=key)) == 1

    def test_the_same_id_again_is_sent_again(self, idle: Publisher, key: str) -> None:
        """Beat sends a slot again under its id, if it is not certain that it did: never taken for a duplicate."""

        def publish() -> None:
            idle.until_start.apply_async((1,), {"key": key}, task_id=f"slot-{key}")

        assert published(idle, publish) == 1
        assert published(idle, publish) == 1

    def test_arguments_without_a_key_are_refused(self, idle: Publisher) -> None:
        """They would fail in the worker: so they do here, and nothing is sent. Not where locking only observes."""
        assert published(idle, lambda: None) == 0
        with pytest.raises(UnstableKeyError, match="until_start"):
            idle.until_start.apply_async((1,), {"key": object()}, serializer="pickle")
        with publishing(idle.project, etcd_lock_enabled="observe") as observing:
            sent = published(
                idle, lambda: observing.until_start.apply_async((1,), {"key": object()}, serializer="pickle")
            )
            assert sent == 1

    def test_arguments_that_do_not_fit_leave_no_mark(self, idle: Publisher, key: str) -> None:
        """Celery refuses to publish them; the mark goes with that."""
        with pytest.raises(TypeError):
            idle.until_start.delay(1, key=key, nonsense=2)
        assert idle.mark(key) is None

    def test_eager_runs_are_not_marked(self, idle: Publisher, key: str) -> None:
        """`task_always_eager` and `apply` have no queue."""
        with publishing(idle.project, task_always_eager=True, etcd_lock_namespace=key) as eager:
            assert eager.until_end.delay(1).state == "SUCCESS"
            assert eager.until_end.apply((1,)).state == "SUCCESS"
            assert eager.marks() == []

    def test_off_and_observing(self, idle: Publisher, key: str, caplog: pytest.LogCaptureFixture) -> None:
        """Off: no marks. Observing: all are published, and the log says which would not be."""
        with publishing(idle.project, etcd_lock_enabled=False, etcd_lock_namespace=key) as off:
            assert published(idle, lambda: [off.until_start.delay(1) for _ in range(2)]) == 2
            assert off.marks() == []
        with publishing(idle.project, etcd_lock_enabled="observe", etcd_lock_namespace=key) as observing:
            results: list[Any] = []
            assert published(idle, lambda: results.extend(observing.raises.delay(1) for _ in range(2))) == 2
            assert f"raises[{results[1].id}] is published; with etcd_lock_enabled=True it would not be" in caplog.text

    def test_what_is_not_published_is_said(self, idle: Publisher, key: str, caplog: pytest.LogCaptureFixture) -> None:
        """A line with a constant name, and both ids."""
        with caplog.at_level(logging.INFO, "celery_etcd_lock"):
            first = idle.until_start.delay(1, key=key)
            idle.until_start.apply_async((2,), {"key": key}, task_id="another")
        assert f"etcd_lock.duplicate: until_start[another] is not published: it is queued already, as {first.id}" in (
            caplog.text
        )

    @pytest.mark.parametrize("meanwhile", ["taken", "moved"])
    def test_a_worker_that_is_quicker_than_the_confirmation(self, idle: Publisher, key: str, meanwhile: str) -> None:
        """The message has begun, or ended, before its publisher confirms the mark: that changes nothing any more."""
        transport = connect(idle.project.etcd_url)
        running = transport.lease_grant(60).lease

        def publish(*_args: Any, task_id: str, **_options: Any) -> Any:
            mark = Mark.queued(idle.until_end.lock_name((1,), {"key": key}), "until_end", task_id)
            change = mark.delete() if meanwhile == "taken" else mark.put(running)
            assert transport.txn(Txn([mark.is_ours()], [change])).succeeded
            return idle.app.AsyncResult(task_id)

        headers = addressed({}, key, {})
        assert queued.send(idle.until_end, publish, (1,), {"key": key}, key, {"headers": headers}).id == key
        mark = idle.mark(key)
        assert (mark.lease if mark else None) == (None if meanwhile == "taken" else running)
        transport.lease_revoke(running)
        transport.close()

    def test_send_task_by_name_does_not_ask(self, idle: Publisher, key: str) -> None:
        """It never reaches the task's class."""
        idle.until_start.delay(1, key=key)
        assert published(idle, lambda: idle.app.send_task("until_start", (1,), {"key": key})) == 1


def canvases(t: Any, key: str) -> dict[str, Any]:
    """Every form in which Celery gives ids out before it sends, all of one key."""
    one, two, three = (t.until_start.si(number, 0.01, key=key) for number in (1, 2, 3))
    end = t.until_end.si(4, 0.01, key=key)
    return {
        "chain": chain(one, two, three),
        "chain of one": chain(one),
        "group": group(one, two, three),
        "chord": chord([one, two], t.total.s()),
        "chord body": chord([t.plain.s(1), t.plain.s(2)], one),
        "group, then one": group(t.plain.s(1), t.plain.s(2)) | one | two,
        "chain of groups": chain(one, group(two, three), t.total.s()),
        "chord in a chain": chain(t.plain.s(1), chord([one, end], two), three),
        "group of chains": group(chain(one, two), chain(three, end)),
        "nested chord": chord([chain(one, end), chord([two, three], t.total.s())], t.total.s()),
        "linked": t.plain.s(1).set(link=one),
        "links": t.plain.s(1).set(link=[one, two]),
        "linked chain": chain(t.plain.s(1), t.plain.s().set(link=end)),
    }


FORMS = [
    "chain", "chain of one", "group", "chord", "chord body", "group, then one", "chain of groups", "chord in a chain",
    "group of chains", "nested chord", "linked", "links", "linked chain",
]  # fmt: skip


@pytest.fixture(scope="module")
def busy(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    """A project with a worker of four children, for all tests that leave it as it was."""
    with (
        project(redis.url, etcd.url, tmp_path_factory.mktemp("busy"), etcd_lock_ttl=5, **IMPORTS) as one,
        publishing(one) as publisher,
    ):
        one.worker()
        yield publisher


def started(publisher: Publisher, result: Any) -> Any:
    """The run of `result`, once it has begun."""
    return until(lambda: [run for run in publisher.project.runs() if run.id == result.id], "its start")


class TestWorking:
    def test_until_start(self, busy: Publisher, key: str) -> None:
        """From the moment the body begins, the next may be published; the mark of that one stays."""
        first = busy.until_start.delay(1, 2.0, key=key)
        started(busy, first)
        assert busy.mark(key) is None
        second = busy.until_start.delay(2, key=key)
        assert second.id != first.id
        assert busy.until_start.delay(3, key=key).id == second.id
        assert [first.get(timeout=60), second.get(timeout=60)] == [1, 2]
        assert busy.mark(key) is None

    def test_until_end(self, busy: Publisher, key: str) -> None:
        """Until the body has ended, what is published is that run; then a new one."""
        first = busy.until_end.delay(1, 1.5, key=key)
        started(busy, first)
        assert busy.lasts(busy.mark(key)) <= 10, "on the lease of the process"
        assert busy.until_end.delay(2, key=key).id == first.id
        assert first.get(timeout=60) == 1
        until(lambda: busy.mark(key) is None, "the end of the mark")
        assert busy.until_end.delay(3, key=key).get(timeout=60) == 3

    def test_the_mark_rides_with_the_lock(self, busy: Publisher, key: str) -> None:
        """The transaction that takes the lock deletes the mark: one revision for both."""
        before = busy.project.etcd_revision()
        busy.until_start.delay(1, key=key).get(timeout=60)
        events = busy.history(before, lambda seen: len(seen) >= 4)
        taken = next(kind_at for name, *kind_at in events if f"locks/until_start/key={key}/" in name)
        freed = [kind_at for name, *kind_at in events if name.endswith(f"queued/until_start/key={key}")][-1]
        assert taken[0] == "put"
        assert freed == ["delete", taken[1]]

    @pytest.mark.parametrize("how", ["success", "failure", "ignore", "reject", "replace"])
    def test_until_end_ends_with_every_end(self, busy: Publisher, key: str, how: str) -> None:
        """However the body ends, the mark is gone then."""
        result = busy.ends_until_end.delay(1, how, key=key)
        started(busy, result)
        until(lambda: busy.mark(key) is None, "the end of the mark")

    @pytest.mark.parametrize("task", ["ends_from_start", "ends_until_end"])
    def test_a_tasks_own_retry_passes(self, busy: Publisher, key: str, task: str) -> None:
        """The retry is sent though the mark stands, and runs; until its end the mark is this id's."""
        first = busy.tasks[task].delay(1, "retry", key=key)
        until(lambda: first.state == "RETRY", "its retry")
        if task == "ends_until_end":
            day = 86_400
            until(lambda: busy.lasts(busy.mark(key)) >= day, "the mark's return to a long lease")
            assert busy.ends_until_end.delay(2, "success", key=key).id == first.id
        assert first.get(timeout=60) == 1
        assert [run.how for run in busy.project.runs() if run.id == first.id] == ["Retry", "returned"]
        until(lambda: busy.mark(key) is None, "the end of the mark")

    @pytest.mark.parametrize("form", FORMS)
    def test_every_canvas_ends(self, busy: Publisher, key: str, form: str) -> None:
        """Members of canvases all run, though a message of their key is queued: every result comes."""
        standing = busy.until_start.apply_async((0,), {"key": key}, countdown=600)
        until_end = busy.until_end.apply_async((0,), {"key": key}, countdown=600)
        result = canvases(busy, key)[form].apply_async()
        result.get(timeout=60, disable_sync_subtasks=False)
        assert task_id_in((busy.mark(f"until_start/key={key}") or pytest.fail("gone")).value) == standing.id
        assert task_id_in((busy.mark(f"until_end/key={key}") or pytest.fail("gone")).value) == until_end.id
        standing.revoke()
        until_end.revoke()
        if form.startswith("link"):
            until(lambda: [run for run in busy.project.runs() if f"key={key}/" in run.key], "the callback's run")

    def test_a_frozen_signature_passes(self, busy: Publisher, key: str) -> None:
        """Somebody may wait for the id that `freeze` gave out."""
        standing = busy.until_start.apply_async((0,), {"key": key}, countdown=600)
        signature = busy.until_start.si(5, key=key)
        promised = signature.freeze()
        signature.apply_async()
        assert promised.get(timeout=60) == 5
        standing.revoke()

    def test_a_body_sends_its_own_task(self, busy: Publisher, key: str) -> None:
        """Under "until_start" the running one is no duplicate."""
        following = busy.follows.delay(1, key=key).get(timeout=60)
        assert busy.app.AsyncResult(following).get(timeout=60) == ""

    @pytest.mark.parametrize("task", ["unlucky", "skipped"])
    def test_what_does_not_run_leaves_no_mark(self, busy: Publisher, key: str, task: str) -> None:
        """Skipped because of the lock, or failed: the next may be published."""
        holder = busy.in_the_way.delay(1, 2.0, key=key)
        started(busy, holder)
        result = busy.tasks[task].delay(2, key=key)
        if task == "unlucky":
            with pytest.raises(LockContended):
                result.get(timeout=60)
        else:
            assert result.get(timeout=60) is None
        assert busy.mark(key) is None
        assert holder.get(timeout=60) == 1

    def test_a_message_that_waits_for_the_lock_keeps_its_mark(self, busy: Publisher, key: str) -> None:
        """Put back, again and again, it stays the one in the queue."""
        first = busy.until_start.delay(1, 1.5, key=key)
        started(busy, first)
        second = busy.until_start.delay(2, key=key)
        until(lambda: second.state == "RETRY", "its wait")
        assert busy.until_start.delay(3, key=key).id == second.id
        assert second.get(timeout=60) == 2
        assert first.get(timeout=60) == 1
        assert busy.mark(key) is None

    def test_waiting_in_the_slot_keeps_the_mark_until_it_is_over(self, busy: Publisher, key: str) -> None:
        """`Conflict.wait`: queued until it has the lock."""
        first = busy.waits.delay(1, 1.5, key=key)
        started(busy, first)
        second = busy.waits.delay(2, 1.0, key=key)
        assert busy.waits.delay(3, key=key).id == second.id
        started(busy, second)
        assert busy.mark(key) is None
        assert second.get(timeout=60) == 2

    def test_revoked(self, busy: Publisher, key: str) -> None:
        """A message that was revoked before it ran frees its key, when the worker throws it away."""
        first = busy.until_start.apply_async((1,), {"key": key}, countdown=2)
        first.revoke()
        assert busy.mark(key) is not None
        until(lambda: busy.mark(key) is None, "the end of the mark")

    def test_expired(self, busy: Publisher, key: str) -> None:
        """So does one that has expired."""
        busy.until_end.apply_async((1,), {"key": key}, countdown=1, expires=0.2)
        assert busy.mark(key) is not None
        until(lambda: busy.mark(key) is None, "the end of the mark")

    def test_terminated(self, busy: Publisher, key: str) -> None:
        """`revoke(terminate=True)` in the middle of the body."""
        first = busy.until_end.delay(1, 600.0, key=key)
        started(busy, first)
        first.revoke(terminate=True)
        until(lambda: busy.mark(key) is None, "the end of the mark")

    def test_killed(self, busy: Publisher, key: str) -> None:
        """SIGKILL to the process in its body: the mark goes, at the latest with the lease of the session."""
        first = busy.until_end.delay(1, 600.0, key=key)
        (run,) = started(busy, first)
        os.kill(run.pid, signal.SIGKILL)
        until(lambda: busy.mark(key) is None, "the end of the mark")

    def test_killed_while_it_waits(self, busy: Publisher, key: str) -> None:
        """SIGKILL before it has the lock, its message acknowledged: it will never run, and the main process says so."""
        first = busy.waits.delay(1, 5.0, key=key)
        (holder,) = started(busy, first)
        second = busy.waits.delay(2, key=key)
        until(lambda: second.state == "STARTED" or busy.project.workers[0].output.count(second.id), "its start")
        pids = {pid for pid in children(busy.project) if pid != holder.pid}
        until(lambda: contenders(busy, key) == 2, "its place in line")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: busy.mark(key) is None, "the end of the mark")
        assert first.get(timeout=60) == 1


def children(one: Project) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(one.workers[0].process.pid).children()]


def contenders(publisher: Publisher, key: str) -> int:
    return len([kv for kv in publisher.marks("locks") if f"key={key}/" in kv.key])


class TestWorkerDown:
    def test_marks_survive_until_a_worker_comes(self, new_project: NewProject, key: str) -> None:
        """Published with no worker there: one message; when a worker starts it runs, once, and the key is free."""
        one = new_project(**IMPORTS)
        with publishing(one) as publisher:
            results = [publisher.until_end.delay(number, key=key) for number in range(3)]
            assert publisher.messages() == 1
            one.worker("-P", "threads", "-c", "2")
            assert [result.get(timeout=60) for result in results] == [0, 0, 0]
            until(lambda: not publisher.marks(), "the end of the mark")
            assert len(one.runs()) == 1
            assert overlaps(one.runs()) == []


class TestBrokerDown:
    def test_a_publish_that_fails_leaves_no_mark(self, etcd: EtcdServer, tmp_path: Path, key: str) -> None:
        """The broker's error comes through, and the next attempt is not taken for a duplicate."""
        with (
            RedisServer() as own,
            project(own.url, etcd.url, tmp_path) as one,
            publishing(one, broker_transport_options={"max_retries": 1, "interval_start": 0}) as publisher,
        ):
            own.stop()
            for _ in range(2):
                with pytest.raises(OperationalError):
                    publisher.until_start.apply_async((1,), {"key": key}, retry=False, ignore_result=True)
                assert publisher.marks() == []
            own.start()
            publisher.until_start.delay(1, key=key)
            assert (publisher.messages(), len(publisher.marks())) == (1, 1)


def timed(publish: Callable[[], Any]) -> float:
    began = time.monotonic()
    publish()
    return time.monotonic() - began


class TestEtcdAway:
    @pytest.fixture
    def own(self) -> Iterator[EtcdServer]:
        with EtcdServer() as server:
            yield server

    @pytest.mark.parametrize("how", ["stop", "pause"])
    def test_publishing_goes_on(
        self,
        own: EtcdServer,
        redis: RedisServer,
        tmp_path: Path,
        how: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """etcd ends, or hangs: the first publish waits a second at most, the next hundred not at all; one line says
        it. When etcd is back, there are marks again."""
        with project(redis.url, own.url, tmp_path, **PATIENT) as one, publishing(one) as publisher:
            publisher.until_start.delay(0, key="before")
            getattr(own, how)()
            first = timed(lambda: publisher.until_start.delay(1))
            assert first < queued.PATIENCE * SLACK
            if how == "pause":
                assert first > queued.PATIENCE / 2, "it was waited for"
            hundred = timed(lambda: [publisher.until_start.delay(number) for number in range(100)])
            assert hundred < 3 * queued.PATIENCE * SLACK
            assert caplog.text.count("etcd_lock.unmarked") == 1
            own.resume() if how == "pause" else own.start()
            assert publisher.messages() == 102

            def marked() -> bool:
                publisher.until_start.delay(1, key="after")
                return publisher.mark("after") is not None

            until(marked, "the first mark")
            assert "etcd is back after" in caplog.text

    def test_a_claim_without_an_answer_cannot_be_carried_out_late(
        self, idle: Publisher, key: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its message may have begun by then: the lease that it was to hang on is revoked."""
        with publishing(idle.project, etcd_lock_namespace=key) as hiccuping:
            transport = Runtime.of(hiccuping.app).transport()
            late: list[Txn] = []

            def swallowed(txn: Txn, *, timeout: float | None = None) -> Any:
                late.append(txn)
                raise EtcdUnavailable("no answer", True)

            with monkeypatch.context() as patched:
                patched.setattr(transport, "txn", swallowed)
                assert published(idle, lambda: hiccuping.until_start.delay(1)) == 1

            def refused() -> bool:
                try:
                    transport.txn(late[0])
                except LeaseNotFound:
                    return True
                return False

            until(refused, "the end of the lease", seconds=20)  # by itself it would live for longer
            assert hiccuping.marks() == []

    def test_dead_hosts_and_other_servers(self, idle: Publisher, key: str) -> None:
        """A port that nobody listens at, a server that never says a word, an address that swallows packets, one that
        is no etcd: within the second, and published."""
        silent = socket.create_server(("127.0.0.1", 0), backlog=0)
        urls = [
            "http://127.0.0.1:1",
            f"http://127.0.0.1:{silent.getsockname()[1]}",
            "http://10.255.255.1:2379",
            idle.project.broker_url.replace("redis://", "http://"),
        ]
        for url in urls:
            with publishing(idle.project, etcd_lock_endpoints=url, **PATIENT) as lost:
                took = timed(partial(lost.until_start.delay, 1, key=key))
                assert took < queued.PATIENCE * SLACK, url
        silent.close()

    def test_threads_do_not_queue_behind_each_other(self, own: EtcdServer, redis: RedisServer, tmp_path: Path) -> None:
        """Eight threads publish at once while etcd hangs, all needing a lease: none waits for the others' seconds."""
        with project(redis.url, own.url, tmp_path, **PATIENT) as one, publishing(one) as publisher:
            own.pause()
            took: list[float] = []

            def publish(number: int) -> None:
                took.append(timed(lambda: publisher.until_start.delay(number, key=f"k{number}")))

            threads = [threading.Thread(target=publish, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert max(took) < queued.PATIENCE * SLACK
            assert publisher.messages() == 8
            own.resume()

    def test_the_worker_ends_what_it_could_not_end_at_once(
        self, own: EtcdServer, redis: RedisServer, tmp_path: Path
    ) -> None:
        """etcd is away when a body ends: the mark is gone soon after it is back, though the process lives."""
        settings: dict[str, Any] = {"etcd_lock_ttl": 30, "etcd_lock_timeout": 1, **IMPORTS}
        with project(redis.url, own.url, tmp_path, **settings) as one, publishing(one) as publisher:
            one.worker("-P", "threads", "-c", "2")
            result = publisher.until_end.delay(1, 1.5)
            started(publisher, result)
            own.stop()
            assert result.get(timeout=60) == 1
            own.start()
            until(lambda: publisher.marks() == [], "the end of the mark")

    def test_a_run_without_a_lock_ends_its_mark(self, own: EtcdServer, redis: RedisServer, tmp_path: Path) -> None:
        """`on_unavailable="run"`: the mark goes when etcd is back."""
        settings: dict[str, Any] = {"etcd_lock_timeout": 0.5, **IMPORTS}
        with project(redis.url, own.url, tmp_path, **settings) as one, publishing(one) as publisher:
            result = publisher.unlocked.delay(1)
            own.stop()
            one.worker("-P", "threads", "-c", "2")
            assert result.get(timeout=60) == 1
            own.start()
            until(lambda: publisher.marks() == [], "the end of the mark")
