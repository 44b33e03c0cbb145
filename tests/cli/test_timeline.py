"""Who was in line, let in, and gone, from what happened to keys."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from celery_etcd_lock.cli.history.timeline import Scope, Stay, Timeline
from celery_etcd_lock.etcd.api import Event, KeyValue
from celery_etcd_lock.locks.queue import Kind, Mode, keeping_out, kind_of

LOCK = "/celery/locks/proj.sync/account_id=42"
SCOPE = Scope("celery")


def kv(key: str, created: int, modified: int = 0, **record: Any) -> KeyValue:
    value = json.dumps({"host": "h", "pid": 1, **record}).encode()
    return KeyValue(key, value, created, modified or created, 1)


def put(key: str, created: int, modified: int = 0, **record: Any) -> Event:
    return Event("put", kv(key, created, modified, **record))


def gone(key: str, revision: int) -> Event:
    return Event("delete", KeyValue(key, b"", 0, revision, 0))


def stays(*events: Event, limit_of: Callable[[str], int | None] = lambda _: None, keep: int = 1000) -> list[Stay]:
    timeline = Timeline(SCOPE, limit_of, keep)
    timeline.begin(1, [])
    for event in events:
        timeline.see(event)
    return timeline.finish()


def seen(found: list[Stay]) -> list[tuple[int, int | None, int | None]]:
    return [(stay.came, stay.let_in, stay.gone) for stay in found]


def test_one_after_the_other() -> None:
    a, b = f"{LOCK}/write/a", f"{LOCK}/write/b"
    assert seen(stays(put(a, 2), put(b, 3), gone(a, 4), put(a, 5))) == [(2, 2, 4), (3, 4, None), (5, None, None)]


def test_a_stranger_stands_in_the_same_line() -> None:
    first, second = stays(Event("put", KeyValue(f"{LOCK}/694d", b"?", 2, 2, 1, 0x694D)), put(f"{LOCK}/write/a", 3))
    assert (first.let_in, first.record, second.let_in) == (2, {}, None)
    assert "another etcd client" in first.holder


def test_readers_are_in_together_and_not_past_a_writer_that_waits() -> None:
    r = [f"{LOCK}/read/{name}" for name in "abc"]
    w = f"{LOCK}/write/w"
    found = stays(put(r[0], 2), put(r[1], 3), put(w, 4), put(r[2], 5), gone(r[0], 6), gone(r[1], 7), gone(w, 8))
    assert seen(found) == [(2, 2, 6), (3, 3, 7), (4, 7, 8), (5, 8, None)]


def test_slots_by_the_limit_of_their_task() -> None:
    slot = [f"{LOCK}/slot/{name}" for name in "abc"]
    events = [put(slot[0], 2, task="proj.sync"), put(slot[1], 3), put(slot[2], 4), gone(slot[1], 5)]
    assert seen(stays(*events, limit_of={"proj.sync": 2}.get)) == [(2, 2, None), (3, 3, 5), (4, 5, None)]
    unknown = stays(*events)
    assert seen(unknown) == [(2, 2, None), (3, None, 5), (4, None, None)]
    assert not any(stay.limit_known for stay in unknown)


def test_a_contender_and_its_sibling_are_one() -> None:
    a, sibling, b = f"{LOCK}/write/a", f"{LOCK}/write/a-1", f"{LOCK}/write/b"
    events = [put(a, 2), put(sibling, 2), put(sibling, 2, 3), put(b, 4), gone(a, 5), gone(sibling, 9)]
    assert seen(stays(*events)) == [(2, 2, 9), (4, 9, None)]


def test_who_went_with_his_session() -> None:
    a, b = f"{LOCK}/write/abc", f"{LOCK}/write/def-1"
    session = "/celery/sessions/x/42-abc"
    found = stays(put(session, 2), put(a, 3), put(b, 4), gone(a, 5), gone(session, 5), gone(b, 6))
    assert [stay.with_its_session for stay in found] == [True, False]


def test_what_was_there_already() -> None:
    timeline = Timeline(SCOPE, lambda _: None, 10)
    timeline.begin(50, [kv(f"{LOCK}/write/b", 9), kv(f"{LOCK}/write/a", 7)])
    timeline.see(gone(f"{LOCK}/write/a", 60))
    first, second = timeline.finish()
    assert (first.came, first.let_in, first.let_in_before, first.gone) == (7, 50, True, 60)
    assert (second.came, second.let_in, second.let_in_before) == (9, 60, False)
    assert timeline.live() == {f"{LOCK}/write/b": 9}


def test_only_the_last_that_ended_are_kept() -> None:
    key = f"{LOCK}/write/a"
    events = [event for number in range(10) for event in (put(key, 2 + 2 * number), gone(key, 3 + 2 * number))]
    assert seen(stays(*events, keep=3)) == [(16, 16, 17), (18, 18, 19), (20, 20, 21)]


def test_what_is_no_contender_is_passed_over() -> None:
    """Keys of other kinds, of other projects, and what a doctor tries."""
    others = ["/celery/locks/@doctor/x", "/celery/queued/t/k", "/other/locks/t/k/write/a", "/celery/locks/t"]
    assert stays(*(put(key, number + 2) for number, key in enumerate(others))) == []


def test_a_long_line_is_no_trouble() -> None:
    """500 in line for one of two slots, each let in and gone: what is looked at does not grow with their number."""
    began, slots = time.monotonic(), [f"{LOCK}/slot/{number}" for number in range(500)]
    events = [put(slot, 2 + number) for number, slot in enumerate(slots)]
    events += [gone(slot, 1000 + number) for number, slot in enumerate(slots)]
    found = stays(*events, limit_of=lambda _: 2)
    assert [stay.let_in for stay in found] == [2, 3, *range(1000, 1498)]
    assert time.monotonic() - began < 10


_Step = st.tuples(st.integers(0, 5), st.sampled_from(["write", "read", "slot"]), st.sampled_from(["", "t1", "t2"]))


@given(st.lists(_Step, max_size=40))
def test_it_is_what_the_queue_says(steps: list[tuple[int, Kind, str]]) -> None:
    """Against asking for everybody, at each revision, without a short cut: who is in stays in."""
    there: dict[str, KeyValue] = {}
    events: list[Event] = []
    let_in: dict[int, int] = {}
    for revision, (number, kind, task_id) in enumerate(steps, start=2):
        here = next((key for key in there if key.endswith(f"/{number}")), None)
        if here:
            del there[here]
            events.append(gone(here, revision))
        else:
            event = put(f"{LOCK}/{kind}/{number}", revision, task_id=task_id)
            there[event.kv.key] = event.kv
            events.append(event)
        for each in there.values():
            ahead = [other for other in there.values() if other.create_revision < each.create_revision]
            mode = Mode(kind_of(LOCK, each.key), 2)
            if not keeping_out(mode, LOCK, ahead, json.loads(each.value)["task_id"]):
                let_in.setdefault(each.create_revision, revision)
    found = stays(*events, limit_of=lambda _: 2)
    assert {stay.came: stay.let_in for stay in found if stay.let_in} == let_in
