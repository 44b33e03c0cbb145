"""Eager runs that lock (`etcd_lock_eager`): there is no queue to be put back into, so that nothing spins or hangs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from celery_etcd_lock import Conflict, SingletonTask
from celery_etcd_lock.testing import held_elsewhere

pytestmark = pytest.mark.usefixtures("etcd_lock_memory")

POLICIES = {
    "retry": Conflict.retry(countdown=60),
    "skip": Conflict.skip(result="skipped"),
    "continue": Conflict.skip(result="skipped", chain="continue"),
    "wait": Conflict.wait(timeout=0.05),
    "fail": Conflict.fail(),
}


def step(self: Any, given: Any = "", *, key: str = "k", times: int = 0) -> str:
    if self.request.retries < times:
        raise self.retry(countdown=60)
    return f"{key}({given})"


@pytest.fixture
def app() -> Iterator[Celery[Any]]:
    made = Celery("eager", broker="memory://", backend="cache+memory://", set_as_current=False)
    made.conf.update(task_always_eager=True, etcd_lock_eager=True)

    for name, policy in POLICIES.items():
        made.task(base=SingletonTask, bind=True, name=name, lock_key="/{key}", on_conflict=policy, max_retries=2)(step)
    made.task(bind=True, name="plain", max_retries=2)(step)
    yield made
    made.close()


def outcome(result: Any) -> Any:
    try:
        return [outcome(one) for one in result.results] if hasattr(result, "results") else result.get()
    except Exception as error:  # noqa: BLE001
        return type(error).__name__


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", ["alone", "chain", "group", "chord", "itself"])
def test_whoever_meets_nobodys_lock_fares_as_a_plain_task(app: Celery[Any], policy: str, shape: str) -> None:
    """The same results, one after the other under one lock, its own retries among them."""
    assert outcome(canvas(app, policy, shape).apply_async()) == outcome(canvas(app, "plain", shape).apply_async())


def canvas(app: Celery[Any], task: str, shape: str) -> Any:
    made: Any = app.tasks[task]
    return {
        "alone": made.si(),
        "chain": chain(made.s(), made.s(), made.s()),
        "group": group(made.s(), made.s(), app=app),
        "chord": chord([made.s(), made.s()], made.s(), app=app),
        "itself": made.si(times=2),
    }[shape]


@pytest.mark.parametrize("policy", POLICIES)
def test_whoever_meets_a_lock_ends_at_once(app: Celery[Any], policy: str) -> None:
    """By `apply` and by `task_always_eager`: skipped where that is the policy, failed elsewhere."""
    task: Any = app.tasks[policy]
    expected = {"skip": "skipped", "continue": "skipped", "wait": "LockTimeout"}.get(policy, "LockContended")
    with held_elsewhere(task, key="k"):
        assert outcome(task.apply()) == expected
        assert outcome(task.delay()) == expected
    assert outcome(task.delay()) == "k()"
