"""When a revision was made, as far as that can be told."""

from __future__ import annotations

import json

import pytest

from celery_etcd_lock.cli.history.instants import Calendar, Dated, Instant, dated, unix
from celery_etcd_lock.etcd.api import KeyValue

NOON = 1_800_000_000.0


def test_a_change_between_two_dated_ones_was_made_between_their_times() -> None:
    """And probably as far along as its revision is."""
    calendar = Calendar([Dated(10, NOON), Dated(20, NOON + 100)], head=30, now=NOON + 200)
    assert calendar.at(10) == Instant(NOON, NOON, NOON)
    assert calendar.at(13) == Instant(NOON, NOON + 100, NOON + 30)
    assert not calendar.at(13).exact


def test_after_the_last_date_it_is_before_now_and_before_the_first_it_is_any_time() -> None:
    calendar = Calendar([Dated(10, NOON)], head=30, now=NOON + 200)
    assert (calendar.at(30).earliest, calendar.at(30).latest) == (NOON, NOON + 200)
    assert (calendar.at(9).earliest, calendar.at(9).latest) == (float("-inf"), NOON)
    assert Calendar([], head=5, now=NOON).at(3).latest == NOON


def test_a_clock_that_is_off_is_left_out_and_told() -> None:
    right = [Dated(revision, NOON + revision, "right") for revision in range(10, 100, 10)]
    wrong = [Dated(35, NOON - 3600, "late"), Dated(55, NOON + 3600, "early")]
    calendar = Calendar([*right, *wrong], head=100, now=NOON + 200)
    assert calendar.misfits == {"late": 1, "early": 1}
    assert calendar.at(35) == Instant(NOON + 30, NOON + 40, NOON + 35)
    assert calendar.at(55) == Instant(NOON + 50, NOON + 60, NOON + 55)
    assert not Calendar(right, head=100, now=NOON + 200).misfits


def kv(value: object, *, created: int = 5, modified: int = 5) -> KeyValue:
    encoded = value if isinstance(value, bytes) else json.dumps(value).encode()
    return KeyValue("/k", encoded, created, modified, modified - created + 1)


def test_what_is_put_says_when_it_was_first_put() -> None:
    """Also if it is put again, as a session's key is."""
    contender = kv({"host": "a", "since": "2026-11-26T12:00:00.250Z"})
    assert dated(contender) == Dated(5, unix("2026-11-26T12:00:00.250Z") or 0, "a")
    session = kv({"host": "b", "start": "2026-11-26T12:00:00Z"}, modified=9)
    assert dated(session) == Dated(5, unix("2026-11-26T12:00:00+00:00") or 0, "b")
    entry = kv({"state": "sent", "last_run_at": "2026-11-26T12:00:00+00:00"}, modified=9)
    assert dated(entry) == Dated(9, unix("2026-11-26T12:00:00Z") or 0)


@pytest.mark.parametrize(
    "value",
    [b"", b"\xff", [], {}, {"since": "yesterday"}, {"since": 7}, {"state": "sending", "last_run_at": "2026-11-26"}],
)
def test_what_says_nothing_is_not_dated(value: object) -> None:
    assert dated(kv(value)) is None
