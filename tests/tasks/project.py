"""The Celery project of the tests: what the real workers run. Set up by environment variables; see `workers.py`.

Every body writes down when it began and ended, so that overlaps are measured from what happened.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.exceptions import Reject

from celery_etcd_lock import Conflict, LockLost, SingletonTask, current_lock, singleton_task

settings = json.loads(os.environ.get("SETTINGS", "{}"))
app = Celery(
    "project",
    broker=os.environ["BROKER_URL"],
    backend=os.environ["BACKEND_URL"],
    task_cls=settings.pop("task_cls", None),
)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_default_queue=os.environ["QUEUE"],
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=True,
    **{"etcd_lock_endpoints": os.environ["ETCD_URL"], **settings},
)


def note(event: str, running: Task[Any, Any], **more: Any) -> None:
    line = json.dumps({"event": event, "at": time.monotonic(), "pid": os.getpid(), "id": running.request.id, **more})
    handle = os.open(os.environ["RECORD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, line.encode() + b"\n")
    finally:
        os.close(handle)


@contextmanager
def noted(task: Any, number: int) -> Iterator[None]:
    lock = task.lock
    token = lock.fencing_token if lock.is_held() else 0
    note("start", task, task=task.name, number=number, token=token, key=lock.key)
    ended = "killed"
    try:
        yield
        ended = "returned"
    except BaseException as error:
        ended = type(error).__name__
        raise
    finally:
        try:
            note("end", task, task=task.name, number=number, ended=ended)
        except LockLost:  # which may strike here too, once
            note("end", task, task=task.name, number=number, ended="LockLost")
            raise


def work(self: Any, number: int, seconds: float = 0.05, key: str = "k") -> int:
    with noted(self, number):
        time.sleep(seconds)
    return number


def define(name: str, **options: Any) -> Any:
    return app.task(base=SingletonTask, bind=True, name=name, **{"unique_on": "key", **options})(work)


retrying = define("retrying", on_conflict=Conflict.retry(backoff=0.05, backoff_max=0.5))
skipping = define("skipping", on_conflict=Conflict.skip(result="skipped"))
failing = define("failing", on_conflict="fail")
waiting = define("waiting", on_conflict=Conflict.wait(timeout=60))
giving_up = define("giving_up", on_conflict=Conflict.retry(countdown=0.2, max_wait=1))
unavailable_fails = define("unavailable_fails", on_unavailable="fail")
unavailable_runs = define("unavailable_runs", on_unavailable="run")
lost_retries = define("lost_retries", on_lost="retry", on_conflict=Conflict.retry(countdown=0.2))
lost_warns = define("lost_warns", on_lost="warn")

late = define("late", acks_late=True, on_conflict=Conflict.retry(countdown=0.2))

_soon = Conflict.retry(backoff=0.05, backoff_max=0.3)
shared = {"unique_on": None, "lock_key": "/catalog/{key}"}
reading = define("reading", **shared, lock_mode="shared", on_conflict=_soon)
writing = define("writing", **shared, on_conflict=_soon)
reading_in_turn = define("reading_in_turn", **shared, lock_mode="shared", on_conflict=Conflict.wait(timeout=60))
writing_in_turn = define("writing_in_turn", **shared, on_conflict=Conflict.wait(timeout=60))
limited = define("limited", lock_limit=2, on_conflict=_soon)
limited_in_turn = define("limited_in_turn", lock_limit=2, on_conflict=Conflict.wait(timeout=60))
limited_fails = define("limited_fails", lock_limit=2, on_conflict="fail")


@singleton_task(bind=True, app=app, name="decorated", on_conflict="skip", unique_on=["key"])
def decorated(self: Any, number: int, key: str = "k", seconds: float = 0.05) -> int:
    """The same by the decorator."""
    assert current_lock.fencing_token == self.lock.fencing_token
    with noted(self, number):
        time.sleep(seconds)
    return number


@app.task(base=SingletonTask, bind=True, name="gated", unique_on="key", on_conflict=Conflict.wait(timeout=60))
def gated(self: Any, number: int, gate: str, key: str = "k") -> int:
    """Runs until there is a file `gate`."""
    with noted(self, number):
        while not Path(gate).exists():
            time.sleep(0.02)
    return number


@app.task(base=SingletonTask, bind=True, name="freezing", lock_key="all", on_conflict=Conflict.retry(countdown=0.2))
def freezing(self: Any, number: int) -> None:
    """Sends itself SIGSTOP inside the critical section, once: its second run goes through."""
    with noted(self, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)


@app.task(base=SingletonTask, bind=True, name="catching", lock_key="all")
def catching(self: Any, number: int) -> str:
    """Takes its LockLost for its own affair."""
    try:
        with noted(self, number):
            time.sleep(600)
    except LockLost as lost:
        return str(lost)
    return "never lost"


@app.task(base=SingletonTask, bind=True, name="computing", unique_on="key", on_conflict=Conflict.wait(timeout=60))
def computing(self: Any, number: int, seconds: float, key: str = "k") -> int:
    """Python code that neither sleeps nor yields."""
    with noted(self, number):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
    return number


@app.task(base=SingletonTask, bind=True, name="holding", unique_on="key", on_conflict=Conflict.wait(timeout=60))
def holding(self: Any, number: int, seconds: int, then: float, key: str = "k") -> int:
    """One call into C that keeps the GIL; then Python code again, which yields."""
    with noted(self, number):
        keep_gil(seconds)
        end = time.monotonic() + then
        while time.monotonic() < end:
            time.sleep(0.01)
    return number


def keep_gil(seconds: int) -> None:
    """No other thread of this process runs meanwhile."""
    left = seconds
    while left:  # what a signal has left of it
        left = ctypes.PyDLL(None).sleep(left)


@app.task(bind=True, name="unstable", base=SingletonTask, serializer="pickle")
def unstable(self: Any, thing: Any) -> None:
    raise AssertionError("must not run")


class Curious(SingletonTask):
    """Asks for its lock before there is one, as a project's logging does."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        assert not self.lock.is_held()


curious = app.task(base=Curious, bind=True, name="curious", unique_on="key", on_conflict="fail")(work)


@app.task(
    base=SingletonTask, bind=True, name="sends_itself", lock_key="all", on_conflict=Conflict.retry(0.2, max_wait=60)
)
def sends_itself(self: Any, number: int) -> Any:
    """Its author's own retry, once; then what the message says of waiting for the lock."""
    with noted(self, number):
        time.sleep(1)
        if self.request.retries == 0:
            raise self.retry(countdown=0.1)
    return (self.request.headers or {}).get("etcd_lock", {}).get("count", 0)


@app.task(base=SingletonTask, bind=True, name="tells", lock_key="all", on_conflict=Conflict.retry(countdown=0.2))
def tells(self: Any) -> dict[str, Any]:
    """With what its message was delivered."""
    return {"priority": self.request.delivery_info.get("priority")}


@app.task(base=SingletonTask, bind=True, name="rejecting", lock_key="all", acks_late=True)
def rejecting(self: Any, number: int) -> int:
    """Rejects its message into the queue, once."""
    with noted(self, number):
        if not self.request.delivery_info["redelivered"]:
            raise Reject("once more", requeue=True)
    return number


@app.task(base=SingletonTask, bind=True, name="later", lock_key="all", on_conflict=Conflict.retry(countdown=3))
def later(self: Any, number: int) -> int:
    """Stays away for three seconds when it meets another."""
    with noted(self, number):
        return number


@app.task(name="who")
def who() -> int:
    """Which child took the message."""
    return os.getpid()


@app.task(base=SingletonTask, bind=True, name="dying", unique_on="key", on_conflict=Conflict.wait(timeout=60))
def dying(self: Any, number: int, how: str, key: str = "k") -> None:
    """Ends its own process, inside the critical section."""
    with noted(self, number):
        if how == "segfault":
            ctypes.string_at(0)
        os._exit(int(how))


@app.task(base=SingletonTask, bind=True, name="stubborn", unique_on="key", on_conflict=Conflict.wait(timeout=60))
def stubborn(self: Any, number: int, seconds: float, key: str = "k") -> None:
    """Does not let itself be ended but by SIGKILL."""
    with noted(self, number):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(BaseException):
                time.sleep(end - time.monotonic())
