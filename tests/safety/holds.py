"""From events to intervals: who held what from when to when, what was promised of it, and when who could not run.

Of a hold four times matter, ``begin <= sure <= end`` and `vouched`::

    begin      is_held() was asked, after acquire had returned, and said True
    sure       it was asked for the last time and said True
    vouched    the latest time for which it was promised: ``remaining()`` after one of those looks
    end        release was about to be called, or the loss was said, or the process was killed
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.safety.history import Event, Fault, History

__all__ = ["Hold", "Pause", "Pauses", "conflict", "holds", "pauses"]

_NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Hold:
    """One acquisition that was granted. `events` are the evidence."""

    id: str
    pid: int
    name: str
    mode: str
    limit: int
    key: str
    created: int
    token: int
    lease: int
    queued: float
    begin: float
    sure: float
    vouched: float
    end: float
    how: str
    """How it ended: ``left``, ``lost``, ``killed``, or ``vanished``: nothing says how."""
    events: tuple[Event, ...] = field(repr=False, default=())

    def __str__(self) -> str:
        said = " ".join(f"{each.kind}@{each.at:.4f}" for each in self.events if each.kind != "looked")
        return (
            f"{self.key} of revision {self.created}, token {self.token}, pid {self.pid}: held {self.begin:.4f} to "
            f"{self.end:.4f} ({self.how}), last sure at {self.sure:.4f}, vouched for until {self.vouched:.4f} [{said}]"
        )


@dataclass(frozen=True, slots=True)
class Pause:
    """A time in which a process could not run: ``freeze`` (SIGSTOP), ``gil``, or ``stall`` (a slow machine)."""

    kind: str
    start: float
    end: float


class Pauses:
    """Those of each process."""

    def __init__(self, of: Mapping[int, list[Pause]]) -> None:
        self._of = of

    def during(self, pid: int, start: float, end: float) -> list[Pause]:
        return [each for each in self._of.get(pid, ()) if each.start < end and start < each.end]

    def awake(self, pid: int, start: float, end: float) -> float:
        """Seconds between `start` and `end` in which the process could run."""
        awake, at = 0.0, start
        for pause in sorted(self.during(pid, start, end), key=lambda each: each.start):
            awake += max(0.0, pause.start - at)
            at = max(at, pause.end)
        return awake + max(0.0, end - at)

    def stopped_at(self, pid: int, at: float) -> float | None:
        """Since when it was stopped at that time; None if it was not."""
        starts = [
            each.start for each in self._of.get(pid, ()) if each.kind == "freeze" and each.start <= at <= each.end
        ]
        return min(starts, default=None)


def pauses(history: History) -> Pauses:
    of: defaultdict[int, list[Pause]] = defaultdict(list)
    stopped: dict[int, float] = {}
    for fault in history.faults:
        if fault.kind == "stopped":
            stopped.setdefault(fault.pid, fault.at)
        elif fault.kind == "continued" and fault.pid in stopped:
            of[fault.pid].append(Pause("freeze", stopped.pop(fault.pid), max(fault.at, fault.done)))
    for pid, since in stopped.items():
        of[pid].append(Pause("freeze", since, _NEVER))
    taken: dict[tuple[int, str], float] = {}
    for event in history.events:
        who = (event.pid, event.thread)
        if event.kind == "stalled":
            of[event.pid].append(Pause("stall", event.since, event.at))
        elif event.kind == "gil_taken":
            taken[who] = event.at
        elif event.kind == "gil_given" and who in taken:
            of[event.pid].append(Pause("gil", taken.pop(who), event.at))
    for (pid, _), since in taken.items():  # it was killed before it gave it back
        of[pid].append(Pause("gil", since, _NEVER))
    return Pauses(of)


def holds(history: History, paused: Pauses) -> list[Hold]:
    """Every acquisition that was granted, in the order of their begins."""
    killed = {fault.pid: fault for fault in reversed(history.faults) if fault.kind == "killed"}
    events: defaultdict[str, list[Event]] = defaultdict(list)
    for event in history.events:
        if event.hold:
            events[event.hold].append(event)
    made = [_hold(each, killed, paused) for each in events.values() if any(e.kind == "acquired" for e in each)]
    return sorted(made, key=lambda hold: hold.begin)


def _hold(events: list[Event], killed: Mapping[int, Fault], paused: Pauses) -> Hold:
    got = next(event for event in events if event.kind == "acquired")
    looks = [event for event in events if event.kind in ("acquired", "looked")]
    sure = max(event.at for event in looks)
    ends: list[tuple[float, str]] = [(event.at, event.kind) for event in events if event.kind in ("left", "lost")]
    if not ends and got.pid in killed:
        at = killed[got.pid].at
        since = paused.stopped_at(got.pid, at)  # it has done nothing since then
        ends = [(at if since is None else since, "killed")]
    end, how = min(ends, default=(_NEVER, "vanished"))
    return Hold(
        id=got.hold,
        pid=got.pid,
        name=got.name,
        mode=got.mode,
        limit=got.limit,
        key=got.key,
        created=got.created,
        token=got.token,
        lease=got.lease,
        queued=_first(events, "queued", got.at),
        begin=got.at,
        sure=sure,
        vouched=max(event.at + event.remaining for event in looks),
        end=max(end, sure),
        how=how,
        events=tuple(events),
    )


def _first(events: Iterable[Event], kind: str, default: float) -> float:
    return next((event.at for event in events if event.kind == kind), default)


def conflict(one: str, other: str) -> bool:
    """Whether two of these modes keep each other out whatever their number."""
    return one == "write" or other == "write" or one != other
