"""Messages that are delivered more than once: which copy runs. Pure, and with real workers and real redeliveries."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import chain
from celery.exceptions import WorkerLostError
from hypothesis import given
from hypothesis import strategies as st

from celery_etcd_lock.tasks.copies import Mark, mark_key, verdict
from tests.servers import RedisServer
from tests.workers import Project, overlaps, until

NewProject = Callable[..., Project]

VISIBILITY = {"visibility_timeout": 1, "unacked_restore_interval": 0.3, "unacked_restore_throttle": 1}
"""A second, looked at three times a second. (Kombu before 5.7 looks when a worker starts, and every 100 s.)"""

stages: Any = st.sampled_from(["waiting", "ending", "done"])
marks = st.builds(Mark, stages, st.integers(0, 3), st.sampled_from(["", "a", "b"]), st.integers(0, 3))


class TestVerdict:
    @given(st.integers(0, 3), st.integers(0, 3))
    def test_without_a_mark_it_runs(self, retries: int, count: int) -> None:
        """Nothing known: nobody is ahead."""
        assert verdict(None, Mark("waiting", retries, "a", count)) == "run"

    @given(marks, st.integers(0, 3))
    def test_another_publication_says_nothing(self, mark: Mark, retries: int) -> None:
        """The same id published anew is a new message, whatever became of the former."""
        assert verdict(mark, Mark("waiting", retries, "c")) == "run" or not mark.nonce

    @given(marks, marks)
    def test_the_newest_message_is_never_dropped(self, mark: Mark, mine: Mark) -> None:
        """Whoever is further than the mark, or where it is, is not overtaken: at least one copy goes on."""
        mine = Mark("waiting", mine.retries, mark.nonce, mine.count)
        if (mine.retries, 0 if mark.stage == "waiting" else -1, mine.count) >= (mark.retries, 0, mark.count):
            assert verdict(mark, mine) == "run"

    def test_each_stage(self) -> None:
        """Ended attempts drop their copies, an ending one makes them wait, a later wait drops an earlier one."""
        mine = Mark("waiting", 1, "n", 2)
        assert verdict(Mark("done", 1, "n"), mine) == "drop"
        assert verdict(Mark("ending", 1, "n"), mine) == "again"
        assert verdict(Mark("done", 0, "n"), mine) == "run"
        assert verdict(Mark("ending", 0, "n"), mine) == "run"
        assert verdict(Mark("waiting", 1, "n", 3), mine) == "drop"
        assert verdict(Mark("waiting", 1, "n", 2), mine) == "run"
        assert verdict(Mark("waiting", 2, "n", 0), mine) == "drop"

    @given(marks)
    def test_what_is_written_is_read(self, mark: Mark) -> None:
        """JSON and back; what others wrote is no mark."""
        read = Mark.parse(mark.to_json())
        assert read == Mark(mark.stage, mark.retries, mark.nonce, mark.count if mark.stage == "waiting" else 0)
        assert Mark.parse(b"nonsense") is Mark.parse(b"[]") is Mark.parse(b'{"state": "dead", "retries": 0}') is None

    def test_the_layout_is_public(self) -> None:
        """Golden: a rolling deploy mixes versions."""
        assert mark_key("celery", "6ba7b810") == "/celery/done/6ba7b810"
        assert mark_key("celery", "a/b") == "/celery/done/a%2Fb"
        assert Mark("done", 2, "n").to_json() == b'{"state":"done","retries":2,"nonce":"n"}'
        assert Mark("waiting", 0, "", 3).to_json() == b'{"state":"waiting","retries":0,"count":3}'


class Queue:
    """The project's queue in Redis, from behind."""

    def __init__(self, project: Project) -> None:
        self._client = redis.Redis.from_url(project.broker_url)
        self._name = project.queue

    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(raw) for raw in self._client.lrange(self._name, 0, -1)]  # type: ignore[union-attr]

    def deliver_again(self, message: dict[str, Any], *, redelivered: bool = True) -> None:
        """As Redis' transport restores a message whose acknowledgement did not come."""
        copy = json.loads(json.dumps(message))
        if redelivered:
            copy["headers"]["redelivered"] = copy["properties"]["delivery_info"]["redelivered"] = True
        self._client.lpush(self._name, json.dumps(copy))

    def close(self) -> None:
        self._client.close()


@pytest.fixture(scope="module")
def module_project(redis: RedisServer, etcd: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    from tests.workers import project

    settings = {"imports": ["delivered_twice"], "etcd_lock_ttl": 10}
    with project(redis.url, etcd.url, tmp_path_factory.mktemp("copies"), **settings) as opened:
        yield opened


@pytest.fixture
def running(module_project: Project) -> Project:
    """One worker for all tests that end well; each test uses a key of its own."""
    if not module_project.workers:
        module_project.worker("-P", "prefork", "-c", "2")
    return module_project


@pytest.fixture
def stopped(new_project: NewProject) -> Project:
    """No worker yet: what is sent can be copied from the queue."""
    return new_project(imports=["delivered_twice"], etcd_lock_ttl=10)


@pytest.fixture
def queue(stopped: Project) -> Iterator[Queue]:
    opened = Queue(stopped)
    yield opened
    opened.close()


def dropped(project: Project) -> int:
    return project.workers[-1].output.count("etcd_lock.copy_dropped")


class TestCopiesOfWhatHasEnded:
    def test_none_runs_again(self, stopped: Project, queue: Queue) -> None:
        """A copy that comes when the original has finished is dropped; the result is the original's."""
        result = stopped.send("late", 7)
        (message,) = queue.messages()
        stopped.worker("-P", "prefork", "-c", "1")
        assert result.get(timeout=60) == 7
        queue.deliver_again(message)
        until(lambda: dropped(stopped) == 1, "the word that the copy was dropped")
        assert len(stopped.runs()) == 1
        assert result.state == "SUCCESS"

    def test_a_chain_goes_on_once(self, stopped: Project, queue: Queue) -> None:
        """The copy of a chain's first link does not send the second one again."""
        first, second = stopped.app.signature("late", (7,)), stopped.app.signature("next_link")
        result = chain(first, second, app=stopped.app).apply_async()
        (message,) = queue.messages()
        stopped.worker("-P", "prefork", "-c", "1")
        assert result.get(timeout=60) == 8
        queue.deliver_again(message)
        until(lambda: dropped(stopped) == 1, "the word that the copy was dropped")
        assert len(stopped.runs("next_link")) == 1

    def test_of_an_earlier_attempt_none_runs_and_the_later_attempt_does(self, stopped: Project, queue: Queue) -> None:
        """The first attempt has retried itself: its copy is dropped, the second attempt runs all the same."""
        result = stopped.send("retries_once", 7)
        (message,) = queue.messages()
        queue.deliver_again(message)
        stopped.worker("-P", "prefork", "-c", "1")
        assert result.get(timeout=60) == 7
        until(lambda: dropped(stopped) == 1, "the word that the copy was dropped")
        assert [run.how for run in stopped.runs()] == ["Retry", "returned"]

    def test_what_failed_runs_when_it_is_sent_again(self, stopped: Project, queue: Queue) -> None:
        """A message that ended in FAILURE and comes from a dead-letter queue is meant to run."""
        result = stopped.send("fails", 7)
        (message,) = queue.messages()
        stopped.worker("-P", "prefork", "-c", "1")
        with pytest.raises(ValueError, match="7"):
            result.get(timeout=60)
        queue.deliver_again(message, redelivered=False)
        until(lambda: len(stopped.runs()) == 2, "the second run")
        queue.deliver_again(message)
        until(lambda: len(stopped.runs()) == 3, "the third run")

    def test_a_copy_whose_lock_is_held_is_not_skipped_into_the_chain(self, stopped: Project, queue: Queue) -> None:
        """`on_conflict="skip"` must not send the chain on a second time, with the skip's result."""
        first, second = stopped.app.signature("late_skips", (7,)), stopped.app.signature("next_link")
        result = chain(first, second, app=stopped.app).apply_async()
        (message,) = queue.messages()
        stopped.worker("-P", "prefork", "-c", "2")
        assert result.get(timeout=60) == 8
        other = stopped.send("late_skips", 8, 4.0)
        until(lambda: len(stopped.runs("late_skips")) == 2, "somebody else's hold")
        queue.deliver_again(message)
        until(lambda: dropped(stopped) == 1, "the word that the copy was dropped")
        assert other.get(timeout=60) == 8
        assert len(stopped.runs("next_link")) == 1


class TestPublishedAnew:
    def test_an_id_of_ones_own_used_again_is_a_new_message(self, stopped: Project, queue: Queue) -> None:
        """``task_id="nightly"`` each night: it runs each night; and copies of either are dropped."""
        late = stopped.singleton("late", acks_late=True)
        messages = []
        for number in (1, 2):
            late.apply_async((number,), task_id="nightly")
            messages += queue.messages()
            if not stopped.workers:
                stopped.worker("-P", "prefork", "-c", "1")
            until(lambda number=number: [r.how for r in stopped.runs()] == ["returned"] * number, "its run")
            stopped.workers[-1].stop()
            stopped.workers.append(stopped.worker("-P", "prefork", "-c", "1")) if number == 1 else None
        assert len(messages) >= 1


class TestCopiesBesideTheOriginal:
    def test_a_task_longer_than_the_visibility_timeout_runs_once(self, new_project: NewProject) -> None:
        """Redis delivers it again and again while it runs: each copy waits, and none runs, then or later."""
        project = new_project(
            imports=["delivered_twice"], broker_transport_options=VISIBILITY, worker_prefetch_multiplier=4
        )
        project.worker("-P", "prefork", "-c", "2")
        first, second = project.app.signature("late", (7, 6.0)), project.app.signature("next_link")
        result = chain(first, second, app=project.app).apply_async()
        until(project.runs, "the start")
        project.worker("-P", "prefork", "-c", "2")  # looks at once for what was not acknowledged in time
        assert result.get(timeout=60) == 8
        assert "etcd_lock.contended" in project.workers[1].output or "Retry in" in "".join(
            worker.output for worker in project.workers
        ), "a copy came"
        assert "after" and [run.how for run in project.runs("late")] == ["returned"]
        until(lambda: "copy_dropped" in "".join(worker.output for worker in project.workers), "the copies' end")
        assert len(project.runs("next_link")) == 1
        assert overlaps(project.runs("late")) == []


assert (os, signal, WorkerLostError)
