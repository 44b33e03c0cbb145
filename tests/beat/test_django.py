"""Around django-celery-beat: the database lags behind, and what is in etcd counts."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from celery_etcd_lock.testing import EtcdServer
from tests.beat.beats import Beats
from tests.beat.checker import Disturbance, Rules, check
from tests.servers import RedisServer
from tests.workers import until

TTL = 3


class DjangoBeats(Beats):
    """Beats whose schedule is in `database`."""

    @property
    def database(self) -> Path:
        return self.folder / "db.sqlite3"

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "DATABASE": str(self.database)}

    def orm(self, code: str) -> None:
        """Run `code` as a part of the project would, with the models at hand."""
        given = "from django_beating import *\nfrom django_celery_beat.models import *\nfrom datetime import *\n"
        subprocess.run([sys.executable, "-c", given + code], check=True, env=self.environment, timeout=60)

    def row(self, name: str) -> tuple[datetime | None, int, bool]:
        """When `name` ran last, how often, and whether it is enabled: as the database has it."""
        with closing(sqlite3.connect(self.database, timeout=20)) as database:
            found = database.execute(
                "SELECT last_run_at, total_run_count, enabled FROM django_celery_beat_periodictask WHERE name = ?",
                (name,),
            ).fetchone()
        last = datetime.fromisoformat(found[0]).replace(tzinfo=timezone.utc) if found[0] else None
        return last, found[1], bool(found[2])


ENTRIES = """
second = IntervalSchedule.objects.create(every=1, period="seconds")
often = PeriodicTask.objects.create(name="second", task="received", interval=second, args='["second"]')
PeriodicTask.objects.create(name="once", task="received", interval=second, args='["once"]', one_off=True)
at = ClockedSchedule.objects.create(clocked_time=datetime.now(timezone.utc) + timedelta(seconds=3))
PeriodicTask.objects.create(name="clocked", task="received", clocked=at, args='["clocked"]', one_off=True)
"""


@pytest.fixture
def beats(redis: RedisServer, etcd: EtcdServer, tmp_path: Path) -> Iterator[DjangoBeats]:
    beats = DjangoBeats(redis.url, etcd.url, tmp_path, {"etcd_lock_beat_ttl": TTL}, app="django_beating")
    with beats:
        beats.orm("from django.core.management import call_command\ncall_command('migrate', verbosity=0)" + ENTRIES)
        yield beats


def due(each: Any) -> datetime:
    return datetime.fromisoformat(each.due)


def test_takeovers_around_the_database_scheduler(beats: DjangoBeats) -> None:
    """A leader is killed before the database knows what it has sent; another is frozen, and wakes with what it knew."""
    beats.worker()
    for _ in range(3):
        beats.beat()
    until(lambda: beats.received("clocked") and len(beats.received("second")) >= 3, "the first ticks")
    # The database lags behind, which is what this is about.
    until(lambda: len(beats.received("second")) >= beats.row("second")[1] + 2, "ticks that are not in the database")
    begin = time.time()
    frozen, third = beats.take_over_twice(TTL + 15)
    # The third writes the database when it stops; after that the second, which had been frozen, stops too.
    assert third.stop() == 0
    last, count, _ = beats.row("second")
    record = json.loads(next(kv.value for kv in beats.keys("entry/") if kv.key.endswith("/second")))
    assert last is not None
    assert abs((last - datetime.fromisoformat(record["last_run_at"])).total_seconds()) < TTL + 10
    assert count >= len({each.id for each in beats.received("second")}) - 2
    assert frozen.stop() == 0
    assert (beats.row("second")[0] or last) >= last, "it has not put back what was before"
    receipts = beats.received()
    assert (
        len({each.id for each in beats.received("once")}) == len({each.id for each in beats.received("clocked")}) == 1
    )
    away = [Disturbance("killed or frozen", begin, time.time())]
    report = check(receipts, away, Rules({"second": 1.0}, slack=3.0), begin=begin, end=time.time())
    assert not report.violations
    assert "Traceback" not in "".join(each.output for each in beats.processes)


def test_entries_that_are_changed_while_beats_run(beats: DjangoBeats) -> None:
    beats.worker()
    beats.beat()
    beats.beat()
    until(lambda: beats.received("once") and beats.received("second"), "the first ticks")
    (once,) = beats.received("once")
    until(lambda: not beats.row("once")[2], "the one-off to be disabled")
    beats.orm(
        "one = PeriodicTask.objects.get(name='once'); one.enabled = True; one.save()\n"
        "often = PeriodicTask.objects.get(name='second'); often.enabled = False; often.save()\n"
        "PeriodicTask.objects.create(name='new', task='received', interval=often.interval, args='[\"new\"]')\n"
    )
    until(lambda: len(beats.received("once")) == 2, "the one-off, enabled again")
    assert beats.received("once")[1].id != once.id
    until(lambda: len(beats.received("new")) >= 2, "the entry that was added")
    off = len(beats.received("second"))
    there = len(beats.received("new"))
    until(lambda: len(beats.received("new")) >= there + 2, "more of it")
    assert len(beats.received("second")) == off, "disabled"
    beats.orm(
        "often = PeriodicTask.objects.get(name='second'); often.enabled = True; often.save()\n"
        "PeriodicTask.objects.get(name='new').delete()\n"
    )
    until(lambda: len(beats.received("second")) >= off + 3, "enabled again")
    one, two = beats.received("second")[off : off + 2]
    assert (due(two) - due(one)).total_seconds() > 0.9, "no burst for the time that it was off"
    gone = len(beats.received("new"))
    until(lambda: len(beats.received("second")) >= off + 5, "more")
    assert len(beats.received("new")) == gone, "deleted"
    ids = [each.id for each in beats.received()]
    assert len(set(ids)) == len(ids)
