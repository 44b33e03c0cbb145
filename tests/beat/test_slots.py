"""When a tick was due, and the id that is made from that."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from celery.schedules import BaseSchedule, crontab, schedule

from celery_etcd_lock.beat.record import Record
from celery_etcd_lock.beat.slots import Slot, due_time, slot_of

BERLIN = ZoneInfo("Europe/Berlin")
UTC = timezone.utc


def app(zone: str = "UTC") -> Celery:
    made = Celery("slots", set_as_current=False)
    made.conf.update(timezone=zone)
    return made


def at(text: str, zone: Any = UTC) -> datetime:
    return datetime.fromisoformat(f"2026-{text}").replace(tzinfo=zone)


@pytest.mark.parametrize(
    ("plan", "last", "now", "due"),
    [
        (schedule(10), "03-01T12:00:00", "03-01T12:00:10.5", "03-01T12:00:10"),
        (schedule(10), "03-01T12:00:00", "03-01T13:00:09", "03-01T13:00:00"),
        (schedule(timedelta(days=1)), "03-01T12:00:00", "03-05T11:00:00", "03-04T12:00:00"),
        (schedule(60, relative=True), "03-01T12:00:05", "03-01T12:01:02", "03-01T12:01:00"),
        (crontab(), "03-01T12:00:00.01", "03-01T12:01:00.2", "03-01T12:01:00"),
        (crontab(minute="*/15"), "03-01T12:00:01", "03-01T14:10:00", "03-01T14:00:00"),
        (crontab(minute="0", hour="3"), "02-01T03:00:01", "03-01T12:00:00", "03-01T03:00:00"),
        (crontab(minute="0-59", hour="3"), "02-01T03:00:01", "03-01T12:00:00", "03-01T03:59:00"),
        (crontab(minute="0", hour="0", day_of_month="1", month_of_year="1"), "01-01T00:00:01", "12-01T00:00:00", None),
    ],
    ids=[
        "interval",
        "many missed",
        "daily",
        "relative",
        "minute",
        "quarters missed",
        "nights missed",
        "hour",
        "not due",
    ],
)
def test_when_it_was_due(plan: Any, last: str, now: str, due: str | None) -> None:
    """Of several that were missed the latest; and `now` where nothing was due by the schedule's own word."""
    plan.app = app()
    assert due_time(plan, at(last), at(now)) == at(due or now)


@pytest.mark.parametrize(
    ("last", "now", "due"),
    [
        ("03-27T02:30:01", "03-28T10:00:00", "03-28T01:30:00"),
        ("10-24T02:30:01", "10-25T10:00:00", "10-25T01:30:00"),
        ("10-25T02:30:01", "10-26T10:00:00", "10-26T01:30:00"),
        ("07-01T02:30:01", "07-02T10:00:00", "07-02T00:30:00"),
    ],
    ids=["winter", "the night that is an hour longer", "the night after", "summer"],
)
def test_a_crontab_in_its_time_zone(last: str, now: str, due: str) -> None:
    """Half past two in Berlin, in UTC."""
    plan = crontab(minute="30", hour="2", app=app("Europe/Berlin"))
    found = due_time(plan, at(last, BERLIN), at(now, BERLIN)).astimezone(UTC)
    assert found in {at(due), at(due) - timedelta(hours=1)}  # half past two comes twice in one of these nights
    assert found.astimezone(BERLIN).strftime("%H:%M") == "02:30"


def test_the_schedules_of_django_celery_beat() -> None:
    pytest.importorskip("django_celery_beat")
    from django_celery_beat.clockedschedule import clocked
    from django_celery_beat.tzcrontab import TzAwareCrontab

    when = at("03-01T12:00:00")
    assert due_time(clocked(when, app=app()), at("02-01T12:00:00"), at("03-01T12:00:07")) == when
    plan = TzAwareCrontab(minute="30", hour="2", tz=BERLIN, app=app())
    assert due_time(plan, at("07-01T02:30:01", BERLIN), at("07-02T10:00:00", BERLIN)) == at("07-02T02:30:00", BERLIN)


class Broken(BaseSchedule):
    """Somebody's own, that cannot say."""

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        raise RuntimeError


def test_a_schedule_that_cannot_say_was_due_when_it_said_so() -> None:
    now = at("03-01T12:00:00")
    assert due_time(Broken(app=app()), now - timedelta(hours=1), now) == now


def test_the_schedule_itself_is_left_alone() -> None:
    plan = crontab(app=app())
    before = dict(vars(plan))
    due_time(plan, at("03-01T12:00:00.01"), at("03-01T12:01:00.2"))
    assert {key: vars(plan)[key] for key in before} == before


def test_ids_are_made_from_the_slot() -> None:
    """The same in every process and version; another for another beat, entry or time."""
    slot = slot_of("/celery/beat/default/", "nightly", at("03-01T02:00:00"))
    assert slot == Slot(at("03-01T02:00:00"), "0cb70819-dd63-584d-b04c-322a0f41ee65")
    assert slot_of("/celery/beat/default/", "nightly", at("03-01T03:00:00", ZoneInfo("Etc/GMT-1"))) == slot
    others = {
        slot_of("/celery/beat/other/", "nightly", slot.due).task_id,
        slot_of("/celery/beat/default/", "daily", slot.due).task_id,
        slot_of("/celery/beat/default/", "nightly", at("03-01T02:00:01")).task_id,
    }
    assert len(others - {slot.task_id}) == 3


NEVER = b'{"last_run_at":"2026-03-01T02:00:00+00:00","total_run_count":0}'
SENDING = (
    b'{"state":"sending","due":"2026-03-02T02:00:00+00:00","task_id":"x",'
    b'"last_run_at":"2026-03-01T02:00:00.000123+00:00","total_run_count":7}'
)
SENT = SENDING.replace(b"sending", b"sent")


@pytest.mark.parametrize("text", [NEVER, SENDING, SENT], ids=["never sent", "sending", "sent"])
def test_the_record_of_an_entry_is_public(text: bytes) -> None:
    """What one version has written another reads, and writes in the same way."""
    assert Record.parse(text).to_json() == text


@pytest.mark.parametrize(
    "value", [b"", b"[]", b"{}", b'{"state":"sent"}', b'{"state":"lost","due":"x","task_id":"y"}', b"\xff"]
)
def test_what_is_no_record_is_an_entry_that_was_never_sent(value: bytes) -> None:
    assert Record.parse(value) == Record()
