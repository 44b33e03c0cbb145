"""Tasks that do what tasks of Celery may do, each as a plain task and under its lock. The workers import this."""

from __future__ import annotations

import time
from typing import Any

from celery import Task, chain, group
from celery.exceptions import Ignore, Reject
from project import app, note  # type: ignore[import-not-found]  # as the workers find it

from celery_etcd_lock import Conflict, SingletonTask

FIELDS = (
    "headers", "expires", "timelimit", "shadow", "reply_to", "stamps", "stamped_headers", "retries", "group", "chord",
    "chain", "callbacks", "errbacks", "ignore_result", "origin", "parent_id", "replaced_task_nesting",
)  # fmt: skip


class Handlers(Task):  # type: ignore[misc,type-arg,unused-ignore]
    """Notes what Celery calls."""

    abstract = True

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        note("handler", self, name="on_success", case=task_id)

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note("handler", self, name=f"on_failure {type(exc).__name__}", case=task_id)

    def on_retry(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note("handler", self, name=f"on_retry {type(exc).__name__}", case=task_id)

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note("handler", self, name=f"after_return {status}", case=task_id)


class Locked(SingletonTask, Handlers):
    abstract = True


def began(self: Any) -> int:
    retries = self.request.retries
    note("start", self, case=self.request.id, retries=retries)
    return int(retries)


def echoes(self: Any, *, key: str) -> dict[str, Any]:
    """What its message says."""
    began(self)
    request = self.request
    told = {field: getattr(request, field) for field in FIELDS}
    told["headers"] = {name: value for name, value in (request.headers or {}).items() if name != "etcd_lock"}
    delivery = {name: request.delivery_info[name] for name in ("priority", "exchange", "routing_key")}
    own = {
        "id": request.id == request.correlation_id == request.root_id,
        "overridden": getattr(self, "override_max_retries", None),
    }
    return {**told, **delivery, **own}


def retries_itself(self: Any, *, key: str, times: int) -> int:
    """Its next attempt arrives while it still holds the lock."""
    retries = began(self)
    if retries < times:
        again = self.retry(countdown=0, max_retries=2, throw=False)
        time.sleep(0.2)
        raise again
    return retries


def raises(self: Any, *, key: str, times: int) -> int:
    """Retried by `autoretry_for`."""
    retries = began(self)
    if retries < times:
        raise KeyError(key)
    return retries


def replaces(self: Any, *, key: str, kind: str, by: str) -> None:
    """Replaces itself by tasks that take its own lock, which arrive while it still holds it."""
    began(self)
    follow = app.tasks[f"{kind}_follows"]
    replacement: Any = {
        "task": follow.si(key=key),
        "chain": chain(follow.si(key=key), follow.si(key=key)),
        "group": group(follow.si(key=f"{key}-1"), follow.si(key=f"{key}-2")),
    }[by]
    try:
        raise self.replace(replacement)
    finally:
        time.sleep(0.2)


def follows(self: Any, *, key: str) -> str:
    return key


def ignores(self: Any, *, key: str) -> None:
    began(self)
    raise Ignore


def rejects(self: Any, *, key: str, requeue: bool) -> str:
    began(self)
    if not (requeue and self.request.delivery_info["redelivered"]):
        raise Reject("no", requeue=requeue)
    return "again"


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"base": Handlers},
    "failing": {"base": Locked, "lock_key": "/{key}", "on_conflict": "fail"},
    "retrying": {"base": Locked, "lock_key": "/{key}", "on_conflict": Conflict.retry(countdown=0.1)},
}
for kind, options in KINDS.items():
    for body in (echoes, retries_itself, replaces, follows, ignores):
        app.task(bind=True, name=f"{kind}_{body.__name__}", **options)(body)
    again = {"autoretry_for": (KeyError,), "max_retries": 2, "default_retry_delay": 0}
    app.task(bind=True, name=f"{kind}_raises", **again, **options)(raises)
    app.task(bind=True, name=f"{kind}_rejects", acks_late=True, **options)(rejects)
