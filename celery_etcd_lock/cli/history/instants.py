"""When a revision of etcd's was made. Pure.

etcd numbers its changes and dates none of them. But what we put says when: a contender `since` when it is in line, a
session its `start`, a beat's entry when it was last sent. Revisions and time grow together, so a change between two
dated ones was made between their times. That interval is known; the moment in it is a guess, by the revision.

A date comes from the clock of the host that put it. One that does not fit to the others is left out, and told.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from operator import attrgetter

from celery_etcd_lock.etcd.api import KeyValue

__all__ = ["Calendar", "Dated", "Instant", "dated", "unix"]

EXACT = 1.0
"""Seconds: an interval that is no longer is as good as a moment."""

_OFF = 5.0
"""Seconds: a clock that is further off is told."""

_revision = attrgetter("revision")
_time = attrgetter("time")


@dataclass(frozen=True, slots=True)
class Instant:
    """When something happened: surely in the interval, probably at `best`. Unix seconds."""

    earliest: float
    latest: float
    best: float

    @property
    def exact(self) -> bool:
        return self.latest - self.earliest <= EXACT


@dataclass(frozen=True, slots=True)
class Dated:
    """A revision of which somebody has said when it was. `time` in Unix seconds; `host`: whose clock."""

    revision: int
    time: float
    host: str = ""


def unix(text: object) -> float | None:
    """An ISO time as Unix seconds; UTC where it does not say. None if it is none."""
    try:
        moment = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return None


def dated(kv: KeyValue) -> Dated | None:
    """What the value of `kv` says about when it was put, if it does."""
    try:
        record = json.loads(kv.value)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    # A key that is put again (a session's, a sibling's) still says when it was first put.
    said, revision = record.get("since") or record.get("start"), kv.create_revision
    if not said and record.get("state") == "sent":
        said, revision = record.get("last_run_at"), kv.mod_revision
    time = unix(said) if said else None
    return None if time is None else Dated(revision, time, str(record.get("host", "")))


class Calendar:
    """Dates revisions, by those of which the date is known. `now`: Unix seconds, when `head` was the newest."""

    def __init__(self, known: Iterable[Dated], head: int, now: float) -> None:
        by_revision = {each.revision: each for each in sorted(known, key=_time, reverse=True)}
        ordered = sorted(by_revision.values(), key=_revision)
        # What claims to be of the future has a clock that is ahead of ours: it would bound nothing.
        self._fitting = _growing([each for each in ordered if each.time <= now + EXACT])
        self._head = head
        self._now = now
        self.misfits: Counter[str] = Counter(each.host or "a beat" for each in ordered if not self._fits(each))
        """How many dates of which host are more than some seconds off from what the others say."""

    def _fits(self, each: Dated) -> bool:
        said = self.at(each.revision)
        return said.earliest - _OFF <= each.time <= said.latest + _OFF

    def at(self, revision: int) -> Instant:
        """When `revision` was made. Before the first one that is dated, `earliest` is minus infinity."""
        fitting = self._fitting
        index = bisect_right(fitting, revision, key=_revision)
        after = fitting[index] if index < len(fitting) else Dated(self._head + 1, self._now)
        if index == 0:
            return Instant(float("-inf"), after.time, after.time)
        last = fitting[index - 1]
        if last.revision == revision:
            return Instant(last.time, last.time, last.time)
        latest = max(last.time, after.time)
        share = (revision - last.revision) / max(1, after.revision - last.revision)
        return Instant(last.time, latest, last.time + min(1.0, share) * (latest - last.time))


def _growing(ordered: list[Dated]) -> list[Dated]:
    """The longest selection of `ordered` in which time does not go backwards."""
    tails: list[float] = []
    ends: list[int] = []
    previous: list[int] = []
    for index, each in enumerate(ordered):
        place = bisect_right(tails, each.time)
        previous.append(ends[place - 1] if place else -1)
        if place == len(tails):
            tails.append(each.time)
            ends.append(index)
        else:
            tails[place], ends[place] = each.time, index
    selected: list[Dated] = []
    index = ends[-1] if ends else -1
    while index >= 0:
        selected.append(ordered[index])
        index = previous[index]
    return selected[::-1]
