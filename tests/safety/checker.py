"""Whether a history is that of a lock. Pure: `check(history, testimony) -> Report`.

What must hold, each by its name in a `Violation`:

overlap   two holds that exclude each other, or more slots than the limit, were not held at the same time
vouched   nobody else was let in, and the key was not gone, before the time for which a holder had last been promised
          the lock; whether the holder's process ran meanwhile does not matter
token     tokens strictly grow from one hold to the next that it excludes
order     so do create revisions: who came first was let in first
grant     at the revision that is its token a hold's key was there, and nobody who keeps it out was ahead of it
key       the key lives in the witness's account until the hold has ended
loss      what was lost stays lost, and what was taken away by hand is noticed in time
fence     the store took no write with an older token after one with a newer
record    the history is whole: no hold without an end, no line torn, except of a process that was killed; the
          witness has no gap

**Excuses.** Four things let a lock be passed on while a body goes on, and no lock can help it. They are counted apart,
as `Excused`, each only where the records prove it:

freeze    SIGSTOP inside the critical section: the holder's process did not run from the end of what it had been
          promised until the other was in, and had not looked since. Likewise ``gil``, a body that holds the GIL, and
          ``stall``, a machine too slow to let the process run (its own pulse says so)
by hand   its key was deleted, or its lease revoked, by hand, and the witness saw the key go at that time; until the
          holder's next look
etcd      etcd ended its lease early: a leader that was stopped took itself for the leader still when it woke, and sent
          the revocations that had come due while it slept, though its successor had renewed the leases meanwhile
          (etcd's issues 12528 and 15247; rarer than it was, and 3.5.16 still does it). The records must show that
          etcd had answered a renewal on the wire, that the key was gone before the whole TTL from the sending of it
          was over, whatever the library made of that; that it was the lease that had ended, for the session's key
          went at the same revision; and that the holder's own process had not asked for that. It lasts until the end
          of what the holder was promised, or its session since then

And each only if the fenced store kept the late holder out: every write of its that came after one of the newer holder
was refused, and there was one, for every body writes at its end. Where the newer holder wrote nothing that was taken
before the older one's last try, or the older one was killed, nothing came late: that is said, too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, TypeAlias

from tests.safety.history import Fault, History, Write
from tests.safety.holds import Hold, Pauses, conflict, holds, pauses
from tests.safety.witness import Account, Lifetime

__all__ = ["Excused", "Report", "Violation", "check"]

_NEVER = float("inf")
_AWAKE = 0.15
"""Seconds a process may have run after the end of what it was promised without having noticed: to wake up, to get to
its next look. Less than a tenth of the shortest TTL, which is what a session keeps as a margin."""
_TOLD = 1.0
"""Seconds after which the witness has heard of a key, or nearly always."""
_RECENT = 50
"""Holds among which the one before is looked for: more than can be in at once."""

Rule: TypeAlias = Literal["overlap", "vouched", "token", "order", "grant", "key", "loss", "fence", "record"]
Cause: TypeAlias = Literal["freeze", "gil", "stall", "by hand", "etcd"]


@dataclass(frozen=True, slots=True)
class Violation:
    rule: Rule
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


@dataclass(frozen=True, slots=True)
class Excused:
    """An overlap that no lock can prevent, and what became of the late holder's writes."""

    cause: Cause
    late: Hold
    newer: Hold
    fence: Literal["refused", "nothing came late"]

    def __str__(self) -> str:
        return f"{self.cause}, {self.fence}:\n    late:  {self.late}\n    newer: {self.newer}"


@dataclass(frozen=True)
class Report:
    violations: tuple[Violation, ...]
    excused: tuple[Excused, ...]
    acquisitions: int
    handovers: int
    """Acquisitions that had to wait for somebody."""
    between_processes: int
    """Hand-overs from another process."""
    losses: int
    """Holds whose end was that they were said to be lost."""
    losses_by_hand: int
    """Those whose key was taken away by hand: nobody can say that before it has happened."""
    leases_ended_early: int
    """By etcd itself, while somebody held a lock under them."""
    losses_in_time: int
    """Those said before anybody else was in, and before the key was seen to be gone."""
    killed: int
    """Holds whose end was a SIGKILL."""
    worst_takeover: float
    """Seconds for which somebody wanted a lock after the end of a hold that was killed or lost until one was in."""
    writes: int
    refused: int

    @property
    def overlaps(self) -> Counter[str]:
        """The excused ones, by cause. A hold that slept for long may overlap with many."""
        return Counter(each.cause for each in self.excused)

    @property
    def late(self) -> Counter[str]:
        """The holds that did not know, by cause: each is one holder that went on too long."""
        return Counter({each.late.id: each.cause for each in self.excused}.values())

    def __str__(self) -> str:
        apart = [f"{cause} {number} (with {self.overlaps[cause]})" for cause, number in sorted(self.late.items())]
        kept = sum(each.fence == "refused" for each in self.excused)
        lines = [
            f"acquisitions: {self.acquisitions}, {self.killed} of them ended by SIGKILL",
            f"hand-overs: {self.handovers}, {self.between_processes} of them between processes",
            f"losses: {self.losses}, {self.losses_by_hand} of them by hand, {self.losses_in_time} said in time",
            f"leases that etcd ended early: {self.leases_ended_early}",
            f"worst takeover: {self.worst_takeover:.2f} s",
            f"writes: {self.writes}, {self.refused} of them refused",
            f"overlaps that no lock can prevent: {', '.join(apart) or 'none'}",
            f"    late writes refused: {kept}, nothing came late: {len(self.excused) - kept}",
            f"violations: {len(self.violations)}",
            *(f"- {violation}" for violation in self.violations),
        ]
        return "\n".join(lines)


def check(history: History, testimony: Account, *, ttl: float = 30.0) -> Report:
    """Everything that is wrong with `history`. `ttl`: of the sessions, in seconds."""
    return _Check(history, testimony, ttl).report()


class _Check:
    def __init__(self, history: History, testimony: Account, ttl: float) -> None:
        self.history = history
        self.testimony = testimony
        self.ttl = ttl
        self.pauses: Pauses = pauses(history)
        self.holds = holds(history, self.pauses)
        self.found: list[Violation] = []
        self.excused: dict[tuple[str, str], Excused] = {}
        self.by_name: defaultdict[str, list[Hold]] = defaultdict(list)
        for hold in self.holds:
            self.by_name[hold.name].append(hold)
        self.writes: defaultdict[str, list[Write]] = defaultdict(list)
        for write in history.writes:
            self.writes[write.hold].append(write)
        self.asked: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        """When somebody began to ask for a lock, and when they were answered."""
        queued: dict[str, float] = {}
        for event in history.events:
            if event.kind == "queued":
                queued[event.hold] = event.at
            elif event.kind in ("acquired", "refused") and event.hold in queued:
                self.asked[event.name].append((queued.pop(event.hold), event.at))
        self.killed = {fault.pid for fault in history.faults if fault.kind == "killed"}
        self.deleted: defaultdict[str, list[Fault]] = defaultdict(list)
        self.revoked: dict[int, Fault] = {}
        self.ended: dict[int, Fault] = {}
        self.promised: defaultdict[int, float] = defaultdict(float)
        """Of each lease, until when etcd itself, on the wire, has promised it."""
        for fault in history.faults:
            if fault.kind == "key_deleted":
                self.deleted[fault.key].append(fault)
            elif fault.kind == "lease_revoked":
                self.revoked.setdefault(fault.lease, fault)
            elif fault.kind == "session_ended":
                self.ended.setdefault(fault.lease, fault)
            elif fault.kind == "lease_promised":
                self.promised[fault.lease] = max(self.promised[fault.lease], fault.until)
        self.sessions = {each.lease: each for each in testimony.lifetimes if "/sessions/" in each.key}
        """The key of each session, by its lease: whoever ends the lease takes it, too, and nobody else does."""

    def report(self) -> Report:
        self.record()
        for name, on_name in self.by_name.items():
            self.overlaps(on_name)
            self.growth(on_name)
            self.grants(name, on_name)
        for hold in self.holds:
            self.key(hold)
            self.losses(hold)
        self.fence()
        waited = [hold for hold in self.holds if hold.token > hold.created]
        lost = [hold for hold in self.holds if hold.how == "lost"]
        return Report(
            violations=tuple(self.found),
            excused=tuple(self.excused.values()),
            acquisitions=len(self.holds),
            handovers=len(waited),
            between_processes=sum(before.pid != after.pid for before, after in self.handed_over()),
            losses=len(lost),
            losses_by_hand=sum(self.taken_away(hold, self.testimony.revision) == "by hand" for hold in lost),
            leases_ended_early=len({hold.lease for hold in self.holds if self.early(hold)}),
            losses_in_time=sum(self.said_in_time(hold) for hold in lost),
            killed=sum(hold.how == "killed" for hold in self.holds),
            worst_takeover=max(
                (self.waited(before, after) for before, after in self.handed_over() if before.how != "left"),
                default=0.0,
            ),
            writes=len(self.history.writes),
            refused=sum(not write.accepted for write in self.history.writes),
        )

    def violation(self, rule: Rule, text: str, *evidence: object) -> None:
        self.found.append(Violation(rule, "\n    ".join([text, *map(str, evidence)])))

    # -- the record itself

    def record(self) -> None:
        for gap in self.testimony.gaps:
            self.violation("record", f"the witness has a gap: {gap}")
        for pid in self.history.torn - self.killed:
            self.violation("record", f"a line of process {pid} is torn, and nobody killed it")
        for hold in self.holds:
            if hold.how == "vanished":
                self.violation("record", "a hold has no end, and nobody killed its process", hold)

    # -- nobody beside anybody

    def overlaps(self, on_name: Sequence[Hold]) -> None:
        inside: list[Hold] = []
        for hold in on_name:
            inside = [other for other in inside if other.end > hold.begin]
            for other in inside:
                if conflict(other.mode, hold.mode):
                    self.overlap(other, hold)
            if hold.mode == "slot":
                self.crowd([other for other in inside if other.mode == "slot"], hold)
            inside.append(hold)

    def overlap(self, late: Hold, newer: Hold) -> None:
        excuse = self.excuse(late, newer)
        if excuse is None:
            rule: Rule = "vouched" if newer.begin < late.vouched else "overlap"
            self.violation(
                rule, f"{late.name} was held twice", late, newer, *self.evidence(late), *self.evidence(newer)
            )
        else:
            self.fenced(excuse, late, newer)

    def crowd(self, inside: Sequence[Hold], hold: Hold) -> None:
        if len(inside) < hold.limit:
            return
        excuses = [(other, self.excuse(other, hold)) for other in inside]
        unexcused = [other for other, excuse in excuses if excuse is None]
        if len(unexcused) >= hold.limit:
            evidence = [line for other in unexcused for line in self.evidence(other)]
            self.violation("overlap", f"more than {hold.limit} were in {hold.name}", hold, *unexcused, *evidence)
        for other, excuse in excuses:
            if excuse is not None:
                self.fenced(excuse, other, hold)

    # -- in the order in which they came, with growing tokens

    def growth(self, on_name: Sequence[Hold]) -> None:
        highest: dict[tuple[str, str], Hold] = {}
        for hold in on_name:
            for (mode, what), before in highest.items():
                if not conflict(mode, hold.mode) or self.taken_away(hold, before.token):
                    continue  # gone before the other was let in: that may have begun earlier
                if what == "token" and hold.token <= before.token:
                    self.violation("token", f"the token of {hold.name} did not grow", before, hold)
                if what == "order" and hold.created <= before.created:
                    self.violation("order", f"somebody was overtaken in {hold.name}", before, hold)
            for what in ("token", "order"):
                value = attrgetter("token" if what == "token" else "created")
                best = highest.get((hold.mode, what))
                if best is None or value(hold) > value(best):
                    highest[hold.mode, what] = hold

    def grants(self, name: str, on_name: Sequence[Hold]) -> None:
        """Each grant by the rule of the queue, on what the witness saw."""
        queue = [each for each in self.testimony.lifetimes if each.key.startswith(name + "/")]
        changes: list[tuple[float, Lifetime, bool]] = [(each.created, each, True) for each in queue]
        changes += [(each.deleted, each, False) for each in queue if each.deleted < _NEVER]
        changes.sort(key=lambda change: (change[0], change[2]))
        alive: dict[str, Lifetime] = {}
        at = 0
        for hold in sorted(on_name, key=lambda hold: hold.token):
            while at < len(changes) and changes[at][0] <= hold.token:
                _, lifetime, came = changes[at]
                if came:
                    alive[lifetime.key] = lifetime
                else:
                    alive.pop(lifetime.key, None)
                at += 1
            own = alive.get(hold.key)
            if own is None or own.created != hold.created:
                seen = self.testimony.of(hold.key, hold.created)
                self.violation(
                    "grant", f"{name} was granted to one whose key was not there", hold, seen, *self.evidence(hold)
                )
                continue
            ahead = [each for each in alive.values() if each.created < hold.created]
            before = _keeping_out(hold, ahead)
            if before:
                self.violation("grant", f"{name} was granted past those who were ahead", hold, *before)

    # -- the key, and the loss

    def key(self, hold: Hold) -> None:
        lifetime = self.testimony.of(hold.key, hold.created)
        if lifetime is None:
            self.violation("key", "the witness never saw the key of a hold", hold)
        elif lifetime.deleted_at < hold.end and not self.taken(lifetime, hold.lease):
            if lifetime.deleted_at < hold.vouched:
                self.violation("vouched", "a key went while its holder was promised the lock", hold, lifetime)
            elif self.pause(hold, lifetime.deleted_at) is None:
                self.violation("key", "a key went while it was held", hold, lifetime, *self.evidence(hold))

    def losses(self, hold: Hold) -> None:
        said = min((event.at for event in hold.events if event.kind == "lost"), default=_NEVER)
        if hold.sure > said:
            self.violation("loss", "a lock that was lost was held again", hold)
        lifetime = self.testimony.of(hold.key, hold.created)
        if lifetime is None or not self.taken(lifetime, hold.lease):
            return
        unnoticed = self.pauses.awake(hold.pid, lifetime.deleted_at, hold.end)
        if unnoticed > 3 * self.ttl:
            self.violation("loss", f"what was taken away was not noticed for {unnoticed:.2f} s", hold, lifetime)

    def said_in_time(self, hold: Hold) -> bool:
        lifetime = self.testimony.of(hold.key, hold.created)
        excused = any(late == hold.id for late, _ in self.excused)
        return not excused and (lifetime is None or hold.end <= lifetime.deleted_at)

    # -- excuses

    def excuse(self, late: Hold, newer: Hold) -> Cause | None:
        """Why `late` could not know that `newer` was let in."""
        cause = self.taken_away(late, newer.token, newer.begin)
        if cause == "by hand" or newer.begin < late.vouched:
            return cause
        # Its session may have been promised more since it looked. After that it should have known, whatever etcd did.
        if cause == "etcd" and newer.begin < self.promised[late.lease]:
            return cause
        return self.pause(late, newer.begin)

    def pause(self, hold: Hold, at: float) -> Cause | None:
        """What kept the holder's process from running from the end of what it was promised until `at`."""
        if self.pauses.awake(hold.pid, hold.vouched, at) > _AWAKE:
            return None
        kinds = {pause.kind for pause in self.pauses.during(hold.pid, hold.vouched - _AWAKE, at + _AWAKE)}
        causes: tuple[Cause, ...] = ("freeze", "gil", "stall")
        return next((cause for cause in causes if cause in kinds), None)

    def taken_away(self, hold: Hold, revision: float, at: float = _NEVER) -> Cause | None:
        """By whom else the hold's key was taken away up to `revision`, which somebody knew `at` that time."""
        lifetime = self.testimony.of(hold.key, hold.created)
        return self.taken(lifetime, hold.lease, at) if lifetime is not None and lifetime.deleted <= revision else None

    def taken(self, lifetime: Lifetime, lease: int, at: float = _NEVER) -> Cause | None:
        if self.by_hand(lifetime, lease):
            return "by hand"
        return "etcd" if self.by_etcd(lifetime, lease, min(at, lifetime.deleted_at)) else None

    def early(self, hold: Hold) -> bool:
        """Whether etcd took the hold's key away while it had promised the lease."""
        lifetime = self.testimony.of(hold.key, hold.created)
        return lifetime is not None and lifetime.deleted_at < hold.end and self.taken(lifetime, hold.lease) == "etcd"

    def by_etcd(self, lifetime: Lifetime, lease: int, at: float) -> bool:
        """Whether etcd, by its own word, had no right to end the lease that was gone `at` that time."""
        session, asked = self.sessions.get(lease), self.ended.get(lease)
        return (
            at < self.promised[lease]
            and session is not None
            and session.deleted == lifetime.deleted
            and (asked is None or asked.at > at)
        )

    def by_hand(self, lifetime: Lifetime, lease: int) -> bool:
        faults = list(self.deleted.get(lifetime.key, ()))
        if lease in self.revoked:
            faults.append(self.revoked[lease])
        return any(
            lifetime.deleted == fault.revision
            if fault.revision
            else lifetime.created_at - _TOLD <= max(fault.at, fault.done) and fault.at <= lifetime.deleted_at
            for fault in faults
            if lifetime.deleted < _NEVER
        )

    def fenced(self, cause: Cause, late: Hold, newer: Hold) -> None:
        """Count the overlap apart, if the store let no late write through."""
        first = next((write for write in self.writes[newer.id] if write.accepted), None)
        tries = [write for write in self.writes[late.id] if first is not None and write.number >= first.number]
        taken = [write for write in tries if write.accepted]
        if taken:
            self.violation("fence", f"the store took a late write ({cause})", late, newer, *taken)
        elif not tries and first is not None and not self.cut_off(late) and first.at < late.end:
            self.violation("fence", f"nothing shows that the store keeps it out ({cause})", late, newer, first)
        else:
            fence: Literal["refused", "nothing came late"] = "refused" if tries else "nothing came late"
            self.excused.setdefault((late.id, newer.id), Excused(cause, late, newer, fence))

    def cut_off(self, hold: Hold) -> bool:
        """Whether its process was killed in it, or after it but before it could say what became of its last write."""
        released = any(event.kind == "released" for event in hold.events)
        return hold.how == "killed" or (hold.pid in self.killed and not released)

    def fence(self) -> None:
        """The store's own account, by itself."""
        last: dict[tuple[str, str], Write] = {}
        for write in self.history.writes:
            if not write.accepted or write.mode == "slot":
                continue
            for mode in ("write", "read"):
                before = last.get((write.name, mode))
                if before is not None and conflict(mode, write.mode) and before.token > write.token:
                    self.violation("fence", "the store took an older token after a newer", before, write)
            best = last.get((write.name, write.mode))
            if best is None or write.token > best.token:
                last[write.name, write.mode] = write

    # -- evidence and figures

    def evidence(self, hold: Hold) -> Iterator[str]:
        """What else is known of the time of a hold: its key, its process's pauses, its writes."""
        yield f"key: {self.testimony.of(hold.key, hold.created)}"
        for pause in self.pauses.during(hold.pid, hold.begin, hold.end):
            yield f"pid {hold.pid}: {pause}"
        for write in self.writes[hold.id]:
            yield f"{write}"

    def waited(self, before: Hold, after: Hold) -> float:
        """Seconds for which somebody, not always the same, wanted the lock between these two holds."""
        wanted = [since for since, until in self.asked[after.name] if until > before.end and since < after.begin]
        return after.begin - max(before.end, min(wanted, default=after.begin))

    def handed_over(self) -> Iterable[tuple[Hold, Hold]]:
        """Each hold that had to wait, with the last that ended before it of those that it excludes."""
        for on_name in self.by_name.values():
            for number, hold in enumerate(on_name):
                before = [
                    other
                    for other in on_name[max(0, number - _RECENT) : number]
                    if other.end <= hold.begin and (conflict(other.mode, hold.mode) or hold.mode == "slot")
                ]
                if before and hold.token > hold.created:
                    yield max(before, key=lambda other: other.end), hold


def _keeping_out(hold: Hold, ahead: Sequence[Lifetime]) -> list[Lifetime]:
    """Those of `ahead` that must be gone before `hold` may be: the rule of the queue, as one would say it."""
    alike = [each for each in ahead if each.key.startswith(f"{hold.name}/{hold.mode}/")]
    if hold.mode == "write":
        return list(ahead)
    if len(alike) < len(ahead):
        return [each for each in ahead if each not in alike]
    return alike if hold.mode == "slot" and len(alike) >= hold.limit else []
