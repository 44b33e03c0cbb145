"""The entries of whatever scheduler is wrapped: when they last ran, and telling them when that was.

Some schedulers keep that in a store of their own, which all beats share (django-celery-beat: the database, RedBeat:
Redis); others have it in memory, and what an entry says there is when it was made. etcd comes before memory. Between
etcd and a shared store the later of the two counts: the store may lag behind (the database is written now and then),
and it may be ahead, where somebody has enabled an entry anew or put it off.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, TypeAlias

from celery.beat import ScheduleEntry, Scheduler
from celery.utils.time import maybe_make_aware

__all__ = ["Entry", "bring", "copy_with", "has_own_store", "in_utc", "last_run", "put_off", "runs"]

Entry: TypeAlias = Any
"""A `celery.beat.ScheduleEntry`, of whose fields type checkers know less than Celery does."""


def has_own_store(scheduler: type[Scheduler]) -> bool:
    """Whether its entries write down elsewhere that they ran."""
    return scheduler.Entry.__next__ is not ScheduleEntry.__next__


def in_utc(moment: datetime) -> datetime:
    """`moment`; one without a zone is taken as Celery takes it."""
    return maybe_make_aware(moment).astimezone(timezone.utc)


def last_run(entry: Entry) -> datetime | None:
    """When `entry` was last sent, as it says itself; UTC."""
    return None if entry.last_run_at is None else in_utc(entry.last_run_at)


def runs(entry: Entry) -> int:
    """How often it was sent, as it says itself."""
    return entry.total_run_count or 0


def bring(entry: Entry, last_run_at: datetime | None, total_run_count: int) -> None:
    """Have `entry` say what etcd knows: as it writes times itself, and in the model that it is made from."""
    if last_run_at is not None:
        own = entry.default_now()
        last_run_at = last_run_at.astimezone(own.tzinfo or timezone.utc)
        if own.tzinfo is None:
            last_run_at = last_run_at.replace(tzinfo=None)  # Celery takes it for UTC
    model = getattr(entry, "model", None)  # django-celery-beat's, and those written like it
    for each in (entry, model) if model is not None else (entry,):
        each.last_run_at, each.total_run_count = last_run_at, total_run_count


def put_off(entry: Entry) -> None:
    """Have the store know, too, when `entry` ran last, where the store says which entries are due: RedBeat's."""
    reschedule = getattr(entry, "reschedule", None)
    if reschedule is not None:
        reschedule(entry.last_run_at)


def copy_with(entry: Entry, options: dict[str, Any]) -> Entry:
    """`entry` with other options. By hand: copied as entries copy themselves, a model's would be read anew."""
    copied: Entry = object.__new__(type(entry))
    copied.__dict__.update(entry.__dict__, options=options)
    return copied
