"""A task that ends as it is told to, in each way that is the body's own. The workers import this beside `project`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery.exceptions import Ignore, Reject
from project import app, noted  # type: ignore[import-not-found]  # as the workers find it

from celery_etcd_lock import Conflict, SingletonTask

HOLDER, FOLLOWER = 0, 1
"""Numbers: who runs first, until it is told to end or is ended; and who comes after it."""

RETRY_AFTER = 0.5
"""Seconds. Right away, the next run could store its SUCCESS in the moment between Celery's look at the result that is
there and its RETRY of the first run, which then stays for good."""


def end(self: Any, number: int, how: str, key: str) -> str:
    """Gives signs of life until there is the file that lets it go, and ends by `how`. Later runs of it just return."""
    first = number == HOLDER and not self.request.retries and not self.request.delivery_info["redelivered"]
    with noted(self, number):
        if first:
            go, alive = (Path(f"{os.environ['RECORD']}.{key}.{what}") for what in ("go", "alive"))
            with alive.open("a") as signs:
                while not go.exists():
                    print(time.monotonic(), file=signs, flush=True)
                    time.sleep(0.01)
            by(how, self, key)
    return how


def by(how: str, task: Any, key: str) -> None:
    if how == "exception":
        raise ValueError(key)
    if how == "retry":
        raise task.retry(countdown=RETRY_AFTER)
    if how == "ignore":
        raise Ignore
    if how == "reject":
        raise Reject(key)
    if how == "requeue":
        raise Reject(key, requeue=True)
    if how == "replace":
        raise task.replace(task.si(FOLLOWER, "return", key).set(queue=task.request.delivery_info["routing_key"]))


for name, late in {"ending": False, "ending_late": True}.items():
    app.task(
        base=SingletonTask, bind=True, name=name, acks_late=late, lock_key="/{key}",
        on_conflict=Conflict.wait(timeout=120),
    )(end)  # fmt: skip
