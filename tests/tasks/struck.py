"""A task that is struck by SIGUSR1, as by its soft time limit, at a random instant around its lock and its body.

Workers import it beside `project.py`, by Celery's setting ``imports``. With ``STRUCK_CONTROL`` in the environment
nothing defers the signal.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from contextlib import nullcontext
from functools import cache
from typing import Any

from celery import shared_task

from celery_etcd_lock import SingletonTask
from celery_etcd_lock.locks.held import HeldLock
from celery_etcd_lock.tasks import abort, guard
from celery_etcd_lock.tasks.guard import run_alone
from celery_etcd_lock.tasks.runtime import Runtime
from tests.strikes import Striker

project: Any = sys.modules["project"]

LATEST = 0.005
"""Seconds from the beginning of a call, of taking the lock or of giving it back, up to the strike."""

WIDER = 0.002
"""Seconds by which the instants are widened that are hard to hit: right after the lock was taken, right before it is
given back."""

if "STRUCK_CONTROL" in os.environ:
    for module in (guard, abort):
        module.deferred = module.allowed = nullcontext  # type: ignore[attr-defined]

acquire, release = Runtime.acquire, HeldLock.release


def acquire_and_dawdle(*args: Any, **kwargs: Any) -> HeldLock:
    own_striker().begins("acquire")
    held = acquire(*args, **kwargs)
    time.sleep(WIDER)
    return held


def dawdle_and_release(held: HeldLock, *args: Any) -> Any:
    own_striker().begins("release")
    time.sleep(WIDER)
    return release(held, *args)


Runtime.acquire = acquire_and_dawdle  # type: ignore[method-assign]
HeldLock.release = dawdle_and_release  # type: ignore[method-assign,assignment]


class RandomStriker(Striker):
    """Strikes once a run, soon after it was told that what was drawn by lot begins."""

    lot = ""

    def draw(self) -> None:
        self.lot = random.choice(["call", "acquire", "release"])

    def begins(self, what: str) -> None:
        if what == self.lot:
            self.lot = ""
            self.set(random.uniform(1e-5, LATEST))

    def rest(self) -> None:
        self.lot = ""
        self.set(0)


@cache
def own_striker() -> RandomStriker:
    """Of this process, made when it is first wanted: a forked child has none of its parent's timers."""
    return RandomStriker(signal.SIGUSR1)


def run_struck(task: Any, request: Any, args: Any, kwargs: Any, body: Any, *, observes: bool) -> Any:
    """Struck from before its lock is taken until after it was given back, and never in Celery's own code."""
    if not kwargs.get("strike"):
        return run_alone(task, request, args, kwargs, body, observes=observes)
    striker = own_striker()
    try:
        striker.draw()
        striker.begins("call")
        return run_alone(task, request, args, kwargs, body, observes=observes)
    finally:
        striker.rest()


guard.run_alone = run_struck


@shared_task(base=SingletonTask, bind=True, name="struck", unique_on="number", on_conflict="fail")
def struck(self: Any, number: int, strike: bool = False) -> int:
    with project.noted(self, number):
        pass
    return number
