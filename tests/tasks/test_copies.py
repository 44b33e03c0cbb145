"""Messages that are delivered more than once: which copy runs. Pure, and with real workers and real redeliveries."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import Task, chain
from hypothesis import given
from hypothesis import strategies as st

from celery_etcd_lock import SingletonTask
from celery_etcd_lock.tasks.copies import Mark, mark_key, verdict
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
        assert verdict(mark, Mark("waiting", retries, "c")) == "run"

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
        self._client: Any = redis.Redis.from_url(project.broker_url)
        self._name = project.queue

    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(raw) for raw in self._client.lrange(self._name, 0, -1)]

    def deliver(self, message: dict[str, Any], *, redelivered: bool = True) -> None:
        """As Redis' transport restores a message whose acknowledgement did not come; or as a person sends it again."""
        copy = json.loads(json.dumps(message))
        if redelivered:
            copy["headers"]["redelivered"] = copy["properties"]["delivery_info"]["redelivered"] = True
        self._client.lpush(self._name, json.dumps(copy))

    def close(self) -> None:
        self._client.close()


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
    return sum(worker.output.count("etcd_lock.copy_dropped") for worker in project.workers)


def until_dropped(project: Project, number: int) -> None:
    until(lambda: dropped(project) >= number, f"the word that {number} copies were dropped")


def chained(project: Project, task: str, *args: Any) -> Any:
    links = project.app.signature(task, args), project.app.signature("next_link")
    return chain(*links, app=project.app).apply_async()


class TestCopiesOfWhatHasEnded:
    def test_none_runs_again(self, stopped: Project, queue: Queue) -> None:
        """A copy that comes when the original has finished is dropped: the result and the chain are the original's."""
        result = chained(stopped, "late", 7)
        (message,) = queue.messages()
        stopped.worker("-P", "prefork", "-c", "1")
        assert result.get(timeout=60) == 8
        queue.deliver(message)
        until_dropped(stopped, 1)
        assert len(stopped.runs("late")) == len(stopped.runs("next_link")) == 1
        assert result.parent.state == "SUCCESS"

    def test_nor_of_an_earlier_attempt(self, stopped: Project, queue: Queue) -> None:
        """The first attempt has retried itself: its copy is dropped, the second attempt runs all the same."""
        result = stopped.send("retries_once", 7)
        (message,) = queue.messages()
        queue.deliver(message)
        stopped.worker("-P", "prefork", "-c", "1")
        assert result.get(timeout=60) == 7
        queue.deliver(message)
        until_dropped(stopped, 2)
        assert [run.how for run in stopped.runs()] == ["Retry", "returned"]

    def test_what_failed_runs_when_it_is_sent_again(self, stopped: Project, queue: Queue) -> None:
        """A message that ended in FAILURE and comes from a dead-letter queue, or as a copy, is meant to run."""
        result = stopped.send("fails", 7)
        (message,) = queue.messages()
        stopped.worker("-P", "prefork", "-c", "1")
        with pytest.raises(ValueError, match="7"):
            result.get(timeout=60)
        for number, redelivered in ((2, False), (3, True)):
            queue.deliver(message, redelivered=redelivered)
            until(lambda number=number: len(stopped.runs()) == number, "one more run")  # type: ignore[misc]

    def test_a_copy_that_finds_the_lock_held_is_no_skip(self, stopped: Project, queue: Queue) -> None:
        """`on_conflict="skip"` does not send the chain on a second time, with the skip's result."""
        result = chained(stopped, "late_skips", 7)
        (message,) = queue.messages()
        stopped.worker("-P", "prefork", "-c", "2")
        assert result.get(timeout=60) == 8
        other = stopped.send("late_skips", 8, 3.0)
        until(lambda: len(stopped.runs("late_skips")) == 2, "somebody else's hold")
        queue.deliver(message)
        until_dropped(stopped, 1)
        assert other.get(timeout=60) == 8
        assert len(stopped.runs("next_link")) == 1

    def test_an_id_of_ones_own_used_again_is_a_new_message(self, stopped: Project, queue: Queue) -> None:
        """``task_id="nightly"`` each night: what is written of one night's message says nothing of the other's."""

        @stopped.app.task(base=SingletonTask, name="late", lock_key="all", shared=False)
        def late(number: int) -> None: ...

        for number in (1, 2):
            late.apply_async((number,), task_id="nightly")
        second_night, first_night = queue.messages()
        stopped.worker("-P", "prefork", "-c", "1")
        until(lambda: [run.how for run in stopped.runs()] == ["returned"] * 2, "both nights' runs")
        queue.deliver(second_night)
        until_dropped(stopped, 1)
        queue.deliver(first_night)
        until(lambda: len(stopped.runs()) == 3, "the run of a message of which nothing is written")
        assert dropped(stopped) == 1

    def test_an_eta_beyond_the_timeout_runs_once(self, stopped: Project, queue: Queue) -> None:
        """Celery's own multiplication: each worker that was given the message runs it at its eta. Here one does."""

        @stopped.app.task(base=SingletonTask, name="early", unique_on="key", shared=False)
        def early(number: int, seconds: float = 0.05, key: str = "k") -> None: ...

        result = early.apply_async((7,), countdown=3)
        (message,) = queue.messages()
        queue.deliver(message)
        stopped.worker("-P", "prefork", "-c", "2")
        assert result.get(timeout=60) == 7
        until_dropped(stopped, 1)
        assert len(stopped.runs("early")) == 1

    def test_a_publisher_without_this_package_is_believed_by_the_id(self, stopped: Project, queue: Queue) -> None:
        """A message without our header (sent by name) is a copy if the broker says so, and a new one if it does not.

        A new one of that id is not lost though it has to wait for the lock, after which it asks for copies.
        """
        result = stopped.send("late", 7)
        (message,) = queue.messages()
        assert "etcd_lock" not in message["headers"]
        stopped.worker("-P", "prefork", "-c", "2")
        assert result.get(timeout=60) == 7
        queue.deliver(message)
        until_dropped(stopped, 1)
        assert len(stopped.runs()) == 1
        other = stopped.send("late", 8, 2.0)
        until(lambda: len(stopped.runs()) == 2, "somebody else's hold")
        queue.deliver(message, redelivered=False)
        until(lambda: [run.number for run in stopped.runs()] == [7, 8, 7], "the run of the same id, sent once more")
        assert other.get(timeout=60) == 8
        assert dropped(stopped) == 1


class TestDeath:
    def test_between_the_body_and_the_next_message_of_the_chain(self, stopped: Project) -> None:
        """The process dies when its lock is free already: the copy runs once more, and the chain goes on, once."""
        result = chained(stopped, "dies_after_release", 7)
        stopped.worker("-P", "prefork", "-c", "1")
        assert result.get(timeout=60) == 8
        assert [run.how for run in stopped.runs("dies_after_release")] == ["returned", "returned"]
        assert len(stopped.runs("next_link")) == 1

    @pytest.mark.parametrize("task", ["requeued", "resent"])
    def test_a_message_of_a_dead_child_runs_again_alone(self, stopped: Project, task: str) -> None:
        """`reject_on_worker_lost` and `retry_on_worker_lost`: the same id again, after its ghost, to its end."""
        if task == "resent" and not hasattr(Task, "retry_on_worker_lost"):
            pytest.skip("retry_on_worker_lost is of Celery 5.7")
        stopped.worker("-P", "prefork", "-c", "2")
        result = stopped.send(task, 7, 2.0)
        (first,) = until(stopped.runs, "the start")
        os.kill(first.pid, signal.SIGKILL)
        assert result.get(timeout=60) == 7
        runs = stopped.runs()
        assert [run.how for run in runs] == ["killed", "returned"]
        assert runs[1].token > runs[0].token


class TestVisibilityTimeout:
    @pytest.fixture
    def short(self, new_project: NewProject) -> Project:
        # Under keys of its own: what others have not acknowledged is not for it to restore, and a worker that was
        # killed in the middle of that keeps the others from it for minutes.
        own = {f"{key}_key": f"{key}-{uuid.uuid4().hex}" for key in ("unacked", "unacked_index", "unacked_mutex")}
        return new_project(
            imports=["delivered_twice"], broker_transport_options={**VISIBILITY, **own}, etcd_lock_ttl=10
        )

    def test_shorter_than_the_task(self, short: Project) -> None:
        """Redis delivers it again while it runs: the copies wait, and are dropped; it runs once, its chain goes on."""
        short.worker("-P", "prefork", "-c", "2")
        result = chained(short, "late", 7, 8.0)
        (run,) = until(short.runs, "the start")
        until(lambda: time.monotonic() > run.started + 1.5, "the visibility timeout's end")
        short.worker("-P", "prefork", "-c", "2")  # which looks at once for what was not acknowledged in time
        assert result.get(timeout=60) == 8
        until_dropped(short, 1)
        assert [run.how for run in short.runs("late")] == ["returned"]
        assert len(short.runs("next_link")) == 1

    def test_the_copy_is_all_there_is_when_the_original_dies(self, short: Project) -> None:
        """The worker is killed while a copy waits behind it: the copy runs when the lease is over."""
        victim = short.worker("-P", "prefork", "-c", "1")
        result = short.send("late", 7, 30.0)
        (first,) = until(short.runs, "the start")
        other = short.worker("-P", "prefork", "-c", "1")
        until(lambda: "Retry in" in other.output, "the copy's wait")
        victim.kill()
        second = until(lambda: short.runs()[1:], "the copy's run", seconds=90)[0]
        assert second.token > first.token
        assert result.state != "FAILURE"

    def test_waiting_in_a_busy_worker_does_not_multiply(self, short: Project) -> None:
        """Messages that wait for the lock lie in a busy worker for longer than the timeout: each runs once, and
        there are about as many messages as tasks, not twice as many with each second."""

        @short.app.task(base=SingletonTask, name="early", unique_on="key", shared=False)
        def early(number: int, seconds: float = 0.05, key: str = "k") -> None: ...

        short.worker("-P", "prefork", "-c", "1", "--prefetch-multiplier", "20")
        results = [early.delay(number, 0.5) for number in range(8)]
        short.worker("-P", "prefork", "-c", "1", "--prefetch-multiplier", "20")
        assert sorted(result.get(timeout=120) for result in results) == list(range(8))
        runs = short.runs("early")
        assert sorted(run.number for run in runs) == list(range(8)), "each once"
        assert overlaps(runs) == []
        published = sum(worker.output.count("Retry in") for worker in short.workers)
        assert published < 40 * len(results), "several times what it takes with pauses of 0.3 s"
