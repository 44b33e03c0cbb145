"""Tasks for canvases: the same steps with each policy, and as plain tasks. The workers import this beside `project`."""

from __future__ import annotations

import time
from typing import Any

from project import app, note  # type: ignore[import-not-found]  # as the workers find it

from celery_etcd_lock import Conflict, LockContended, SingletonTask

KEY = "/{key}"
"""The lock of every step: of its key, whatever the task's name."""

POLICIES = {
    "retry": Conflict.retry(countdown=0.2),
    "skip": Conflict.skip(result="skipped"),
    "continue": Conflict.skip(result="skipped", chain="continue"),
    "wait": Conflict.wait(timeout=600),
    "fail": Conflict.fail(),
}


def step(self: Any, given: Any = "", *, case: str, label: str, key: str = "", how: str = "run") -> str:
    """Shows in its result what it was given. `how` is what a plain task does in place of one that meets its lock."""
    if how == "fail":
        raise LockContended(key)
    if how == "skip":
        return "skipped"
    note("start", self, case=case, label=label, key=key)
    time.sleep(0.02)
    note("end", self, case=case, label=label, key=key)
    return f"{label}({given})"


plain = app.task(bind=True, name="plain", throws=LockContended)(step)
for name, policy in POLICIES.items():
    app.task(base=SingletonTask, bind=True, name=f"{name}_step", lock_key=KEY, on_conflict=policy)(step)


@app.task(bind=True, name="called_back")
def called_back(self: Any, result: Any, *, case: str) -> None:
    note("start", self, case=case, label=f"called back with {result}")


@app.task(bind=True, name="erred")
def erred(self: Any, _failed: str, *, case: str) -> None:
    """An error callback that is sent as a message of its own."""
    note("start", self, case=case, label="erred")


@app.task(name="erred_inline")
def erred_inline(_request: Any, exc: Exception, _traceback: Any, *, case: str) -> None:
    """An error callback that is called where the task failed."""
    note("start", erred_inline, case=case, label=f"erred with {type(exc).__name__}")
