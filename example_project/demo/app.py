"""The demo's Celery app and its tasks: one without a lock, three with one, each with a conflict policy, and beat's."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, current_task
from celery.signals import worker_ready
from kombu.transport import TRANSPORT_ALIASES

from celery_etcd_lock import Conflict, current_lock, singleton_task
from example_project.demo import files, record

FOLDER = Path(os.environ["DEMO_FOLDER"])
RECORD = FOLDER / "record"
TTL = 4
BEAT_TTL = 6

app = Celery("demo")
app.conf.update(
    broker_url=os.environ["DEMO_BROKER"],
    result_backend=os.environ["DEMO_RESULTS"],
    task_default_queue="jobs",
    worker_prefetch_multiplier=1,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
    # Where etcd is comes from the environment: CELERY_ETCD_LOCK_ENDPOINTS.
    etcd_lock_ttl=TTL,
    etcd_lock_timeout=BEAT_TTL / 3,
    etcd_lock_beat_ttl=BEAT_TTL,
    etcd_lock_enabled=os.environ.get("DEMO_LOCK") != "off",
    beat_schedule={"tick": {"task": "demo.ticked", "schedule": 1.0}},
)
if os.environ["DEMO_BROKER"].startswith("filesystem:"):
    TRANSPORT_ALIASES["filesystem"] = f"{files.__name__}:Transport"
    for name in ("queue", "taken", "control", "results"):
        (FOLDER / name).mkdir(exist_ok=True)
    app.conf.broker_transport_options = {
        "data_folder_in": str(FOLDER / "queue"),
        "data_folder_out": str(FOLDER / "queue"),
        "processed_folder": str(FOLDER / "taken"),
        "store_processed": True,
        "control_folder": str(FOLDER / "control"),
        "polling_interval": 0.05,
    }


@worker_ready.connect
def say_ready(sender: Any, **_: object) -> None:
    record.note(RECORD, what="ready", job=f"ready {sender.hostname}")


def work(job: str, number: int, seconds: float, token: int = 0) -> int:
    """The body of every task here: writes down that it starts, works, writes down that it ends."""
    worker = str(current_task.request.hostname).partition("@")[0]
    record.note(RECORD, what="start", job=job, number=number, worker=worker, token=token)
    time.sleep(seconds)
    record.note(RECORD, what="end", job=job, number=number)
    return number


@app.task(name="demo.unlocked")
def unlocked(job: str, number: int, seconds: float) -> int:
    return work(job, number, seconds)


@singleton_task(app=app, name="demo.retried", unique_on="job", on_conflict=Conflict.retry(backoff=0.2, backoff_max=0.8))
def retried(job: str, number: int, seconds: float) -> int:
    return work(job, number, seconds, current_lock.fencing_token)


@singleton_task(app=app, name="demo.skipped", unique_on="job", on_conflict=Conflict.skip(result="skipped"))
def skipped(job: str, number: int, seconds: float) -> int:
    return work(job, number, seconds, current_lock.fencing_token)


@singleton_task(app=app, name="demo.waiting", unique_on="job", on_conflict=Conflict.wait(timeout=30))
def waiting(job: str, number: int, seconds: float) -> int:
    return work(job, number, seconds, current_lock.fencing_token)


@app.task(name="demo.ticked", bind=True)
def ticked(self: Any) -> None:
    """What beats send: writes down for when it was due, as far as the message says."""
    due = (self.request.headers or {}).get("etcd_lock_beat", {}).get("due")
    record.note(RECORD, what="tick", job="tick", due=due)
