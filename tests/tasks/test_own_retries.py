"""What a task does of itself, retries, replaces, ignores, rejects: the same with the lock and without."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain
from celery.exceptions import MaxRetriesExceededError, TaskRevokedError
from celery.result import AsyncResult

from celery_etcd_lock import LockContended, SingletonTask
from celery_etcd_lock.testing import EtcdServer, held_elsewhere
from tests.servers import RedisServer
from tests.workers import Project, project, until

BOUND = 120
"""Seconds, several times what anything here takes."""

LOCKED = pytest.mark.parametrize("kind", ["failing", "retrying"])


def of_key(key: str) -> None:
    """Its lock is that of the task of that key."""


@pytest.fixture(scope="module")
def running(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    settings: Any = {"imports": ["retries"]}
    with project(redis.url, etcd.url, tmp_path_factory.mktemp("retries"), **settings) as made:
        made.app.conf.update(etcd_lock_namespace=made.queue, etcd_lock_endpoints=etcd.url)
        made.app.task(base=SingletonTask, name="locking", lock_key="/{key}", shared=False)(of_key)
        made.worker("-P", "prefork", "-c", "4", "-Q", f"{made.queue},{made.queue}-other")
        yield made


def noted(running: Project, task_id: str, event: str, field: str) -> list[Any]:
    lines = running.record.read_text().splitlines() if running.record.exists() else []
    entries = (json.loads(line) for line in lines)
    return [entry[field] for entry in entries if entry["event"] == event and entry["case"] == task_id]


def send(running: Project, task: str, key: str = "", **arguments: Any) -> AsyncResult[Any]:
    return running.send(task, key=key or uuid.uuid4().hex[:8], **arguments)


def send_held(running: Project, task: str, options: dict[str, Any] | None = None, **arguments: Any) -> AsyncResult[Any]:
    """Send it while its lock is held, until it has been put back three times."""
    key = uuid.uuid4().hex[:8]
    with held_elsewhere(running.app.tasks["locking"], key):
        result = running.app.send_task(task, kwargs={"key": key, **arguments}, **options or {})
        until(lambda: count_waits(running, result) >= 3, "three waits", seconds=BOUND)
    return result


def count_waits(running: Project, result: AsyncResult[Any]) -> int:
    return running.workers[0].output.count(f"[{result.id}] retry")


def outcome(result: AsyncResult[Any]) -> Any:
    try:
        return result.get(timeout=BOUND)
    except Exception as error:  # noqa: BLE001
        return type(error).__name__


def handlers(running: Project, task_id: str) -> list[str]:
    """What Celery called, without what waiting for the lock adds; sorted, for a plain task runs beside itself."""
    return sorted(name for name in noted(running, task_id, "handler", "name") if name != "on_retry LockContended")


def last_handler(running: Project, task_id: str, count: int) -> list[str]:
    until(lambda: len(handlers(running, task_id)) >= count, "the last handler", seconds=BOUND)
    return handlers(running, task_id)


@LOCKED
@pytest.mark.parametrize("times", [2, 5], ids=["within", "beyond"])
@pytest.mark.parametrize("body", ["retries_itself", "raises"])
def test_a_tasks_own_retries_are_as_without_the_lock(running: Project, kind: str, body: str, times: int) -> None:
    """Also the one that arrives while the last attempt still holds the lock; `fail` does not fail it."""
    plain, locked = (send(running, f"{one}_{body}", times=times) for one in ("plain", kind))
    assert outcome(locked) == outcome(plain)
    assert noted(running, locked.id, "start", "retries") == [0, 1, 2]
    assert noted(running, plain.id, "start", "retries") == [0, 1, 2]
    expected = last_handler(running, plain.id, 4)
    assert last_handler(running, locked.id, 4) == expected


@pytest.mark.parametrize("body", ["retries_itself", "raises"])
def test_waiting_for_the_lock_uses_up_no_retries(running: Project, body: str) -> None:
    """A message that was put back three times still has all `max_retries` of its author."""
    within = send_held(running, f"retrying_{body}", times=2)
    beyond = send_held(running, f"retrying_{body}", times=3)
    assert within.get(timeout=BOUND) == 2
    with pytest.raises((MaxRetriesExceededError, KeyError)):
        beyond.get(timeout=BOUND)
    for result in (within, beyond):
        assert noted(running, result.id, "start", "retries") == [0, 1, 2]


@LOCKED
@pytest.mark.parametrize("by", ["task", "chain", "group"])
def test_a_task_that_replaces_itself_does_so_as_without_the_lock(running: Project, kind: str, by: str) -> None:
    """By what takes the same lock, and arrives while it is still held, too: even with `fail` that does not fail."""
    key = uuid.uuid4().hex[:8]
    plain = send(running, "plain_replaces", key, kind="plain", by=by)
    locked = send(running, f"{kind}_replaces", key, kind=kind, by=by)
    assert outcome(locked) == outcome(plain)
    assert locked.state == "SUCCESS"


@LOCKED
def test_ignore_and_reject_are_as_without_the_lock(running: Project, kind: str) -> None:
    """The lock is let go, the state is what it would be, and what is put back into the queue comes again."""
    key = uuid.uuid4().hex[:8]
    assert outcome(send(running, f"{kind}_rejects", key, requeue=True)) == "again"
    ignored = [send(running, f"{one}_ignores", key) for one in ("plain", kind)]
    rejected = [send(running, f"{one}_rejects", uuid.uuid4().hex[:8], requeue=False) for one in ("plain", kind)]
    for result in (*ignored, *rejected):
        ended = re.compile(rf"\[{result.id}\] (?!received)")
        until(lambda: ended.search(running.workers[0].output), "its end", seconds=BOUND)  # noqa: B023 - called at once
    for plain, locked in (ignored, rejected):
        until(lambda: locked.state == plain.state, "the same state", seconds=BOUND)  # noqa: B023
    assert outcome(send(running, f"{kind}_raises", key, times=0)) == 0, "the lock is free"


def test_a_message_that_waited_for_its_lock_is_the_same_message(running: Project) -> None:
    """Headers, priority, queue, expiry, time limits, stamps, ids, callbacks: as a plain task's that ran at once."""
    told = []
    for kind in ("plain", "retrying"):
        key = uuid.uuid4().hex[:8]
        signature: Any = running.app.signature(f"{kind}_echoes", kwargs={"key": key})
        signature.set(
            headers={"of-the-user": "1"}, priority=3, expires=3000, time_limit=500, soft_time_limit=400,
            shadow="shade", reply_to="there", queue=f"{running.queue}-other",
        )  # fmt: skip
        signature.link(running.app.signature("plain_follows", kwargs={"key": key}, immutable=True))
        signature.stamp(mark="stamped")
        with held_elsewhere(running.app.tasks["locking"], key):
            result = signature.apply_async()
            if kind == "retrying":
                until(lambda: count_waits(running, result) >= 3, "three waits", seconds=BOUND)  # noqa: B023
        told.append(result.get(timeout=BOUND))
    plain, waited = told
    for one in told:
        assert one.pop("expires") > "2020"
        one["callbacks"][0]["kwargs"].pop("key")
        one["callbacks"][0]["options"].pop("task_id", None)
    assert waited == plain
    assert plain["headers"]["of-the-user"] == "1"
    assert plain["stamps"] == {"mark": "stamped"}
    assert (plain["priority"], plain["timelimit"], plain["shadow"]) == (3, [500, 400], "shade")


def test_a_message_whose_result_nobody_wants_stores_none_after_waiting(running: Project) -> None:
    """`ignore_result` of the one message is kept."""
    result = send_held(running, "retrying_echoes", {"ignore_result": True})
    until(lambda: f"[{result.id}] succeeded" in running.workers[0].output, "its end", seconds=BOUND)
    assert running.app.AsyncResult(result.id).state != "SUCCESS"


def test_a_link_that_expires_while_it_waits_fails_its_chain(running: Project) -> None:
    """Celery would discard it in silence, and `get` on the chain's end would wait for ever; alone it is discarded."""

    @running.app.task(base=SingletonTask, name="retrying", unique_on="key", shared=False)
    def retrying(number: int, seconds: float = 0.05, key: str = "k") -> None: ...

    link = running.app.signature("retrying", (1,), {"key": "expiring"}).set(expires=2)
    with held_elsewhere(retrying, 1, key="expiring"):
        chained = chain(
            link.clone(), running.app.signature("retrying", (0.0, "other"), immutable=True), app=running.app
        )
        end = chained.apply_async()
        alone = link.apply_async()
        with pytest.raises(LockContended, match="key=expiring is held"):
            end.get(timeout=BOUND)
        with pytest.raises(TaskRevokedError, match="expired"):
            alone.get(timeout=BOUND)
