"""Tasks whose messages are delivered more than once; imported by the worker of `project` (setting ``imports``)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from kombu.transport.redis import Channel, QoS

from celery_etcd_lock import Conflict, SingletonTask
from celery_etcd_lock.signals import lock_released

project: Any = sys.modules["project"]
app, define, note, noted = project.app, project.define, project.note, project.noted

if not hasattr(Channel, "unacked_restore_throttle"):
    # A kombu before that option looks for messages that are overdue at every tenth occasion, that is every 100 s.
    QoS.restore_visible.__defaults__ = (0, 10, 1)

_soon = Conflict.retry(backoff=0.05, backoff_max=0.3)
late = define("late", acks_late=True, on_conflict=_soon)
late_skips = define("late_skips", acks_late=True, on_conflict=Conflict.skip(result="skipped"))
early = define("early", on_conflict=_soon)
requeued = define("requeued", acks_late=True, reject_on_worker_lost=True, on_conflict=_soon)
resent = define("resent", acks_late=True, retry_on_worker_lost=True, default_retry_delay=0.2, on_conflict=_soon)
dies_after_release = define("dies_after_release", acks_late=True, reject_on_worker_lost=True, on_conflict=_soon)


@app.task(base=SingletonTask, bind=True, name="retries_once", unique_on="key", acks_late=True, on_conflict=_soon)
def retries_once(self: Any, number: int, seconds: float = 0.05, key: str = "k") -> int:
    with noted(self, number):
        if not self.request.retries:
            raise self.retry(countdown=0)
    return number


@app.task(base=SingletonTask, bind=True, name="fails", unique_on="key", acks_late=True, on_conflict=_soon)
def fails(self: Any, number: int, key: str = "k") -> None:
    with noted(self, number):
        raise ValueError(number)


@app.task(bind=True, name="next_link")
def next_link(self: Any, number: int) -> int:
    """What comes after it in the chain: says how often the chain went on."""
    note("start", self, task=self.name, number=number, token=0, key="")
    note("end", self, task=self.name, number=number, ended="returned")
    return number + 1


@lock_released.connect
def die_once(record: Any, **_: Any) -> None:
    """Between the body and the next message of the chain."""
    died = Path(os.environ["RECORD"] + ".died")
    if record.task == "dies_after_release" and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
