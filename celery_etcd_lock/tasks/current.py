"""The lock of the running request: ``self.lock`` and `current_lock`, and what stands in for it where there is none."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

from celery import current_task
from celery.local import Proxy

from celery_etcd_lock.etcd.api import Compare
from celery_etcd_lock.exceptions import EtcdLockError, LockLost

if TYPE_CHECKING:
    from celery.app.task import Context

__all__ = ["TaskLock", "Unheld", "Unlocked", "current_lock", "lock_of"]

_ATTRIBUTE = "_etcd_lock"
_ENTERED = "_etcd_lock_entered"


class TaskLock(Protocol):
    """What a task can ask of its lock; `HeldLock` has more."""

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def fencing_token(self) -> int: ...
    def is_held(self) -> bool: ...
    def remaining(self) -> float: ...
    def assert_held(self) -> None: ...
    def compare(self) -> Compare: ...


class Unlocked:
    """Stands in for the lock of a run that does not lock: a direct call, an eager run, locking switched off.

    It counts as held, so that code under test runs; its tokens grow, within this process.
    """

    _tokens = itertools.count(1)
    _counting = threading.Lock()

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.key = ""
        with self._counting:
            self.fencing_token = next(self._tokens)

    def is_held(self) -> bool:
        return True

    def remaining(self) -> float:
        return float("inf")

    def assert_held(self) -> None:
        pass

    def compare(self) -> Compare:
        raise EtcdLockError("this run holds no lock in etcd: there is nothing to compare")


class Unheld:
    """Stands in for the lock of a run without one: etcd was away, and ``on_unavailable="run"``."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.key = ""
        self._reason = reason

    @property
    def fencing_token(self) -> int:
        self._refuse()

    def is_held(self) -> bool:
        return False

    def remaining(self) -> float:
        return 0.0

    def assert_held(self) -> None:
        self._refuse()

    def compare(self) -> Compare:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise LockLost(f"{self.name} has no lock: {self._reason}")


def lock_of(request: Context) -> TaskLock:
    """The lock of `request`; if it has none a stand-in: one that is not held while the real one is still to come."""
    lock = request.__dict__.get(_ATTRIBUTE)
    if lock is None:
        if not (request.called_directly or request.is_eager):
            return Unheld("the task", "it is taken right before the body starts")
        lock = Unlocked()
        set_lock(request, lock)
    return cast("TaskLock", lock)


def set_lock(request: Context, lock: TaskLock) -> None:
    """From now on `lock` is the lock of `request`."""
    request.__dict__[_ATTRIBUTE] = lock


def enter(request: Context) -> bool:
    """Whether the body of `request` begins now: False if it runs already, and calls its own task."""
    if _ENTERED in request.__dict__:
        return False
    request.__dict__[_ENTERED] = True
    return True


def has_entered(request: Context) -> bool:
    """Whether the body of `request` has begun, or its turn was over before that."""
    return _ENTERED in request.__dict__


def _current_lock() -> TaskLock:
    task: Any = current_task
    if not task:
        raise RuntimeError("current_lock is the lock of the running task, and no task runs here")
    if not hasattr(task, "lock_name"):
        raise RuntimeError(f"current_lock: {task.name} is no singleton task, and has no lock")
    return lock_of(task.request)


class _CurrentLock(Proxy):  # type: ignore[type-arg] # it has one for type checkers alone
    """Has a class outside of tasks too: who goes through all objects of a process and asks is answered, not stopped."""

    def _get_class(self) -> type[Any]:
        try:
            return type(self._get_current_object())
        except RuntimeError:
            return _CurrentLock


current_lock = cast("TaskLock", _CurrentLock(_current_lock))
"""The lock of the task that runs in this thread, as `celery.current_task` is the task."""
