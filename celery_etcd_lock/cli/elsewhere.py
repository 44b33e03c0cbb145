"""What workers and the result backend say of a task: asked side by side, and not waited for if they do not answer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from celery_etcd_lock.exceptions import LockContended
from celery_etcd_lock.inspection import MESSAGES

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["Elsewhere", "Message", "Result", "ask_elsewhere"]

_BESIDES = 2.0
"""Seconds for connecting, on top of the time that workers have to answer."""

T = TypeVar("T")


@dataclass(frozen=True)
class Message:
    """What a worker has of the message."""

    worker: str
    task: str
    state: str
    """``"active"``, ``"reserved"`` or ``"scheduled"``, as Celery says."""
    eta: str | None
    lock: str
    waits: dict[str, Any] = field(default_factory=dict)
    """As in the message's header."""


@dataclass(frozen=True)
class Result:
    """What the result backend has."""

    state: str
    contended: LockContended | None = None
    """With RETRY or FAILURE: who held the lock."""


@dataclass(frozen=True)
class Elsewhere:
    """All that was said, and why not more."""

    messages: list[Message] = field(default_factory=list)
    result: Result | None = None
    unknown: list[str] = field(default_factory=list)


def ask_elsewhere(app: Celery, task_id: str, timeout: float) -> Elsewhere:
    """Ask all workers, which have `timeout` seconds to answer, and the backend. Takes some seconds at most."""
    deadline = time.monotonic() + timeout + _BESIDES
    workers = _Question(lambda: _workers(app, task_id, timeout))
    backend = _Question(lambda: _result(app, task_id))
    said = Elsewhere()
    replies, why = workers.answer(deadline)
    if replies is None:
        said.unknown.append(f"what is in the workers: the broker {why}")
    elif not replies:
        said.unknown.append(f"what is in the workers: none has answered within {timeout:g} s")
    deaf = sorted(worker for worker, reply in (replies or {}).items() if "error" in reply)
    said.unknown.extend(f"what is in {worker}: it runs without this package, or an older one" for worker in deaf)
    said.messages.extend(_heard(replies, task_id))
    found, why = backend.answer(deadline)
    if found is None:
        said.unknown.append(f"its result: the result backend {why}")
    elif found.state == "RETRY" and replies and not said.messages:
        # It may have been on its way between two workers: that takes a moment.
        again, _ = _Question(lambda: _workers(app, task_id, timeout)).answer(time.monotonic() + timeout + _BESIDES)
        said.messages.extend(_heard(again, task_id))
    return Elsewhere(said.messages, found, said.unknown)


def _heard(replies: dict[str, Any] | None, task_id: str) -> Iterator[Message]:
    """Whoever has most of it first: a worker that has just put it back may have it, too."""
    having = ((worker, reply[task_id]) for worker, reply in (replies or {}).items() if task_id in reply)
    for worker, said in sorted(having, key=lambda each: -each[1]["waits"]["times"]):
        yield Message(worker, said["task"], said["state"], said.get("eta"), said.get("lock", ""), said["waits"])


class _Question(Generic[T]):
    """One that is asked in a thread of its own: clients of brokers try again for as long as they like."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._answers: queue.SimpleQueue[tuple[T | None, str]] = queue.SimpleQueue()
        self._ask = ask
        threading.Thread(target=self._run, name="etcd-lock-question", daemon=True).start()

    def _run(self) -> None:
        try:
            self._answers.put((self._ask(), ""))
        except _NotKept as error:
            self._answers.put((None, str(error)))
        except Exception as error:  # noqa: BLE001 - whatever the client of some broker raises
            reason = " ".join(str(error).split())
            self._answers.put((None, f"cannot be asked: {reason or type(error).__name__}"))

    def answer(self, deadline: float) -> tuple[T | None, str]:
        """The answer, or None and why there is none; at `deadline` (monotonic) at the latest."""
        try:
            return self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None, "has not answered in time"


class _NotKept(Exception):
    """There is nothing to ask."""


def _workers(app: Celery, task_id: str, timeout: float) -> dict[str, Any]:
    control: Any = app.control
    # A connection of its own: on Redis one that was asked on before may keep the next answer to itself.
    with app.connection_for_write() as connection:
        replies = control.broadcast(
            MESSAGES, arguments={"ids": [task_id]}, reply=True, timeout=timeout, connection=connection
        )
    return {worker: said for reply in replies or [] for worker, said in reply.items()}


def _result(app: Celery, task_id: str) -> Result:
    backend: Any = app.backend
    if type(backend).__name__ == "DisabledBackend":
        raise _NotKept("is not configured")
    meta = backend.get_task_meta(task_id)
    value = meta.get("result")
    return Result(str(meta.get("status", "PENDING")), value if isinstance(value, LockContended) else None)
