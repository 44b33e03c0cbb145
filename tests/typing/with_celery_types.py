"""As `api.py`, for those who have celery-types: what becomes of tasks that `app.task` makes, and of results."""

from __future__ import annotations

from celery import Celery
from typing_extensions import assert_type

from celery_etcd_lock import Conflict, SingletonTask, singleton_task
from celery_etcd_lock.compat import AlreadyQueued, DuplicateTaskError, QueueOnce, Singleton

app = Celery()


@singleton_task(unique_on="account_id")
def called(account_id: int) -> str:
    return str(account_id)


@app.task(base=SingletonTask, bind=True, on_conflict=Conflict.wait(timeout=5, then="fail"))
def based(self: SingletonTask, day: str) -> int:
    return self.lock.fencing_token


based.delay("2026-01-01")
assert_type(called.delay(1).get(), str)
assert_type(called.apply_async((1,), on_conflict="wait").get(), str)


@app.task(base=Singleton, unique_on=["account_id"], raise_on_duplicate=True, lock_expiry=60)
def from_singleton(account_id: int) -> int:
    return account_id


@app.task(base=QueueOnce, once={"keys": [], "graceful": True})
def from_once(account_id: int) -> int:
    return account_id


def publishes() -> None:
    try:
        from_singleton.delay(1)
        from_once.apply_async((1,), once={"graceful": False})
    except AlreadyQueued as queued:
        assert_type(queued.countdown, float)
    except DuplicateTaskError as duplicate:
        assert_type(duplicate.task_id, str)
