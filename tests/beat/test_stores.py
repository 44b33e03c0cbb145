"""Around a scheduler with a store of its own, written as django-celery-beat's is: what goes into it, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, ClassVar

import pytest
from celery.beat import ScheduleEntry, Scheduler
from celery.schedules import schedule

from celery_etcd_lock.signals import LeaderLostRecord, TickFencedRecord
from tests.beat.bench import Bench
from tests.servers import RedisServer

NewBench = Callable[..., Bench]


def now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass
class Row:
    """In the store; and, as a copy, what the entries of one scheduler share."""

    name: str
    every: float
    last_run_at: datetime
    total_run_count: int = 0


class ModelEntry(ScheduleEntry):
    def __init__(self, model: Row, app: Any = None) -> None:
        self.app, self.model, self.name, self.task = app, model, model.name, "plain"
        self.args, self.kwargs, self.options = (), {}, {"retry": False}
        self.schedule = schedule(model.every, app=app)
        self.last_run_at, self.total_run_count = model.last_run_at, model.total_run_count

    def __next__(self) -> ModelEntry:  # type: ignore[override] # as django-celery-beat's
        self.model.last_run_at = self.default_now()
        self.model.total_run_count += 1
        return type(self)(self.model, app=self.app)

    next = __next__  # type: ignore[assignment]


class Stored(Scheduler):
    """Writes to `store` what has run, with each `sync`."""

    Entry = ModelEntry
    store: ClassVar[dict[str, Row]] = {}
    sync_every_tasks = 1

    def setup_schedule(self) -> None:
        self._dirty: set[str] = set()
        self.models = {name: Row(**vars(row)) for name, row in self.store.items()}
        self.data = {name: ModelEntry(model, app=self.app) for name, model in self.models.items()}

    def reserve(self, entry: Any) -> Any:
        self._dirty.add(entry.name)
        return next(entry)

    def sync(self) -> None:
        for name in getattr(self, "_dirty", ()):
            self.store[name] = Row(**vars(self.models[name]))


@pytest.fixture
def store() -> Iterator[dict[str, Row]]:
    Stored.store = {"entry": Row("entry", 1.0, now())}
    yield Stored.store
    Stored.store = {}


def new(new_bench: NewBench, **settings: Any) -> Bench:
    return new_bench({}, beat_scheduler=Stored, beat_sync_every=1, **settings)


def test_what_was_sent_is_in_the_store(new_bench: NewBench, store: dict[str, Row]) -> None:
    bench = new(new_bench)
    beat = bench.leading()
    bench.ticked(beat)
    record = bench.record("entry")
    assert store["entry"].last_run_at == datetime.fromisoformat(record["last_run_at"])
    assert store["entry"].total_run_count == record["total_run_count"] == 1


def test_what_could_not_be_published_is_not(new_bench: NewBench, store: dict[str, Row]) -> None:
    """The entry's model has moved on by then, and goes back before anything is written."""
    with RedisServer() as broker:
        bench = new(new_bench, redis_url=broker.url)
        beat = bench.leading()
        bench.ticked(beat)
        there = Row(**vars(store["entry"]))
        broker.kill()
        bench.tick(beat, lambda: bench.record("entry")["state"] == "sending")
        inner: Any = beat._inner
        bench.tick(beat, lambda: inner._failed["entry"][0] >= 2)
        assert store["entry"] == there
        inner.sync()
        assert store["entry"] == inner.models["entry"] == there
        broker.start()
        bench.ticked(beat)
        assert store["entry"].total_run_count == 2


def test_a_beat_that_was_deposed_leaves_the_store_alone(new_bench: NewBench, store: dict[str, Row]) -> None:
    """What it knew is old, and whoever leads now has written since: neither when it notices nor when it ends."""
    bench = new(new_bench, etcd_lock_beat_ttl=3, etcd_lock_timeout=1)
    first, second = bench.leading(), bench.scheduler()
    bench.ticked(first)
    old: Any = first._inner
    old._dirty.add("entry")
    bench.depose()
    bench.await_signal(LeaderLostRecord)
    bench.ticked(second, 2)
    there = Row(**vars(store["entry"]))
    assert there.total_run_count > 1
    old.sync()
    assert store["entry"] == there
    bench.tick(first, lambda: first._inner is None)
    first.close()
    old.sync()  # as a finalizer of its own may, when the process ends
    assert store["entry"] == there


def test_a_store_that_lags_behind_sends_nothing_twice(new_bench: NewBench, store: dict[str, Row]) -> None:
    bench = new(new_bench)
    store["entry"].every = 60.0
    store["entry"].last_run_at = now() - timedelta(minutes=2)
    beat = bench.scheduler()
    bench.ticked(beat)
    beat.close()
    store["entry"] = Row("entry", 60.0, now() - timedelta(minutes=2))  # as if it had been killed before it wrote
    again = bench.leading()
    for _ in range(3):
        again.tick()
    assert len(bench.sent()) == 1
    assert again.schedule["entry"].model.total_run_count == 1


def test_a_store_that_is_ahead_counts(new_bench: NewBench, store: dict[str, Row]) -> None:
    """Somebody has enabled it anew: its time begins then, and its count."""
    bench = new(new_bench)
    beat = bench.leading()
    bench.ticked(beat, 2)
    beat.close()
    ahead = now()
    store["entry"] = Row("entry", 60.0, ahead, total_run_count=0)
    again = bench.leading()
    assert again.schedule["entry"].last_run_at == ahead
    assert again.schedule["entry"].total_run_count == 0


def test_an_entry_that_comes_up_though_etcd_knows_it_was_sent(new_bench: NewBench, store: dict[str, Row]) -> None:
    """Read from the store while the beat leads, before what was sent is in there."""
    bench = new(new_bench)
    store["entry"].every = 60.0
    store["entry"].last_run_at = now() - timedelta(minutes=2)
    beat = bench.scheduler()
    bench.ticked(beat)
    inner: Any = beat._inner
    stale = ModelEntry(Row("entry", 60.0, now() - timedelta(minutes=2)), app=bench.app)
    reserved = inner.reserve(stale)
    inner.apply_entry(stale, producer=inner.producer)
    assert reserved.total_run_count == 1
    assert len(bench.sent()) == 1
    assert len(bench.signals(TickFencedRecord)) == 1
    assert stale.model.total_run_count == 1
    assert stale.last_run_at == datetime.fromisoformat(bench.record("entry")["last_run_at"])
