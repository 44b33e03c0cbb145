"""The Celery project of the beats under test, and of the worker that receives what they send.

Set up by environment variables; see `beats.py`. Each task writes down what it was given, one line for each message.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery.schedules import crontab

from celery_etcd_lock import singleton_task

app = Celery("beating", broker=os.environ["BROKER_URL"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_default_queue=os.environ["QUEUE"],
    task_ignore_result=True,
    timezone="Europe/Berlin",  # not UTC, in which all times are written down
    beat_schedule={
        "second": {"task": "received", "schedule": 1.0, "args": ("second",)},
        "seven": {"task": "received", "schedule": 7.0, "args": ("seven",)},
        "minute": {"task": "received", "schedule": crontab(), "args": ("minute",)},
        "alone": {"task": "alone", "schedule": 1.0, "args": ("alone",)},
    },
    **json.loads(os.environ.get("SETTINGS", "{}")),
)


def note(self: Any, entry: str) -> None:
    tick = (self.request.headers or {}).get("etcd_lock_beat") or {}
    line = {"entry": entry, "id": self.request.id, "at": time.time(), "due": tick.get("due", "")}
    handle = os.open(os.environ["RECORD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, json.dumps(line).encode() + b"\n")
    finally:
        os.close(handle)


@app.task(bind=True, name="received")
def received(self: Any, entry: str) -> None:
    """What the worker was sent: a plain task, which runs as often as it is delivered."""
    note(self, entry)


@singleton_task(app=app, bind=True, name="alone")
def alone(self: Any, entry: str) -> None:
    """A singleton, which runs once for each id."""
    note(self, entry)


@singleton_task(app=app, bind=True, name="late", acks_late=True)
def late(self: Any, entry: str) -> None:
    """One whose message is acknowledged at its end."""
    note(self, entry)


@singleton_task(app=app, bind=True, name="queued", unique_queued="until_end")
def queued(self: Any, entry: str) -> None:
    """One of which one message is in the queue."""
    note(self, entry)


def kill(body: Any = None, **_: Any) -> None:
    """Of the first beat that comes here with a message of the entry in ``KILL_ENTRY``; by the signal ``KILL_BY``."""
    if tuple(body[0]) == (os.environ["KILL_ENTRY"],):
        flag = Path(os.environ["RECORD"] + ".killed")
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), int(os.environ.get("KILL_BY", signal.SIGKILL)))


if "KILL_AT" in os.environ:
    getattr(signals, os.environ["KILL_AT"]).connect(kill)
