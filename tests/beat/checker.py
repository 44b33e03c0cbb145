"""Whether every tick was sent once: from what the worker received and what was done to the beats. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise

__all__ = ["Disturbance", "Receipt", "Report", "Rules", "check"]

_EARLY = 0.1
"""Seconds by which two due times of an interval may be closer than it: Celery takes 10 ms off."""
_ADRIFT = 0.5
"""Seconds from a message to what its scheduler writes down as the time when it was sent."""
_AROUND = 1.5
"""Seconds from a message to the moment in which its sender was struck, before its confirmation or just after it."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """One message that the worker received."""

    entry: str
    id: str
    at: float
    """Unix time."""
    due: str
    """ISO 8601, UTC, as the message says; ``""``: it does not, it is from a plain beat."""
    pid: int = 0
    """Of the beat that sent it."""
    sent: float = 0.0
    """When that beat did, in Unix time; 0: it is not known, and taken to be when it was received."""

    def slot(self, every: float) -> float:
        """The due time, in Unix time. Of a plain beat: that of one alone, which ticks with the clock."""
        return datetime.fromisoformat(self.due).timestamp() if self.due else self.at // every * every

    @property
    def left(self) -> float:
        """When its sender sent it, in Unix time."""
        return self.sent or self.at


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What was done, and for how long ticks may have been late because of it; Unix time."""

    what: str
    begin: float
    end: float
    pid: int = 0
    """The beat to which it was done; 0: to etcd."""
    strikes: tuple[float, ...] = ()
    """When that beat may have been between fence and confirmation: as it was killed or frozen, and as it woke up.

    Of etcd: from when to when it was away. Empty: from `begin` to `end`."""

    def excuses(self, one: Receipt, two: Receipt) -> bool:
        """Whether it explains that an id which came as `one` came once more, as `two`."""
        if not self.pid:  # etcd did not take the confirmation
            back = self.strikes[-1] + _AROUND if self.strikes else self.end
            return self.begin - _AROUND <= one.left <= back
        if one.pid == two.pid:  # who was killed sends nothing more, and who was frozen is followed by another
            return False
        mine = one if one.pid == self.pid else two
        return mine.pid == self.pid and any(abs(when - moment) <= _AROUND
            for when in (mine.left, mine.at) for moment in self.strikes)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rules:
    intervals: Mapping[str, float]
    """Seconds between two ticks, by entry."""
    slack: float
    """Seconds by which a tick may be late where nothing was done."""
    once: Collection[str] = ()
    """Entries whose task runs once for each id, whatever happens."""
    calendar: Collection[str] = ()
    """Entries that are due when the clock shows a multiple of their interval; others are so long after they ran."""
    plain: bool = False
    """The messages do not say for when they are: a slot is where the clock was."""


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
    rules: Rules,
    *,
    begin: float,
    end: float,
    promised: Mapping[str, str] | None = None,
) -> Report:
    """From `begin` to `end`, in Unix time, beats were there.

    `promised`: by id, what was done in the middle of the tick of that id, which has to come even so.
    """
    report = Report()
    for entry in rules.intervals:
        mine = sorted((each for each in receipts if each.entry == entry), key=lambda each: each.at)
        report.received[entry] = len(mine)
        one = _Entry(entry, rules.intervals[entry], mine, disturbances, rules, begin, end, report)
        one.ids()
        one.repeats()
        one.pace()
        one.gaps()
        if not rules.plain:
            one.times()
            one.phase()
    there = {each.id for each in receipts}
    report.violations += [f"{name} never came: {why}" for name, why in (promised or {}).items() if name not in there]
    return report


@dataclass(frozen=True)
class _Entry:
    """One entry's receipts, in the order of time, and what there is to find."""

    name: str
    every: float
    receipts: Sequence[Receipt]
    disturbances: Sequence[Disturbance]
    rules: Rules
    begin: float
    end: float
    report: Report

    def ids(self) -> None:
        ids: dict[float, set[str]] = defaultdict(set)
        for each in self.receipts:
            ids[each.slot(self.every)].add(each.id)
        for slot, several in ids.items():
            if len(several) > 1:
                self._violated(f"the slot {slot:.3f} was sent under {len(several)} ids")

    def repeats(self) -> None:
        for name, copies in self._by_id().items():
            for one, two in pairwise(copies):
                text = f"{name} was received {len(copies)} times, {two.at - one.at:.1f} s apart"
                likeliest = sorted(self.disturbances, key=lambda each: not each.pid)
                excuses = [] if self.name in self.rules.once else [d for d in likeliest if d.excuses(one, two)]
                if excuses:
                    self.report.repeats.append(f"{self.name}: {text}: {excuses[0].what}")
                else:
                    self._violated(f"{text}, by {one.pid} and {two.pid}")

    def pace(self) -> None:
        """No burst: no two slots closer to each other than the interval, nor two that are sent at once."""
        slots = sorted({each.slot(self.every) for each in self.receipts})
        for one, two in pairwise(slots):
            if two - one < self.every - _EARLY:
                self._violated(f"the slots {one:.3f} and {two:.3f} are {two - one:.3f} s apart")
        if self.rules.plain or self.name in self.rules.calendar:
            return  # one that is late, and the next one on time, are as close as it happens
        closest = max(self.every * 0.3, self.every - 1.5)  # it counts from before the fence, which may have to wait
        times = sorted(copies[0].left for copies in self._by_id().values())
        for before, after in pairwise(times):
            if after - before < closest:
                self._violated(f"two ticks were sent {after - before:.3f} s apart, at {after:.3f}")

    def gaps(self) -> None:
        """No gap but those that disturbances explain: nowhere longer than interval and slack, not counting those."""
        times = [each.at for each in self.receipts if self.begin < each.at < self.end]
        for one, two in pairwise([self.begin, *times, self.end]):
            self.report.late[self.name] = max(self.report.late.get(self.name, 0.0), two - one)
            undisturbed = self._undisturbed(one, two)
            if undisturbed > self.every + self.rules.slack:
                what = f"nothing for {two - one:.1f} s from {one:.3f}, of which {undisturbed:.1f} s without a reason"
                self._violated(what)

    def times(self) -> None:
        """No tick before its time, nor long after it but for a reason; of a calendar, all of them."""
        for copies in self._by_id().values():
            first, slot = copies[0], copies[0].slot(self.every)
            if not first.due:
                self._violated(f"{first.id} does not say for when it is")
            if first.left < slot - _EARLY:
                self._violated(f"{first.id} was sent {slot - first.left:.3f} s before its time")
            if (late := self._undisturbed(slot, first.left)) > self.rules.slack:
                self._violated(f"{first.id} was sent {late:.1f} s late without a reason")
        if self.name not in self.rules.calendar:
            return
        came = {each.slot(self.every) for each in self.receipts}
        for slot in came:
            if slot % self.every:
                self._violated(f"nothing is due at {slot:.3f}")
        for number in range(math.ceil(self.begin / self.every), math.floor(self.end / self.every) + 1):
            slot = number * self.every
            if slot not in came and self._undisturbed(slot, self.end) > self.rules.slack:
                self._violated(f"the slot {slot:.3f} is missing")

    def phase(self) -> None:
        """An interval counts from when the tick before was sent, also where another beat did that."""
        if self.name in self.rules.calendar or self.name in self.rules.once:
            return  # of a singleton's copies nobody knows when the last one was sent
        by_slot: dict[float, float] = {}
        for each in self.receipts:
            slot = each.slot(self.every)
            by_slot[slot] = max(by_slot.get(slot, 0.0), each.left)
        for (one, sent), (two, _) in pairwise(sorted(by_slot.items())):
            steps = math.floor((two - one + _EARLY) / self.every)
            beyond = two - (sent + steps * self.every)
            if steps >= 1 and beyond > _ADRIFT:  # else it is too close: see `pace`
                self._violated(
                    f"the slots {one:.3f} and {two:.3f} are {steps} times the interval and {beyond:.3f} s apart"
                )

    def _by_id(self) -> dict[str, list[Receipt]]:
        by_id: dict[str, list[Receipt]] = defaultdict(list)
        for each in self.receipts:
            by_id[each.id].append(each)
        return by_id

    def _violated(self, what: str) -> None:
        self.report.violations.append(f"{self.name}: {what}")

    def _undisturbed(self, one: float, two: float) -> float:
        """Seconds between `one` and `two` that lie in none of the disturbances."""
        total, reached = two - one, one
        for each in sorted(self.disturbances, key=lambda each: each.begin):
            begin, end = max(reached, each.begin), min(two, each.end)
            if end > begin:
                total -= end - begin
                reached = end
        return total
