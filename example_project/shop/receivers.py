"""What becomes of each message, written down from the signals of locks and of Celery, for the page to show.

They are sent where the task runs, and a receiver that blocks keeps its task waiting: so each writes one row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from celery.signals import task_prerun
from django.utils import timezone

from celery_etcd_lock.signals import AcquiredRecord, ContendedRecord, lock_acquired, lock_contended
from example_project.shop.models import JobRun, Tick

State = JobRun.State
_OUTCOMES = {"retry": State.WAITING, "wait": State.WAITING, "skip": State.SKIPPED, "fail": State.FAILED}
_OPEN = (State.SENT, State.WAITING)


@lock_contended.connect
def met_another(record: ContendedRecord, **_: object) -> None:
    """Somebody else holds the lock. A copy of a message that runs, or has run, is no job of its own."""
    run = _row(record.task_id, record.task)
    if run.pk is None and JobRun.objects.filter(task_id=record.task_id).exists():
        return
    run.state = _OUTCOMES.get(record.outcome, State.WAITING)
    run.lock, run.waits, run.because = record.lock, record.waits + (record.outcome == "retry"), record.holder[:200]
    if run.state in {State.SKIPPED, State.FAILED}:
        run.ended = timezone.now()
    run.save()


@lock_acquired.connect
def got_it(sender: Any, record: AcquiredRecord, **_: object) -> None:
    """The lock is held, and the body is about to begin. Whoever began with this message before has died."""
    JobRun.objects.filter(task_id=record.task_id, state=State.RUNNING).update(state=State.CUT_SHORT)
    run = _row(record.task_id, record.task)
    run.state, run.started = State.RUNNING, timezone.now()
    run.lock, run.token, run.waits = record.lock, record.fencing_token, record.waits
    run.worker, run.pid = sender.request.hostname or "", os.getpid()
    run.save()


@contextmanager
def written_down(task: Any) -> Iterator[None]:
    """Around a body: write down its end while the lock is still held."""
    how = State.FAILED
    try:
        yield
        how = State.DONE
    finally:
        run = JobRun.objects.filter(task_id=task.request.id, token=task.lock.fencing_token, state=State.RUNNING)
        run.update(state=how, ended=timezone.now())


@task_prerun.connect
def came_from_beat(task: Any, task_id: str, **_: object) -> None:
    """Of a message that a beat has sent: for when it was due. One that was put back comes again, and counts once."""
    tick = (task.request.headers or {}).get("etcd_lock_beat")
    if tick:
        due = datetime.fromisoformat(tick["due"])
        Tick.objects.get_or_create(entry=tick["entry"], due=due, task_id=task_id)


def _row(task_id: str, task: str) -> JobRun:
    """The row of a message that waits, or a new one."""
    return JobRun.objects.filter(task_id=task_id, state__in=_OPEN).first() or JobRun(task_id=task_id, task=task)
