"""A slot: one due time of one entry, the task id made from it, and what its message says."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, Final, NamedTuple

from celery.schedules import crontab, schedule, solar

from celery_etcd_lock.tasks.message import HEADER, published_as

__all__ = ["BEAT_HEADER", "Slot", "due_time", "options_for", "slot_of"]

BEAT_HEADER: Final = "etcd_lock_beat"
"""The header of a message that a beat has sent: ``{"name": …, "entry": …, "due": …}``, who, what, and for when."""

_IDS: Final = uuid.UUID("6b1f9f0e-6c0b-5d0a-9d7c-1f5d3c6f2b1e")
_MOST_STEPS: Final = 2000
"""Slots, at most, that are gone through for the latest one."""


class Slot(NamedTuple):
    """A due time, and the id of the task that is sent for it."""

    due: datetime
    """UTC."""
    task_id: str


def slot_of(scope: str, entry: str, due: datetime) -> Slot:
    """The slot of `entry` that is `due`, of the beat whose keys are under `scope`. The same for the same."""
    due = due.astimezone(timezone.utc)
    return Slot(due, str(uuid.uuid5(_IDS, f"{scope}{entry}/{due.isoformat()}")))


def due_time(plan: Any, last_run_at: datetime, now: datetime) -> datetime:
    """When the tick was due that `plan`, a schedule of Celery's, finds due at `now`; of several missed the latest.

    All times aware. `now` itself where the schedule does not say.
    """
    every: timedelta | None = getattr(plan, "run_every", None)
    if type(plan) is schedule and not plan.relative and every:
        last = last_run_at.astimezone(timezone.utc)  # elsewhere a day would have 23 hours, now and then
        return last + max(1, (now.astimezone(timezone.utc) - last) // every) * every
    frozen = _at(plan, now)
    try:
        due = _following(frozen, last_run_at, now)
        if due is None or due > now:
            return now
        return _latest(frozen, due, now) if isinstance(plan, (crontab, solar)) else due
    except Exception:  # noqa: BLE001 whatever somebody's own schedule does: it was due, and that is when
        return now


def _at(plan: Any, now: datetime) -> Any:
    """`plan` with its clock stopped: a copy by hand, as schedules copy themselves without their app."""
    frozen: Any = object.__new__(type(plan))
    frozen.__dict__.update(plan.__dict__)
    frozen.nowfun = lambda: now
    return frozen


def _following(frozen: Any, moment: datetime, now: datetime) -> datetime | None:
    """The slot that comes after `moment`."""
    remaining = frozen.remaining_estimate(moment)
    if remaining is None:
        return None
    due: datetime = (now.astimezone(timezone.utc) + remaining).astimezone(now.tzinfo)
    by_the_wall: datetime = now + remaining
    by_the_clock = isinstance(frozen, crontab)
    if by_the_clock and not (due.hour in frozen.hour and due.minute in frozen.minute):
        return by_the_wall  # so Celery 5.4 counts, over the change to and from summer time
    return due


def _latest(frozen: Any, due: datetime, now: datetime) -> datetime:
    """The last slot up to `now`, of a schedule by the calendar with a slot at `due`."""
    back = timedelta(minutes=1)
    while now - back > due:  # look back further and further, not through all that was missed in a year
        found = _following(frozen, now - back, now)
        if found is not None and found <= now:
            due = found
            break
        back *= 2
    for _ in range(_MOST_STEPS):
        following = _following(frozen, due, now)
        if following is None or not due < following <= now:
            break
        due = following
    return due


def options_for(
    options: Mapping[str, Any], slot: Slot, *, beat: str, entry: str, singleton: bool, again: bool
) -> dict[str, Any]:
    """The options with which `entry`, whose own are `options`, is published for `slot`; `again`: perhaps not first.

    A task id that the entry itself has stays. The message of a `singleton` says that there may be copies of it, so that
    of two with this id one runs.
    """
    headers = dict(options.get("headers") or {})
    headers[BEAT_HEADER] = {"name": beat, "entry": entry, "due": slot.due.isoformat()}
    task_id = options.get("task_id") or slot.task_id
    if singleton:
        own = headers.get(HEADER)
        said = published_as(task_id, f"{slot.due.timestamp():.6f}", time.time(), repeated=again)
        headers[HEADER] = {**(own if isinstance(own, Mapping) else {}), **said}
    return {**options, "task_id": task_id, "headers": headers}
