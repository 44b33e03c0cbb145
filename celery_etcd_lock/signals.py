"""Celery signals that say what became of locks and of beat's ticks, each with a frozen record of what is known.

Connected as Celery's own are; the sender is the task, or of a session and of all that concerns beat the app::

    from celery_etcd_lock.signals import lock_contended

    @lock_contended.connect
    def count(sender, record, **kwargs):
        statsd.incr(f"lock.{record.outcome}", tags=[record.task])

They are sent where the task runs: under prefork in the child; those of beat in its process, ``leader_…`` in a thread of
its own. A receiver that raises is logged by Celery and harms
nothing; one that blocks keeps its task waiting. The log (`logs`) and the worker's events (`events`) are receivers too.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from celery.utils.dispatch import Signal

__all__ = [
    "AcquiredRecord",
    "ContendedRecord",
    "LeaderElectedRecord",
    "LeaderLostRecord",
    "LostRecord",
    "Outcome",
    "ReleasedRecord",
    "SessionLostRecord",
    "SessionOpenedRecord",
    "TickFencedRecord",
    "TickSentRecord",
    "leader_elected",
    "leader_lost",
    "lock_acquired",
    "lock_contended",
    "lock_lost",
    "lock_released",
    "session_lost",
    "session_opened",
    "tick_fenced",
    "tick_sent",
]

Outcome: TypeAlias = Literal["retry", "skip", "wait", "fail", "observed"]
"""What became of a task whose lock was taken: put back, skipped, waits in its slot, failed; or it runs all the same,
because locking only observes."""


class AcquiredRecord(NamedTuple):
    """The lock is held, and the body is about to begin."""

    task: str
    """The task's name."""
    task_id: str
    lock: str
    """The lock's name in etcd."""
    mode: str
    """``"exclusive"``, ``"shared"``, or ``"limit=4"``."""
    fencing_token: int
    waits: int
    """How often the message was put back because of a holder."""
    waited: float
    """Seconds since its first contention; 0 if there was none."""


class ContendedRecord(NamedTuple):
    """Somebody else holds the lock."""

    task: str
    task_id: str
    lock: str
    holder: str
    """Who, as far as they say."""
    since: str
    """Since when they are in line: ISO 8601, UTC; ``""`` if they do not say."""
    outcome: Outcome
    waits: int
    waited: float
    """Seconds since the first contention of this message."""
    pause: float
    """Seconds until it tries again (``"retry"``), or for which it waits at most (``"wait"``); else 0."""
    would: str = ""
    """``"observed"``: the outcome if locks were on."""


class ReleasedRecord(NamedTuple):
    """The lock was given back."""

    task: str
    task_id: str
    lock: str
    seconds: float
    """For which it was held."""
    answered: bool
    """False: etcd did not answer, and the session goes on until it is certain."""


class LostRecord(NamedTuple):
    """The lock could no longer be trusted while it was held."""

    task: str
    task_id: str
    lock: str
    reason: str
    seconds: float
    """Since it was taken."""
    on_lost: str
    """What the task does then: ``"abort"``, ``"retry"``, ``"warn"``."""


class SessionOpenedRecord(NamedTuple):
    """This process has a lease in etcd."""

    key: str
    lease: int
    ttl: int
    """Seconds, as etcd granted them."""


class SessionLostRecord(NamedTuple):
    """The lease of this process can no longer be trusted, and no lock that hangs on it."""

    key: str
    lease: int
    reason: str


class LeaderElectedRecord(NamedTuple):
    """This beat leads from now on: it sends the ticks, and the others stand by."""

    beat: str
    """``etcd_lock_beat_name``."""
    key: str
    """In etcd, what stands for its leadership."""
    fencing_token: int
    waited: float
    """Seconds for which it has stood by."""


class LeaderLostRecord(NamedTuple):
    """This beat does not lead any more, or cannot be sure of it. It sends nothing, and stands for election again."""

    beat: str
    key: str
    reason: str
    seconds: float
    """For which it has led."""


class TickSentRecord(NamedTuple):
    """The task of an entry that was due is published."""

    beat: str
    entry: str
    task: str
    task_id: str
    due: datetime
    """UTC."""
    late: float
    """Seconds since then."""
    again: bool
    """It may have been published before under this id, by a beat that did not live to say so."""


class TickFencedRecord(NamedTuple):
    """This beat took an entry for due and was kept from sending it."""

    beat: str
    entry: str
    task: str
    reason: str


# Any: a receiver may take what it likes, and Celery's own stubs know these only in part.
lock_acquired: Any = Signal(name="lock_acquired")
lock_contended: Any = Signal(name="lock_contended")
lock_released: Any = Signal(name="lock_released")
lock_lost: Any = Signal(name="lock_lost")
session_opened: Any = Signal(name="session_opened")
session_lost: Any = Signal(name="session_lost")
leader_elected: Any = Signal(name="leader_elected")
leader_lost: Any = Signal(name="leader_lost")
tick_sent: Any = Signal(name="tick_sent")
tick_fenced: Any = Signal(name="tick_fenced")

_HEARS = "_hears"


def hears(receiver: Callable[..., Any], when: Callable[[], bool]) -> None:
    """Let `receiver`, one of ours, be sent nothing for its own sake but `when` that says so."""
    setattr(receiver, _HEARS, when)


def heard(signal: Signal) -> bool:
    """Whether anybody hears `signal`, so that it is worth sending. Each run of a task asks this twice."""
    for _, receiver in signal.receivers:
        when = getattr(receiver, _HEARS, None)
        if when is None or when():
            return True
    return False
