"""A leader that does not reach the broker makes room for one that may; alone, it goes on trying."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from kombu.exceptions import OperationalError

from celery_etcd_lock.beat.broker import Broker
from celery_etcd_lock.signals import LeaderLostRecord
from tests.beat.beats import Beat, Beats
from tests.beat.bench import Bench
from tests.clock import Clock
from tests.safety.proxy import Proxy
from tests.servers import RedisServer, free_port
from tests.workers import until

NewBeats = Callable[..., Beats]
NewBench = Callable[..., Bench]
TTL = 3
SAID = "etcd_lock.beat_without_broker"


@pytest.fixture
def proxy(redis: RedisServer) -> Iterator[Proxy]:
    """The broker, as one of the beats sees it."""
    with Proxy(redis.url) as made:
        yield made


def cut(proxy: Proxy, how: str) -> None:
    if how == "refuses":
        proxy.reset()
    else:
        proxy.black_hole()


def beat_at(beats: Beats, broker_url: str) -> Beat:
    """One more beat, for which the broker is at `broker_url`."""
    beats.variables["BROKER_URL"] = broker_url
    try:
        return beats.beat()
    finally:
        del beats.variables["BROKER_URL"]


def await_ticks_of(beats: Beats, beat: Beat, count: int = 2) -> None:
    """So many more ticks of an entry of a second."""

    def sent() -> int:
        return sum(each.pid == beat.pid for each in beats.received("second"))

    there = sent()
    until(lambda: sent() >= there + count, f"ticks of {beat.name}")


@pytest.mark.parametrize("how", ["refuses", "hangs"])
@pytest.mark.parametrize("when", ["before it connects", "while it sends"])
def test_another_leads_in_its_place(new_beats: NewBeats, proxy: Proxy, when: str, how: str) -> None:
    """It says so once, and leads and sends again when it is elected again. No slot is sent under two ids."""
    beats = new_beats()
    beats.worker()
    if when == "before it connects":
        cut(proxy, how)
    first = beat_at(beats, proxy.url)
    first.says("etcd_lock.leader_elected")
    second = beats.beat()
    until(lambda: len(beats.keys("leader/")) == 2, "one that stands by")
    if when == "while it sends":
        await_ticks_of(beats, first)
        cut(proxy, how)
    second.says("etcd_lock.leader_elected", seconds=10 * TTL)
    await_ticks_of(beats, second)
    assert first.output.count(SAID) == 1
    assert first.output.count("etcd_lock.leader_lost") == 1
    proxy.pass_on()
    until(lambda: len(beats.keys("leader/")) == 2, "the first, which stands by")
    assert second.stop() == 0
    await_ticks_of(beats, first)
    received = [each for each in beats.received() if each.entry != "alone"]
    slots = Counter((each.entry, each.due) for each in {(one.entry, one.due, one.id): one for one in received}.values())
    assert set(slots.values()) == {1}
    copies = [name for name, count in Counter(each.id for each in received).items() if count > 1]
    assert len(copies) <= 1, "what was just being published"


def test_while_its_publish_hangs_it_is_not_elected(new_beats: NewBeats, proxy: Proxy) -> None:
    """Though it would be next: it could send nothing."""
    beats = new_beats()
    beats.worker()
    first = beat_at(beats, proxy.url)
    await_ticks_of(beats, first)
    second = beats.beat()
    until(lambda: len(beats.keys("leader/")) == 2, "one that stands by")
    proxy.black_hole()
    second.says("etcd_lock.leader_elected", seconds=10 * TTL)
    await_ticks_of(beats, second, 4)  # by now the first could have come back
    third = beats.beat()
    until(lambda: len(beats.keys("leader/")) == 2, "another that stands by")
    assert second.stop() == 0
    third.says("etcd_lock.leader_elected")
    await_ticks_of(beats, third)
    assert first.output.count("etcd_lock.leader_elected") == 1
    proxy.pass_on()
    until(lambda: len(beats.keys("leader/")) == 2, "the first, which stands by again")


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_alone_it_goes_on(new_beats: NewBeats, proxy: Proxy, how: str) -> None:
    """It keeps its place, says nothing of stepping down, and sends when the broker is back."""
    beats = new_beats()
    beats.worker()
    beat = beat_at(beats, proxy.url)
    await_ticks_of(beats, beat)
    (place,) = beats.keys("leader/")
    cut(proxy, how)
    time.sleep(3 * TTL)
    proxy.pass_on()
    await_ticks_of(beats, beat)
    assert [each.create_revision for each in beats.keys("leader/")] == [place.create_revision]
    assert SAID not in beat.output
    assert "etcd_lock.leader_lost" not in beat.output


def test_it_makes_room_for_one_that_comes_later(new_beats: NewBeats, proxy: Proxy) -> None:
    beats = new_beats()
    beats.worker()
    proxy.reset()
    first = beat_at(beats, proxy.url)
    first.says("beat: Connection error")
    time.sleep(2 * TTL)
    assert SAID not in first.output
    second = beats.beat()
    await_ticks_of(beats, second)
    assert first.output.count(SAID) == 1


def test_sigterm_in_a_publish_that_hangs(new_beats: NewBeats, proxy: Proxy) -> None:
    """With a timeout for the broker it waits for that, and no longer. The slot is sent by the next under its id."""
    beats = new_beats(etcd_lock_beat_ttl=60, broker_transport_options={"socket_timeout": 2})
    beats.variables["ARRIVALS"] = "1"  # also of a singleton's copy, which is dropped
    beats.worker()
    first = beat_at(beats, proxy.url)
    await_ticks_of(beats, first)
    proxy.black_hole()

    def open_slots() -> list[Any]:
        return [record for kv in beats.keys("entry/") if (record := json.loads(kv.value)).get("state") == "sending"]

    def hanging() -> Any:
        """Seen twice: the first may have been the last to go through."""
        before = open_slots()
        time.sleep(0.5)
        return before and before == open_slots() and before

    (hangs,) = until(hanging, "a publish that hangs")
    began = time.monotonic()
    assert first.stop() == 0
    assert time.monotonic() - began < 40
    assert [record["task_id"] for record in open_slots()] == [hangs["task_id"]]
    assert not beats.keys("leader/"), "it has stepped down"
    second = beats.beat()
    again = (hangs["task_id"], second.pid)
    until(lambda: again in {(each.id, each.pid) for each in beats.received()}, "the slot, sent by the next")


def test_a_beat_that_is_deposed_while_it_connects_stops_trying(
    new_bench: NewBench, caplog: pytest.LogCaptureFixture
) -> None:
    """Long before Celery would: its tick ends, and sends nothing."""
    bench = new_bench(
        {"soon": {"task": "plain", "schedule": 0.3}},
        redis_url=f"redis://127.0.0.1:{free_port()}",
        broker_connection_max_retries=None,
    )
    beat, other = bench.leading(), bench.scheduler()
    other.tick()

    def until_deposed() -> None:
        bench.tick(beat, lambda: beat._inner is None)

    ticking = threading.Thread(target=until_deposed, daemon=True)
    ticking.start()
    until(lambda: "beat: Connection error" in caplog.text, "a try")
    bench.depose()
    ticking.join(30)
    assert not ticking.is_alive()
    bench.await_signal(LeaderLostRecord)
    assert bench.record("soon")["total_run_count"] == 0
    assert not bench.record("soon").get("state")


# -- how long it is away


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fail(broker: Broker, clock: Clock, seconds: float, error: Exception | None = None) -> None:
    """A try that fails after so many seconds."""
    with suppress(OperationalError, TypeError), broker.trying(lambda raised: isinstance(raised, OperationalError)):
        clock.now += seconds
        raise error or OperationalError


def test_tries_that_fail_count_from_the_first_to_the_last(clock: Clock) -> None:
    """What nobody has tried since is not known to be away."""
    broker, began = Broker(clock), clock.now
    assert broker.away(began) == 0
    fail(broker, clock, 1)
    clock.now += 100
    assert broker.away(began) == 1
    fail(broker, clock, 1)
    assert broker.away(began) == 102
    broker.reached()
    assert broker.away(began) == 0
    fail(broker, clock, 1)
    assert broker.away(began) == 1


def test_a_try_that_hangs_counts_from_its_beginning(clock: Clock) -> None:
    broker, began = Broker(clock), clock.now
    with broker.trying(lambda _: True):
        clock.now += 7
        assert broker.away(began) == 7
        assert broker.away(began + 4) == 3, "of another term, which has begun meanwhile"
    assert broker.away(began) == 0
    fail(broker, clock, 1)
    clock.now += 9
    with broker.trying(lambda _: True):
        clock.now += 1
        assert broker.away(began) == 11


def test_other_errors_say_nothing_of_it(clock: Clock) -> None:
    broker, began = Broker(clock), clock.now
    fail(broker, clock, 1, TypeError("a message that cannot be sent"))
    assert broker.away(began) == 0
    fail(broker, clock, 2)
    fail(broker, clock, 4, TypeError("a message that cannot be sent"))
    assert broker.away(began) == 2


def test_a_term_begins_with_a_clean_slate(clock: Clock) -> None:
    broker, began = Broker(clock), clock.now
    fail(broker, clock, 10)
    broker.forget()
    assert broker.away(began) == 0


def test_where_no_beat_reaches_it_terms_grow_longer(clock: Clock) -> None:
    broker = Broker(clock)
    terms = []
    for _ in range(6):
        terms.append(broker.patience(15))
        broker.gives_up()
    assert terms == [15, 30, 60, 120, 240, 240]
    broker.reached()
    assert broker.patience(15) == 15
