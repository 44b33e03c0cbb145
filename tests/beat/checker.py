"""Whether every tick was sent once: from what the worker received and what was done to the beats. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise

__all__ = ["Disturbance", "Receipt", "Report", "check"]

_EARLY = 0.1
"""Seconds by which two due times of an interval may be closer than it: Celery takes 10 ms off."""
_AROUND = 1.5
"""Seconds by which what excuses a repeat may have begun after the first receipt, which came by way of a broker."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """One message that the worker received."""

    entry: str
    id: str
    at: float
    """Unix time."""
    due: str
    """ISO 8601, UTC, as the message says; ``""``: it does not, it is from a plain beat."""

    def slot(self, every: float) -> float:
        """The due time, in Unix time. Of a plain beat: that of one alone, which ticks with the clock."""
        return datetime.fromisoformat(self.due).timestamp() if self.due else self.at // every * every


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What was done, and for how long ticks may have been late because of it; Unix time."""

    what: str
    begin: float
    end: float


@dataclass
class Report:
    violations: list[str] = field(default_factory=list)
    repeats: list[str] = field(default_factory=list)
    """Ids that were received twice, with an excuse."""
    received: dict[str, int] = field(default_factory=dict)
    late: dict[str, float] = field(default_factory=dict)
    """By entry, the longest time without a tick, in seconds."""


def check(
    receipts: Sequence[Receipt],
    disturbances: Sequence[Disturbance],
    intervals: Mapping[str, float],
    *,
    begin: float,
    end: float,
    slack: float,
    once: Iterable[str] = (),
) -> Report:
    """`intervals`: seconds between two ticks, by entry. From `begin` to `end`, in Unix time, beats were there.

    `slack`: seconds by which a tick may be late where nothing was done. `once`: entries whose task runs once for each
    id, whatever happens.
    """
    report = Report()
    for entry, every in intervals.items():
        mine = sorted((each for each in receipts if each.entry == entry), key=lambda each: each.at)
        report.received[entry] = len(mine)
        _ids(report, entry, every, mine)
        _repeats(report, entry, mine, () if entry in once else disturbances)
        _pace(report, entry, every, mine)
        _gaps(
            report,
            entry,
            every,
            [begin, *(each.at for each in mine if begin < each.at < end), end],
            disturbances,
            slack,
        )
    return report


def _ids(report: Report, entry: str, every: float, mine: Sequence[Receipt]) -> None:
    ids: dict[float, set[str]] = defaultdict(set)
    for each in mine:
        ids[each.slot(every)].add(each.id)
    for slot, several in ids.items():
        if len(several) > 1:
            report.violations.append(f"{entry}: the slot {slot:.3f} was sent under {len(several)} ids")


def _repeats(report: Report, entry: str, mine: Sequence[Receipt], excuses: Sequence[Disturbance]) -> None:
    by_id: dict[str, list[float]] = defaultdict(list)
    for each in mine:
        by_id[each.id].append(each.at)
    for name, times in by_id.items():
        if len(times) == 1:
            continue
        first = times[0]
        excuse = next((each for each in excuses if each.begin - _AROUND <= first <= each.end), None)
        text = f"{entry}: {name} was received {len(times)} times, {times[-1] - first:.1f} s apart"
        if excuse is None:
            report.violations.append(text)
        else:
            report.repeats.append(f"{text}: {excuse.what}")


def _pace(report: Report, entry: str, every: float, mine: Sequence[Receipt]) -> None:
    """No burst: no two slots closer to each other than the interval."""
    slots = sorted({each.slot(every) for each in mine})
    for one, two in pairwise(slots):
        if two - one < every - _EARLY:
            report.violations.append(f"{entry}: the slots {one:.3f} and {two:.3f} are {two - one:.3f} s apart")


def _gaps(
    report: Report, entry: str, every: float, times: Sequence[float], disturbances: Sequence[Disturbance], slack: float
) -> None:
    """No gap but those that disturbances explain: nowhere longer than interval and slack, not counting those."""
    for one, two in pairwise(times):
        report.late[entry] = max(report.late.get(entry, 0.0), two - one)
        undisturbed = two - one - _covered(one, two, disturbances)
        if undisturbed > every + slack:
            what = f"nothing for {two - one:.1f} s from {one:.3f}, of which {undisturbed:.1f} s without a reason"
            report.violations.append(f"{entry}: {what}")


def _covered(one: float, two: float, disturbances: Sequence[Disturbance]) -> float:
    """Seconds between `one` and `two` that lie in any of the disturbances."""
    total, reached = 0.0, one
    for each in sorted(disturbances, key=lambda each: each.begin):
        begin, end = max(reached, each.begin), min(two, each.end)
        if end > begin:
            total += end - begin
            reached = end
    return total
