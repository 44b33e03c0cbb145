"""The Celery project of the beats under test, and of the worker that receives what they send.

Set up by environment variables; see `beats.py`. Each task writes down what it was given, one line for each message.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery.schedules import crontab

from celery_etcd_lock import singleton_task
from tests.beat.broken import BREAKS

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


def note(entry: str, task_id: str, headers: Any) -> None:
    tick = (headers or {}).get("etcd_lock_beat") or {}
    pid, sent = (headers or {}).get("stamp") or (0, 0.0)
    line = {"entry": entry, "id": task_id, "at": time.time(), "due": tick.get("due", ""), "pid": pid, "sent": sent}
    handle = os.open(os.environ["RECORD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, json.dumps(line).encode() + b"\n")
    finally:
        os.close(handle)


@app.task(bind=True, name="received")
def received(self: Any, entry: str) -> None:
    """What the worker was sent: a plain task, which runs as often as it is delivered."""
    note(entry, self.request.id, self.request.headers)


@singleton_task(app=app, bind=True, name="alone")
def alone(self: Any, entry: str) -> None:
    """A singleton, which runs once for each id."""
    note(entry, self.request.id, self.request.headers)


def strike(at: str, body: Any, headers: Any) -> None:
    """Do to itself what `Beats.strike` has asked of the first beat that comes here, if any."""
    asked_for = Path(os.environ["RECORD"] + ".strike")
    if not asked_for.exists():
        return
    asked = json.loads(asked_for.read_text())
    (entry,) = body[0]
    if asked["at"] != at or asked["entry"] not in {"", entry}:
        return
    taken = asked_for.with_suffix(f".{os.getpid()}")
    with suppress(FileNotFoundError):
        asked_for.rename(taken)  # by one of them alone
        done = {"pid": os.getpid(), "when": time.time(), "entry": entry, "id": headers["id"]}
        taken.write_text(json.dumps(done))
        taken.rename(os.environ["RECORD"] + ".struck")
        os.kill(os.getpid(), asked["signal"])


def before(body: Any = None, headers: Any = None, **_: Any) -> None:
    headers["stamp"] = [os.getpid(), time.time()]
    strike("before publish", body, headers)


def after(body: Any = None, headers: Any = None, **_: Any) -> None:
    strike("after publish", body, headers)


if "beat" in sys.argv:
    signals.before_task_publish.connect(before)
    signals.after_task_publish.connect(after)


arrivals: set[tuple[str, float]] = set()


def arrived(request: Any = None, **_: Any) -> None:
    """Write down each message of the singleton, also one that is dropped; but once if the worker itself repeats it."""
    headers = request.message.headers
    arrival = request.id, headers.get("stamp", (0, 0.0))[1]
    if request.name == "alone" and arrival not in arrivals:
        arrivals.add(arrival)
        note("arrival", request.id, headers)


if os.environ.get("ARRIVALS"):
    signals.task_received.connect(arrived)
if os.environ.get("BROKEN"):
    BREAKS[os.environ["BROKEN"]]()
