"""One runs, one waits, all others end at once: the order of claims and acquires, staged; and real workers and beat."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.app.task import Context

from celery_etcd_lock import LockContended
from celery_etcd_lock.etcd.api import Txn
from celery_etcd_lock.exceptions import EtcdUnavailable
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.tasks import standing
from celery_etcd_lock.tasks.marks import task_id_in
from celery_etcd_lock.tasks.message import HEADER
from celery_etcd_lock.tasks.runtime import Runtime
from celery_etcd_lock.tasks.standing import Standing
from celery_etcd_lock.testing import EtcdServer
from tests.servers import RedisServer
from tests.tasks.publishing import IMPORTS, Publisher, publishing
from tests.workers import Project, overlaps, project, until


@pytest.fixture(scope="module")
def publisher(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    """A project with a worker of four children, for all tests that leave it as it was."""
    with (
        project(redis.url, etcd.url, tmp_path_factory.mktemp("coalesce"), etcd_lock_ttl=5, **IMPORTS) as one,
        publishing(one) as opened,
    ):
        one.worker()
        yield opened


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key of the test's own."""
    return f"k{abs(hash(request.node.nodeid))}"


def started(publisher: Publisher, result: Any) -> Any:
    return until(lambda: [run for run in publisher.project.runs() if run.id == result.id], "its start")[0]


class TestOrder:
    """`Standing` in one process, each step where the test wants it."""

    def turn(
        self, publisher: Publisher, key: str, task_id: str, *, count: int = 0, task: str = "coalesces"
    ) -> Standing:
        made = publisher.tasks[task]
        request = Context({"id": task_id, "headers": {HEADER: {"of": task_id, "count": count}}})
        return Standing(Runtime.of(made.app), made, request, made.lock_name((0,), {"key": key}), coalesces=True)

    @contextmanager
    def held(self, publisher: Publisher, key: str, turn: Standing) -> Iterator[Any]:
        """The lock, by a run whose turn it is."""
        runtime = Runtime.of(publisher.app)
        session = runtime.session()
        name = publisher.coalesces.lock_name((0,), {"key": key})
        with acquire(session, name, blocking=False, rider=turn.rider(session)) as held:
            turn.begins(held, ridden=True)
            yield held

    def waiter(self, publisher: Publisher, key: str) -> str:
        mark = publisher.mark(f"coalesces/key={key}", "waiting")
        return task_id_in(mark.value) if mark else ""

    def test_the_first_waits_and_the_others_do_not(self, publisher: Publisher, key: str) -> None:
        """The first claim is granted, and again each time it comes back; the others find it."""
        by_holder = LockContended("lock", "holder")
        assert not self.turn(publisher, key, "a").others_wait(by_holder)
        assert self.turn(publisher, key, "b").others_wait(by_holder)
        assert not self.turn(publisher, key, "a", count=1).others_wait(by_holder)
        assert self.turn(publisher, key, "b", count=1).others_wait(by_holder), "it had been away for too long"
        assert self.waiter(publisher, key) == "a"

    def test_of_many_at_once_one_waits(self, publisher: Publisher, key: str) -> None:
        """Sixteen threads claim at once."""
        turns = [self.turn(publisher, key, f"t{n}") for n in range(16)]
        gate, answers = threading.Barrier(16), []

        def claim(turn: Standing) -> None:
            gate.wait(30)
            answers.append(turn.others_wait(LockContended("lock", "holder")))

        threads = [threading.Thread(target=claim, args=(turn,)) for turn in turns]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers) == [False, *[True] * 15]

    def test_when_the_waiter_begins_the_next_may_wait(self, publisher: Publisher, key: str) -> None:
        """The mark goes with the lock's transaction, and whoever comes while the new one runs is the next waiter."""
        self.turn(publisher, key, "a").others_wait(LockContended("lock", "holder"))
        before = publisher.project.etcd_revision()
        with self.held(publisher, key, self.turn(publisher, key, "a", count=1)) as held:
            assert held.rode
            assert publisher.project.etcd_revision() == before + 1
            assert self.waiter(publisher, key) == ""
            assert not self.turn(publisher, key, "b").others_wait(LockContended("lock", "a"))
        assert self.waiter(publisher, key) == "b"

    def test_the_mark_of_the_holder_proves_nothing(self, publisher: Publisher, key: str) -> None:
        """A mark of one who has the lock already is on its way out: nobody is skipped for it."""
        self.turn(publisher, key, "a").others_wait(LockContended("lock", "holder"))
        by_a = LockContended("lock", "a")
        by_a.task_id = "a"
        assert not self.turn(publisher, key, "b").others_wait(by_a)
        assert self.waiter(publisher, key) == "b"
        self.turn(publisher, key, "a", count=1).ends(None)
        assert self.waiter(publisher, key) == "b", "the end of its turn takes away its own only"

    def test_the_same_task_id_claims_nothing(self, publisher: Publisher, key: str) -> None:
        """Another copy of the message that runs: put back, whoever waits."""
        by_a = LockContended("lock", "a")
        by_a.task_id = "a"
        assert not self.turn(publisher, key, "a").others_wait(by_a)
        assert self.waiter(publisher, key) == ""

    def test_a_claim_without_an_answer_that_comes_late_does_nothing(
        self, publisher: Publisher, key: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The answer stays out, so the message is put back; sent when the next epoch has begun, the claim fails."""
        session = Runtime.of(publisher.app).session()
        late: list[Txn] = []

        def swallowed(txn: Txn, *, timeout: float | None = None) -> Any:
            late.append(txn)
            raise EtcdUnavailable("no answer", True)

        epoch = session.epoch
        with monkeypatch.context() as patched:
            patched.setattr(session, "txn", swallowed)
            assert not self.turn(publisher, key, "a").others_wait(LockContended("lock", "holder"))
        until(lambda: session.epoch > epoch, "the next epoch")
        assert not session.txn(late[0]).succeeded
        assert self.waiter(publisher, key) == ""

    def test_the_mark_of_a_waiter_that_is_lost_goes(
        self, publisher: Publisher, key: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its lease bounds for how long it makes the others skip."""
        monkeypatch.setattr(standing, "WAITS_FOR", 2.0)
        self.turn(publisher, key, "lost").others_wait(LockContended("lock", "holder"))
        assert self.turn(publisher, key, "b").others_wait(LockContended("lock", "holder"))
        until(lambda: not self.turn(publisher, key, "b").others_wait(LockContended("lock", "holder")), "its end")
        assert self.waiter(publisher, key) == "b"

    def test_it_stands_longer_than_any_countdown(self) -> None:
        """Else a waiter would be forgotten while it sits out its own."""
        from celery_etcd_lock import Conflict

        longest = max(Conflict.coalesce().decide(waits=n, random=lambda: 0.999).countdown for n in range(99))  # type: ignore[union-attr]
        assert longest + 10 <= standing.WAITS_FOR

    def test_tasks_that_share_a_lock_have_waiters_of_their_own(self, publisher: Publisher, key: str) -> None:
        """The one that waits does the work of its own task."""
        by_holder = LockContended("lock", "holder")
        assert not self.turn(publisher, key, "a", task="coalesces_too").others_wait(by_holder)
        assert not self.turn(publisher, key, "b", task="coalesces_else").others_wait(by_holder)
        assert self.turn(publisher, key, "c", task="coalesces_else").others_wait(by_holder)


class TestWorkers:
    def test_ten_at_once(self, publisher: Publisher, key: str) -> None:
        """Of ten one runs, one waits and runs, and eight end at once with a SUCCESS that says nothing."""
        holder = publisher.coalesces.delay(0, 3.0, key=key)
        started(publisher, holder)
        results = [publisher.coalesces.delay(number, key=key) for number in range(1, 10)]
        waiting = until(lambda: [result for result in results if result.state == "RETRY"], "the waiter")
        until(lambda: sum(result.ready() for result in results) == 8, "the end of the others")
        assert holder.state != "SUCCESS", "at once"
        assert len(waiting) == 1
        values = [result.get(timeout=60) for result in results]
        assert sorted(values, key=bool) == [None] * 8 + [results.index(waiting[0]) + 1]
        runs = [run for run in publisher.project.runs("coalesces") if run.id in {holder.id, *(r.id for r in results)}]
        assert len(runs) == 2
        assert overlaps(runs) == []
        assert publisher.mark(f"key={key}", "waiting") is None
        until(lambda: publisher.project.workers[0].output.count(f"key={key} is held by") >= 8, "the log of each skip")

    def test_whoever_comes_while_the_waiter_runs_is_the_next(self, publisher: Publisher, key: str) -> None:
        """Nobody is skipped for one who has begun: the work that came in meanwhile is done."""
        first = publisher.coalesces.delay(0, 1.0, key=key)
        started(publisher, first)
        second = publisher.coalesces.delay(1, 2.0, key=key)
        started(publisher, second)
        third = publisher.coalesces.delay(2, 0.1, key=key)
        fourth = until(lambda: third.state == "RETRY", "the third's wait") and publisher.coalesces.delay(3, key=key)
        assert [result.get(timeout=60) for result in (first, second, third, fourth)] == [0, 1, 2, None]

    def test_in_canvases(self, publisher: Publisher, key: str) -> None:
        """Late ones end as skipped ones do: groups and chords complete, a chain fails with LockContended."""
        holder = publisher.coalesces.delay(0, 4.0, key=key)
        started(publisher, holder)
        waiter = publisher.coalesces.delay(1, key=key)
        until(lambda: waiter.state == "RETRY", "the waiter")
        late = publisher.coalesces.si(2, key=key)
        assert group(late, late.clone()).apply_async().get(timeout=60) == [None, None]
        assert chord([late.clone(), late.clone()], publisher.plain.s()).apply_async().get(timeout=60) == [None, None]
        with pytest.raises(LockContended):
            chain(late.clone(), publisher.plain.s()).apply_async().get(timeout=60)
        assert holder.state != "SUCCESS", "all that came before its end"
        assert [holder.get(timeout=60), waiter.get(timeout=60)] == [0, 1]

    def test_a_waiter_that_is_revoked_makes_room(self, publisher: Publisher, key: str) -> None:
        """Its mark goes when the worker throws its message away."""
        holder = publisher.coalesces.delay(0, 5.0, key=key)
        started(publisher, holder)
        waiter = publisher.coalesces.delay(1, key=key)
        until(lambda: waiter.state == "RETRY", "the waiter")
        waiter.revoke()
        until(lambda: publisher.mark(f"key={key}", "waiting") is None, "the end of its mark")
        second = publisher.coalesces.delay(2, key=key)
        assert [holder.get(timeout=60), second.get(timeout=60)] == [0, 2]

    def test_etcd_away_while_one_waits(self, redis: RedisServer, tmp_path: Path) -> None:
        """Who cannot claim because etcd is away is put back; all end, none beside another."""
        with EtcdServer() as own:
            settings: dict[str, Any] = {"etcd_lock_ttl": 10, "etcd_lock_timeout": 1, **IMPORTS}
            with project(redis.url, own.url, tmp_path, **settings) as one, publishing(one) as client:
                one.worker()
                holder = client.coalesces.delay(0, 4.0)
                started(client, holder)
                waiter = client.coalesces.delay(1)
                until(lambda: waiter.state == "RETRY", "the waiter")
                own.stop()
                late = client.coalesces.delay(2)
                until(lambda: late.state == "RETRY", "its return to the queue")
                own.start()
                assert holder.get(timeout=90) == 0
                assert waiter.get(timeout=90) == 1
                assert late.get(timeout=90) in {2, None}
                assert overlaps(one.runs()) == []


@contextmanager
def beat(one: Project) -> Iterator[None]:
    """A real ``celery beat``."""
    log = one.folder / "beat.log"
    with log.open("wb") as handle:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "project", "beat", "-s", str(one.folder / "schedule"), "-l", "INFO"],
            env=one.environment, cwd=one.folder, stdout=handle, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)


class TestBeat:
    def test_an_entry_faster_than_its_body_never_piles_up(
        self, redis: RedisServer, etcd: EtcdServer, tmp_path: Path
    ) -> None:
        """An entry every half second, of one and a half: one runs, one waits, whatever has been sent; never two."""
        schedule = {
            "coalescing": {"task": "coalesces", "schedule": 0.5, "args": [1, 1.5]},
            "unique": {"task": "until_end", "schedule": 0.5, "args": [2, 1.5]},
        }
        settings: dict[str, Any] = {
            "beat_schedule": schedule,
            "beat_max_loop_interval": 0.1,
            "etcd_lock_ttl": 5,
            **IMPORTS,
        }
        with project(redis.url, etcd.url, tmp_path, **settings) as one, publishing(one) as client:
            worker = one.worker()
            worst = 0
            with beat(one):
                deadline = time.monotonic() + 90
                while len(one.runs("coalesces")) < 4 or len(one.runs("until_end")) < 3:
                    assert time.monotonic() < deadline
                    worst = max(worst, len(client.marks("waiting")), client.messages())
                    time.sleep(0.05)
                sent = (one.folder / "beat.log").read_text().count("Sending due task")
            assert worst <= 2
            assert sent > len(one.runs())
            for task in ("coalesces", "until_end"):
                assert overlaps(one.runs(task)) == []
            until(lambda: not client.marks("waiting") and not client.marks(), "the end of what was sent last")
            received = worker.output.count("Task coalesces[")
            assert worker.output.count("is skipped: ") > 0
            assert received < 10 * len(one.runs("coalesces"))
            assert worker.output.count("Task until_end[") <= 3 * len(one.runs("until_end")) + 3

    def test_the_worker_is_killed_with_the_waiter_in_its_memory(
        self, redis: RedisServer, etcd: EtcdServer, tmp_path: Path
    ) -> None:
        """Worker and waiter are gone: work goes on with another worker, and the mark they left ends by its lease."""
        with project(redis.url, etcd.url, tmp_path, etcd_lock_ttl=3, **IMPORTS) as one, publishing(one) as client:
            first = one.worker()
            holder = client.coalesces.delay(0, 600.0)
            started(client, holder)
            waiter = client.coalesces.delay(1)
            until(lambda: waiter.state == "RETRY", "the waiter")
            assert client.lasts(client.mark("coalesces/-", "waiting")) <= standing.WAITS_FOR * 1.6
            os.killpg(first.process.pid, signal.SIGKILL)
            one.worker()
            # Until the dead holder's lease ends, whoever comes is skipped for the waiter.
            until(lambda: client.coalesces.delay(2).get(timeout=60) == 2, "a run")
