"""What a history comes to: each stay with its times, and from when to when all of it goes. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import groupby
from typing import Any

from celery_etcd_lock.cli.history.instants import Calendar, Instant
from celery_etcd_lock.cli.history.past import Reach
from celery_etcd_lock.cli.history.timeline import Scope, Stay, task_and_key

__all__ = ["Span", "Story", "iso", "tell"]


@dataclass(frozen=True, slots=True)
class Span:
    """One contender's stay, in time. What has not come about is None."""

    stay: Stay
    came: Instant
    let_in: Instant | None
    gone: Instant | None
    now: float

    @property
    def unsure(self) -> bool:
        """It may have been let in earlier than at `let_in`, or though that is None."""
        return self.stay.let_in_before or not self.stay.limit_known

    def waited(self) -> tuple[float, float]:
        """At least and at most, in seconds."""
        least, most = _between(self.came, self.let_in or self.gone, self.now)
        return (0.0, most) if self.unsure else (least, most)

    def held(self) -> tuple[float, float] | None:
        """At least and at most, in seconds; None: not at all."""
        most = _between(self.came, self.gone, self.now)[1]
        if self.let_in is None:
            return (0.0, most) if self.unsure else None
        least, surely = _between(self.let_in, self.gone, self.now)
        return least, most if self.unsure else surely


def _between(start: Instant, end: Instant | None, now: float) -> tuple[float, float]:
    if end is None:
        return max(0.0, now - start.latest), max(0.0, now - start.earliest)
    return max(0.0, end.earliest - start.latest), max(0.0, end.latest - start.earliest)


@dataclass(frozen=True, slots=True)
class Story:
    scope: Scope
    spans: tuple[Span, ...]
    reach: Reach
    begins: Instant
    """When `reach.start` was."""
    since: float
    """What happened before this is not told; Unix seconds, as all times here."""
    now: float
    left_out: int = 0
    """How many stays are not told because of a limit."""
    misfits: dict[str, int] = field(default_factory=dict)

    def by_lock(self) -> list[tuple[str, list[Span]]]:
        return [(lock, list(spans)) for lock, spans in groupby(self.spans, key=lambda span: span.stay.lock)]

    def to_json(self) -> dict[str, Any]:
        return {
            "from": {
                "revision": self.reach.start,
                **_instant(self.begins),
                "why": "compacted" if self.reach.compacted else "asked" if self.reach.start > 1 else "all",
            },
            "to": {"revision": self.reach.head, "at": iso(self.now)},
            "since": iso(self.since),
            "complete": self.reach.complete,
            "left_out": self.left_out,
            "clocks_off": self.misfits,
            "locks": [
                {
                    "lock": lock,
                    **dict(zip(("task", "key"), task_and_key(self.scope, lock), strict=True)),
                    "contenders": [_span(span) for span in spans],
                }
                for lock, spans in self.by_lock()
            ],
        }


def tell(
    scope: Scope,
    stays: Iterable[Stay],
    calendar: Calendar,
    reach: Reach,
    *,
    since: float,
    now: float,
    limit: int,
    dropped: int = 0,
) -> Story:
    """The story of `stays` as far as they are not over before `since`: the `limit` newest, those who hold it before
    those who wait. `dropped`: how
    many there were besides that are told nowhere.
    """
    spans = [
        Span(stay, calendar.at(stay.came), _at(calendar, stay.let_in), _at(calendar, stay.gone), now) for stay in stays
    ]
    told = [span for span in spans if span.gone is None or span.gone.latest >= since]
    newest = sorted(told, key=_newness)[-limit:]
    chosen = {id(span) for span in newest}
    return Story(
        scope,
        tuple(span for span in told if id(span) in chosen),
        reach,
        calendar.at(reach.start),
        since,
        now,
        len(told) - len(chosen) + dropped,
        dict(calendar.misfits),
    )


def _newness(span: Span) -> tuple[bool, bool, int, int]:
    there = span.gone is None
    return there, there and span.let_in is not None, span.stay.gone or 0, span.stay.came


def iso(moment: float) -> str | None:
    """Unix seconds as ISO 8601, UTC; None for "at any time before"."""
    if moment == float("-inf"):
        return None
    return datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _at(calendar: Calendar, revision: int | None) -> Instant | None:
    return None if revision is None else calendar.at(revision)


def _instant(instant: Instant) -> dict[str, Any]:
    return {"at": iso(instant.best), "earliest": iso(instant.earliest), "latest": iso(instant.latest)}


def _span(span: Span) -> dict[str, Any]:
    stay, held = span.stay, span.held()
    return {
        "key": stay.key,
        "kind": stay.kind,
        "holder": stay.holder,
        "record": stay.record,
        "came": {"revision": stay.came, **_instant(span.came)},
        "held_from": span.let_in and {"revision": stay.let_in, **_instant(span.let_in), "or_before": span.unsure},
        "gone": span.gone and {"revision": stay.gone, **_instant(span.gone)},
        "with_its_session": stay.with_its_session,
        "waited_seconds": [_rounded(each) for each in span.waited()],
        "held_seconds": held and [_rounded(each) for each in held],
    }


def _rounded(seconds: float) -> float | None:
    return None if seconds == float("inf") else round(seconds, 3)
