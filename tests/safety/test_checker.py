"""The checker: what it finds, on histories written by hand, and on random valid ones that are then spoilt."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.safety.checker import Report, check
from tests.safety.history import Event, EventKind, Fault, FaultKind, History, Record, Write
from tests.safety.witness import Account, Change, Lifetime, replay

TTL = 3.0


@dataclass
class Story:
    """A history, told hold by hold. Without more, a hold is one that looks once a second and ends as it should."""

    records: list[Record] = field(default_factory=list)
    lifetimes: list[Lifetime] = field(default_factory=list)
    gaps: tuple[str, ...] = ()
    torn: frozenset[int] = frozenset()

    def hold(
        self,
        pid: int,
        begin: float,
        end: float,
        *,
        created: int,
        deleted: int,
        token: int = 0,
        mode: str = "write",
        limit: int = 0,
        sure: float = 0.0,
        remaining: float = 2.0,
        gone: float = 0.0,
        how: EventKind | None = "left",
        name: str = "/a",
    ) -> str:
        """`sure`: its last look; `gone`: when its key was seen to be deleted. By default, at `end` and just after."""
        hold = f"{pid}-{created}"
        about = {"pid": pid, "thread": "t", "hold": hold, "name": name, "mode": mode, "limit": limit}
        key = f"{name}/{mode}/{pid:x}"
        self.event("queued", begin - 0.01, **about)
        self.event(
            "acquired", begin, remaining=remaining, key=key, created=created, token=token or created, lease=pid, **about
        )
        for look in itertools.takewhile(lambda at: at < (sure or end), itertools.count(begin + 1, 1)):
            self.event("looked", look, remaining=remaining, **about)
        self.event("looked", sure or end, remaining=remaining, **about)
        if how:
            self.event(how, end, **about)
        self.lifetimes.append(Lifetime(key, created, begin, pid, deleted, gone or end + 0.01))
        return hold

    def event(self, kind: EventKind, at: float, **more: Any) -> None:
        self.records.append(Event(kind, at, **more))

    def fault(self, kind: FaultKind, at: float, **more: Any) -> None:
        self.records.append(Fault(kind, at, **more))

    def write(self, hold: str, at: float, token: int, *, accepted: bool = True, mode: str = "write") -> None:
        number = sum(isinstance(record, Write) for record in self.records) + 1
        self.records.append(Write(number, at, "/a", mode, token, hold, accepted))

    def check(self) -> Report:
        testimony = Account(tuple(sorted(self.lifetimes, key=lambda each: each.created)), 10_000, self.gaps)
        return check(History.of(self.records, self.torn), testimony, ttl=TTL)

    def rules(self) -> set[str]:
        """Which rules are broken."""
        return {violation.rule for violation in self.check().violations}


def test_two_holders_one_after_the_other() -> None:
    """Who waits and is let in after the holder before breaks no rule, and is a hand-over."""
    story = Story()
    story.hold(1, 10.0, 11.0, created=5, deleted=7)
    story.hold(2, 11.1, 12.0, created=6, token=7, deleted=8)
    report = story.check()
    assert not report.violations
    assert (report.acquisitions, report.handovers, report.between_processes) == (2, 1, 1)


def test_two_holders_at_once() -> None:
    """An overlap of exclusive holds is found, and its evidence names both, their keys and revisions."""
    story = Story()
    story.hold(1, 10.0, 11.0, created=5, deleted=7)
    story.hold(2, 10.9, 12.0, created=6, token=7, deleted=8)
    (violation,) = story.check().violations
    assert violation.rule == "vouched"  # its promise was good until 13.0
    for evidence in ("/a/write/1 of revision 5", "/a/write/2 of revision 6", "token 7", "deleted=7"):
        assert evidence in violation.text


def test_an_overlap_after_the_promise_has_ended() -> None:
    """A holder that went on after the time it was promised, awake, is an overlap, even with a short promise."""
    story = Story()
    story.hold(1, 10.0, 13.0, created=5, deleted=7, sure=10.5, gone=12.7, remaining=2.0)
    story.hold(2, 12.8, 14.0, created=6, token=7, deleted=8)
    assert story.rules() == {"overlap", "key"}


@pytest.mark.parametrize(("one", "other"), [("write", "read"), ("read", "write"), ("read", "slot"), ("write", "slot")])
def test_shared_beside_exclusive(one: str, other: str) -> None:
    """Holds of different modes exclude each other."""
    story = Story()
    story.hold(1, 10.0, 11.0, created=5, deleted=7, mode=one, limit=9)
    story.hold(2, 10.5, 12.0, created=6, token=7, deleted=8, mode=other, limit=9)
    assert story.rules() == {"vouched"}


def test_readers_together() -> None:
    """Readers hold at once, with tokens in any order; the writer after them has one above them all."""
    story = Story()
    story.hold(1, 10.0, 11.0, created=5, token=9, deleted=10, mode="read")
    story.hold(2, 9.9, 11.0, created=6, token=8, deleted=11, mode="read")
    story.hold(3, 11.1, 12.0, created=7, token=11, deleted=12)
    assert not story.rules()


@pytest.mark.parametrize(("limit", "broken"), [(2, {"overlap", "grant"}), (3, set())])
def test_more_than_the_limit(limit: int, broken: set[str]) -> None:
    """Three slots at once are one too many for a limit of two, and not for three."""
    story = Story()
    for pid in (1, 2, 3):
        story.hold(pid, 10.0 + pid / 10, 11.0, created=4 + pid, deleted=10 + pid, mode="slot", limit=limit)
    assert story.rules() == broken


def test_tokens_that_do_not_grow() -> None:
    """A later holder with the same or a smaller token is found."""
    for token in (6, 5):
        story = Story()
        story.hold(1, 10.0, 11.0, created=5, token=6, deleted=7)
        story.hold(2, 11.1, 12.0, created=6, token=token, deleted=8)
        assert "token" in story.rules()


def test_overtaking() -> None:
    """Who came later and was let in first is found twice: by the order of grants, and by the rule of the queue."""
    story = Story()
    story.hold(2, 10.0, 11.0, created=6, deleted=7)
    story.hold(1, 11.1, 12.0, created=5, token=7, deleted=8)
    assert story.rules() == {"order", "grant"}


def test_a_reader_past_a_waiting_writer() -> None:
    """A reader that is let in beside another while a writer who came before it waits has overtaken."""
    story = Story()
    story.hold(1, 10.0, 11.0, created=5, deleted=8, mode="read")
    story.hold(3, 10.2, 10.8, created=7, deleted=9, mode="read")
    story.hold(2, 11.1, 12.0, created=6, token=9, deleted=10)
    assert story.rules() == {"order", "grant"}


def test_a_grant_without_a_key() -> None:
    """A token from after the own key's deletion is found, though the deletion was by hand and nobody overlaps."""
    story = Story()
    story.hold(1, 10.0, 11.0, created=5, token=8, deleted=7, gone=9.0)
    story.fault("key_deleted", 8.9, key="/a/write/1", revision=7)
    assert story.rules() == {"grant"}


def test_a_grant_behind_a_stranger() -> None:
    """A key of somebody who keeps no record counts in the queue: being let in past it is found."""
    story = Story()
    story.lifetimes.append(Lifetime("/a/cafe", 4))
    story.hold(1, 10.0, 11.0, created=5, deleted=7)
    assert story.rules() == {"grant"}


def test_a_key_of_another_lock() -> None:
    """A key of a lock whose name only begins the same is nobody's business."""
    story = Story()
    story.lifetimes.append(Lifetime("/ab/cafe", 4))
    story.hold(1, 10.0, 11.0, created=5, deleted=7)
    assert not story.rules()


def test_a_key_that_goes_too_early() -> None:
    """A key that is gone while its holder was promised the lock is found without anybody else coming."""
    story = Story()
    story.hold(1, 10.0, 11.0, created=5, deleted=7, gone=10.5)
    assert story.rules() == {"vouched"}


def test_a_key_nobody_saw() -> None:
    """A hold of which the witness knows nothing is found."""
    story = Story()
    story.hold(1, 10.0, 11.0, created=5, deleted=7)
    story.lifetimes.clear()
    assert story.rules() == {"key", "grant"}


def test_held_again_after_it_was_lost() -> None:
    """A lock of which it was said that it is lost does not come back."""
    story = Story()
    hold = story.hold(1, 10.0, 11.0, created=5, deleted=7)
    story.event("lost", 10.5, pid=1, hold=hold)
    assert story.rules() == {"loss"}


def test_losses() -> None:
    """A loss that is said before the key goes is one in time; nothing is wrong with it."""
    story = Story()
    story.hold(1, 10.0, 12.0, created=5, deleted=7, sure=11.9, remaining=0.1, gone=12.4, how="lost")
    story.hold(2, 12.5, 13.0, created=6, token=7, deleted=8)
    report = story.check()
    assert not report.violations
    assert (report.losses, report.losses_in_time, report.losses_by_hand) == (1, 1, 0)
    assert report.worst_takeover == pytest.approx(0.01)  # the next one came only at 12.49


def test_a_gap_in_the_witness() -> None:
    """A witness that has missed something proves nothing."""
    story = Story(gaps=("compacted",))
    story.hold(1, 10.0, 11.0, created=5, deleted=7)
    assert story.rules() == {"record"}


@pytest.mark.parametrize("killed", [True, False])
def test_a_hold_without_an_end(killed: bool) -> None:
    """A hold without an end, or a torn line, is found, unless its process was killed; then it ended at that time."""
    story = Story(torn=frozenset({1}))
    story.hold(1, 10.0, 11.0, created=5, deleted=6, gone=13.5, how=None)
    story.hold(2, 13.6, 14.0, created=7, deleted=8)
    if killed:
        story.fault("killed", 11.2, pid=1)
    report = story.check()
    assert {violation.rule for violation in report.violations} == (set() if killed else {"record", "overlap", "key"})
    assert report.killed == killed


# -- excuses


def overtaken(story: Story, *, end: float = 20.0, sure: float = 10.5, how: EventKind = "left") -> tuple[str, str]:
    """One looks at 10.5, is promised the lock until 12.5, and ends at 20; another is let in at 14.0."""
    late = story.hold(1, 10.0, end, created=5, deleted=7, sure=sure, gone=13.5, how=how)
    newer = story.hold(2, 14.0, 15.0, created=6, token=7, deleted=8)
    return late, newer


def refused(story: Story, late: str, newer: str, *, accepted: bool = False) -> None:
    story.write(late, 10.1, 5)
    story.write(newer, 14.1, 7)
    story.write(late, 20.1, 5, accepted=accepted)


def frozen(story: Story) -> None:
    story.fault("stopped", 11.0, pid=1)
    story.fault("continued", 19.8, done=19.9, pid=1)


def gil(story: Story) -> None:
    story.event("gil_taken", 11.0, pid=1, thread="u")
    story.event("gil_given", 19.9, pid=1, thread="u")


def stalled(story: Story) -> None:
    story.event("stalled", 19.9, since=12.55, pid=1)


def by_hand(story: Story) -> None:
    story.fault("key_deleted", 13.4, done=13.5, key="/a/write/1", revision=7)


def by_hand_unanswered(story: Story) -> None:
    story.fault("key_deleted", 13.4, done=14.4, key="/a/write/1")


def revoked(story: Story) -> None:
    story.fault("lease_revoked", 13.4, done=13.5, lease=1)


EXCUSES: dict[Callable[[Story], None], str] = {
    frozen: "freeze",
    gil: "gil",
    stalled: "stall",
    by_hand: "by hand",
    by_hand_unanswered: "by hand",
    revoked: "by hand",
}


@pytest.mark.parametrize("excuse", EXCUSES)
def test_an_excuse(excuse: Callable[[Story], None]) -> None:
    """An overlap that no lock can prevent is counted apart, with what the store did; without the reason it is found."""
    story = Story()
    refused(story, *overtaken(story))
    assert story.rules() == {"overlap", "key"}
    excuse(story)
    report = story.check()
    assert not report.violations
    (excused,) = report.excused
    assert (excused.cause, excused.fence) == (EXCUSES[excuse], "refused")
    assert report.overlaps == report.late == {EXCUSES[excuse]: 1}


@pytest.mark.parametrize("excuse", EXCUSES)
def test_an_excuse_of_somebody_else(excuse: Callable[[Story], None]) -> None:
    """What happened to another process, key or lease, or at another time, excuses nothing."""
    told = Story()
    excuse(told)
    elsewhere, earlier = Story(), Story()
    for story in (elsewhere, earlier):
        refused(story, *overtaken(story))
    for record in told.records:
        assert isinstance(record, Event | Fault)
        record = replace(record, pid=record.pid and 2)  # noqa: PLW2901
        if isinstance(record, Fault):
            record = replace(record, key=record.key and "/a/write/2", lease=record.lease and 2)  # noqa: PLW2901
        elsewhere.records.append(record)
    assert elsewhere.rules() == {"overlap", "key"}
    for record in told.records:
        assert isinstance(record, Event | Fault)
        record = replace(record, at=record.at - 9)  # noqa: PLW2901
        if isinstance(record, Fault):
            record = replace(record, done=record.done and record.done - 9, revision=record.revision and 4)  # noqa: PLW2901
            if record.kind == "lease_revoked" or not record.revision:
                continue  # one that nobody answered may be carried out at any later time
        else:
            record = replace(record, since=record.since and record.since - 9)  # noqa: PLW2901
        earlier.records.append(record)
    assert earlier.rules() == {"overlap", "key"}


@pytest.mark.parametrize("answered", [False, True])
def test_a_late_holder_that_is_killed_with_its_last_write_under_way(*, answered: bool) -> None:
    """Nothing need show what became of that write; of one that was answered something must."""
    story = Story()
    late, newer = overtaken(story)
    story.fault("key_deleted", 13.4, key="/a/write/1", revision=7)
    story.write(late, 10.1, 5)
    story.write(newer, 14.1, 7)
    if answered:
        story.event("released", 20.5, pid=1, hold=late)
    story.fault("killed", 21.0, pid=1)
    assert story.rules() == ({"fence"} if answered else set())


def ended_early(story: Story, *, until: float = 14.0, session: float = 7) -> None:
    """The lease of a hold ends at 13.5, with the session's key, and etcd has promised it `until` then."""
    refused(story, *overtaken(story, sure=13.0))
    story.lifetimes.append(Lifetime("/sessions/1", 4, 9.0, 1, session, 13.5))
    story.fault("lease_promised", 11.0, done=11.1, lease=1, until=until)
    story.fault("lease_promised", 8.0, done=8.1, lease=1, until=11.0)


def test_a_lease_that_etcd_ended_early() -> None:
    """A promise of etcd's own that it has broken is counted apart, and by how many leases."""
    story = Story()
    ended_early(story)
    story.fault("session_ended", 13.9, lease=1)
    report = story.check()
    assert not report.violations
    assert report.late == {"etcd": 1}
    assert (report.leases_ended_early, report.losses_by_hand) == (1, 0)


def test_a_lease_that_etcd_ended_early_told_late() -> None:
    """The witness may hear of it late: that another was let in shows it, too."""
    story = Story()
    refused(story, story.hold(1, 10.0, 14.4, created=5, deleted=7, sure=13.9, gone=14.3), "2-6")
    story.hold(2, 14.0, 15.0, created=6, token=7, deleted=8)
    story.lifetimes.append(Lifetime("/sessions/1", 4, 9.0, 1, 7, 14.3))
    story.fault("lease_promised", 11.0, done=11.1, lease=1, until=14.2)
    assert "overlap" not in story.rules()
    assert story.check().late == {"etcd": 1}


def test_a_lease_that_etcd_ended_early_after_the_holders_last_look() -> None:
    """A session is promised more by each renewal, which a holder that does not look again hears nothing of."""
    story = Story()
    ended_early(story, until=14.5)
    story.records = [replace(e, remaining=0.2) if isinstance(e, Event) and e.remaining else e for e in story.records]
    report = story.check()
    assert not report.violations
    assert (report.late, report.leases_ended_early) == ({"etcd": 1}, 1)


def test_a_holder_that_goes_on_after_a_lease_that_etcd_ended_early() -> None:
    """Until the end of its own promise the holder could not know: after it, this excuses nothing."""
    story = Story()
    ended_early(story, until=13.8)
    story.records = [replace(e, remaining=0.7) if isinstance(e, Event) and e.remaining else e for e in story.records]
    assert "overlap" in story.rules()


def test_a_lease_that_its_own_client_ended() -> None:
    """What a session has asked for is no fault of etcd's."""
    story = Story()
    ended_early(story)
    story.fault("session_ended", 13.3, lease=1)
    assert "vouched" in story.rules()


@pytest.mark.parametrize("session", [6, 8, float("inf")])
def test_a_key_that_went_alone(session: float) -> None:
    """Where the session's key did not go with it, it was not the lease that ended."""
    story = Story()
    ended_early(story, session=session)
    assert "vouched" in story.rules()


def test_a_promise_of_the_librarys_alone() -> None:
    """A lease that ended when etcd had said it might is no fault of etcd's, whatever the holder was told."""
    story = Story()
    ended_early(story, until=13.4)
    assert "vouched" in story.rules()


def test_a_promise_for_another_lease() -> None:
    """That etcd broke its word to somebody else excuses nobody."""
    story = Story()
    ended_early(story, until=0.0)
    story.fault("lease_promised", 11.0, done=11.1, lease=2, until=14.0)
    assert "vouched" in story.rules()


def test_a_freeze_that_ended_too_early() -> None:
    """A process that was awake for a while after its promise had ended, and did not notice, is not excused."""
    story = Story()
    refused(story, *overtaken(story))
    story.fault("stopped", 11.0, pid=1)
    story.fault("continued", 13.5, done=13.6, pid=1)
    assert story.rules() == {"overlap"}


def test_a_promise_is_not_excused_by_a_freeze() -> None:
    """Who is frozen may rely on what it was promised before: another let in by then is found."""
    story = Story()
    late = story.hold(1, 10.0, 20.0, created=5, deleted=7, sure=10.5, remaining=5.0, gone=13.5)
    newer = story.hold(2, 14.0, 15.0, created=6, token=7, deleted=8)
    refused(story, late, newer)
    frozen(story)
    assert story.rules() == {"vouched"}


def test_a_look_is_not_excused_by_a_freeze() -> None:
    """Who woke up, looked, and was told that it holds the lock, is not excused."""
    story = Story()
    refused(story, *overtaken(story, sure=19.95))
    frozen(story)
    assert story.rules() == {"vouched"}


@pytest.mark.parametrize("excuse", EXCUSES)
def test_a_late_write_that_was_taken(excuse: Callable[[Story], None]) -> None:
    """No reason excuses a late write that got through."""
    story = Story()
    refused(story, *overtaken(story), accepted=True)
    excuse(story)
    assert story.rules() == {"fence"}


@pytest.mark.parametrize("excuse", EXCUSES)
def test_a_late_write_that_nobody_tried(excuse: Callable[[Story], None]) -> None:
    """Nor is an overlap excused without a late write that was refused, where one could have come late."""
    story = Story()
    _, newer = overtaken(story)
    story.write(newer, 14.1, 7)
    excuse(story)
    assert story.rules() == {"fence"}


def test_nothing_came_late() -> None:
    """Where the newer holder wrote only after the late one had ended, the writes came in the order of tokens."""
    story = Story()
    late, newer = overtaken(story, end=14.5)
    story.write(late, 14.5, 5)
    story.write(newer, 14.9, 7)
    story.event("stalled", 14.4, since=12.55, pid=1)
    (excused,) = story.check().excused
    assert excused.fence == "nothing came late"
    assert not story.rules()


def test_frozen_and_killed() -> None:
    """Who is killed while it is stopped has done nothing since it was: there is no overlap."""
    story = Story()
    story.hold(1, 10.0, 10.5, created=5, deleted=7, gone=13.5, how=None)
    story.hold(2, 14.0, 15.0, created=6, token=7, deleted=8)
    story.fault("stopped", 11.0, pid=1)
    story.fault("killed", 16.0, pid=1)
    report = story.check()
    assert not report.violations
    assert not report.excused


def test_what_was_done_by_hand_is_noticed() -> None:
    """A holder that does not notice for several TTLs that its key was deleted by hand is found."""
    story = Story()
    refused(story, *overtaken(story, end=23.5))
    by_hand(story)
    assert story.rules() == {"loss"}
    frozen(story)  # unless it could not
    assert not story.rules()


def test_slots_that_are_frozen() -> None:
    """One too many for the limit is excused if so many of those in were frozen."""
    story = Story()
    late = story.hold(1, 10.0, 20.0, created=4, deleted=7, sure=10.5, gone=13.5, mode="slot", limit=2)
    story.hold(3, 10.0, 20.0, created=5, deleted=20, mode="slot", limit=2)
    newer = story.hold(2, 14.0, 15.0, created=6, token=7, deleted=8, mode="slot", limit=2)
    for hold, token, accepted in ((newer, 7, True), (late, 4, False)):
        story.write(hold, 20.1, token, accepted=accepted, mode="slot")
    assert story.rules() == {"overlap", "key"}
    frozen(story)
    assert not story.rules()
    assert story.check().late == {"freeze": 1}


@pytest.mark.parametrize("mode", ["write", "read"])
def test_a_store_that_takes_an_older_token(mode: str) -> None:
    """The store's own account is checked without regard to any hold."""
    story = Story()
    story.write("a", 10.0, 7)
    story.write("b", 10.1, 5, mode=mode)
    assert story.rules() == {"fence"}


# -- random histories


@dataclass
class Contender:
    pid: int
    mode: str
    created: int
    token: int = 0
    begin: float = 0.0


class Simulated:
    """A queue that works as it should, one action after the other; what it does is written down as a history is."""

    def __init__(self) -> None:
        self.revision, self.at, self.pid = 1, 100.0, 0
        self.queue: list[Contender] = []
        self.changes: list[Change] = []
        self.events: list[Event] = []

    def tick(self) -> float:
        self.at = round(self.at + 0.01, 2)
        return self.at

    def change(self, kind: str, contender: Contender) -> None:
        self.revision += 1
        key = f"/a/{contender.mode}/{contender.pid:x}"
        created = contender.created = contender.created or self.revision
        self.changes.append(Change(kind, key, self.revision, created if kind == "put" else 0, 0, self.tick()))

    def event(self, kind: EventKind, contender: Contender, **more: Any) -> None:
        limit = 2 if contender.mode == "slot" else 0
        about = {"pid": contender.pid, "thread": "t", "hold": f"{contender.pid}", "name": "/a", "mode": contender.mode}
        self.events.append(Event(kind, self.tick(), limit=limit, **about, **more))  # type: ignore[arg-type]

    def join(self, mode: str) -> None:
        self.pid += 1
        contender = Contender(self.pid, mode, 0)
        self.event("queued", contender)
        self.change("put", contender)
        self.queue.append(contender)
        self.admit()

    def leave(self, index: int) -> None:
        contender = self.queue.pop(index % len(self.queue))
        if contender.token:
            self.event("left", contender)
        else:
            self.event("refused", contender, why="LockTimeout")
        self.change("delete", contender)
        self.admit()

    def admit(self) -> None:
        for number, contender in enumerate(self.queue):
            modes = [other.mode for other in self.queue[:number]]
            alike = contender.mode != "write" and set(modes) <= {contender.mode}
            if contender.token or not (not modes or (alike and (contender.mode == "read" or len(modes) < 2))):
                continue
            contender.token = self.revision
            about = {"key": f"/a/{contender.mode}/{contender.pid:x}", "created": contender.created}
            self.event("acquired", contender, token=contender.token, remaining=0.05, **about)


ACTIONS = st.lists(st.one_of(st.sampled_from(["write", "write", "read", "slot"]), st.integers(0, 9)), max_size=60)


def simulated(actions: list[str | int]) -> tuple[list[Event], list[Change]]:
    made = Simulated()
    for action in actions:
        if isinstance(action, str):
            made.join(action)
        elif made.queue:
            made.leave(action)
    while made.queue:
        made.leave(0)
    return made.events, made.changes


def judge(events: list[Event], changes: list[Change]) -> Report:
    return check(History.of(events), replay(changes), ttl=TTL)


@given(ACTIONS)
@settings(deadline=None)
def test_valid_histories_pass(actions: list[str | int]) -> None:
    """Nothing is found in what a queue does that works as it should."""
    report = judge(*simulated(actions))
    assert not report.violations, report
    assert not report.excused


def goes_on(events: list[Event], changes: list[Change], pick: int) -> set[str]:
    """A holder's end comes after the next one's begin."""
    pairs = [
        (number, later.at)
        for number, event in enumerate(events)
        if event.kind == "left"
        for later in events[number:]
        if later.kind == "acquired" and (later.mode != event.mode or event.mode == "write")
    ]
    assert pairs
    number, at = pairs[pick % len(pairs)]
    events[number] = replace(events[number], at=at + 0.005)
    return {"overlap", "vouched"}


def _pick(events: list[Event], kind: str, pick: int, fits: Callable[[Event], bool] = lambda _: True) -> int:
    numbers = [number for number, event in enumerate(events) if event.kind == kind and fits(event)]
    assert numbers
    return numbers[pick % len(numbers)]


def too_early(events: list[Event], changes: list[Change], pick: int) -> set[str]:
    """The token of one that had to wait is from when it stood in the queue."""
    number = _pick(events, "acquired", pick, lambda event: event.token > event.created)
    events[number] = replace(events[number], token=events[number].created)
    return {"grant"}


def same_token(events: list[Event], changes: list[Change], pick: int) -> set[str]:
    """A writer has the token of the writer before."""
    writers = [number for number, event in enumerate(events) if event.kind == "acquired" and event.mode == "write"]
    assert len(writers) > 1
    index = 1 + pick % (len(writers) - 1)
    events[writers[index]] = replace(events[writers[index]], token=events[writers[index - 1]].token)
    return {"token"}


def key_goes(events: list[Event], changes: list[Change], pick: int) -> set[str]:
    """The key of a holder is deleted while it holds, and the witness says so."""
    number = _pick(events, "acquired", pick)
    got = events[number]
    index = next(n for n, each in enumerate(changes) if each.key == got.key and each.kind == "delete")
    end = next(event.at for event in events[number:] if event.hold == got.hold and event.kind == "left")
    at = (got.at + end) / 2
    gone = replace(changes[index], at=at)
    changes[index] = gone
    return {"key", "vouched"}


def never_put(events: list[Event], changes: list[Change], pick: int) -> set[str]:
    """The witness never saw a holder's key."""
    got = events[_pick(events, "acquired", pick)]
    changes[:] = [change for change in changes if change.key != got.key]
    return {"key"}


def missed_put(events: list[Event], changes: list[Change], pick: int) -> set[str]:
    """The witness has missed one put."""
    puts = [number for number, change in enumerate(changes) if change.kind == "put"]
    assert puts
    del changes[puts[pick % len(puts)]]
    return {"record"}


def no_end(events: list[Event], changes: list[Change], pick: int) -> set[str]:
    """The end of a hold is not in the record."""
    del events[_pick(events, "left", pick)]
    return {"record"}


def stranger(events: list[Event], changes: list[Change], pick: int) -> set[str]:
    """Somebody stood in the queue from the beginning, and everybody was let in past them."""
    assert any(event.kind == "acquired" for event in events)
    changes.insert(0, Change("put", "/a/cafe", 1, 1, 0, 99.0))
    return {"grant"}


def swapped(events: list[Event], changes: list[Change], pick: int) -> set[str]:
    """Two writers, one after the other, have each other's place in the queue."""
    writers = [number for number, event in enumerate(events) if event.kind == "acquired" and event.mode == "write"]
    assert len(writers) > 1
    index = pick % (len(writers) - 1)
    one, other = (events[writers[each]] for each in (index, index + 1))
    for number, theirs in ((writers[index], other), (writers[index + 1], one)):
        events[number] = replace(events[number], key=theirs.key, created=theirs.created)
    return {"order"}


LAST: list[str | int] = ["write", "write", "read", "slot", "write"]
"""Who comes last, and is let in, whatever was before: so there is always something to spoil."""
SPOILT = [goes_on, too_early, same_token, key_goes, never_put, missed_put, no_end, stranger, swapped]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: cast("str", spoil.__name__))
@given(ACTIONS, st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_spoilt_histories_fail(
    spoil: Callable[[list[Event], list[Change], int], set[str]], actions: list[str | int], pick: int
) -> None:
    """Whatever is done to a valid history, at random, is found, and by the rule that it breaks."""
    events, changes = simulated([*actions, *LAST])
    rules = spoil(events, changes, pick)
    report = judge(events, changes)
    assert rules & {violation.rule for violation in report.violations}, report
