"""A tick is sent once: what is written down of it, and what happens where it is cut off."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Task
from celery.schedules import crontab, schedule
from celery.signals import before_task_publish
from kombu.exceptions import OperationalError
from redis import Redis

from celery_etcd_lock import SingletonTask
from celery_etcd_lock.signals import LeaderElectedRecord, LeaderLostRecord, TickFencedRecord, TickSentRecord
from celery_etcd_lock.testing import EtcdServer
from tests.beat.bench import Bench
from tests.servers import RedisServer
from tests.tasks.test_requests import requests

NewBench = Callable[..., Bench]
SOON = {"task": "plain", "schedule": 0.3}
DAILY = {"task": "plain", "schedule": timedelta(days=1)}


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(timezone.utc)


def test_a_tick_is_sent_and_written_down(new_bench: NewBench) -> None:
    """The message says for when it is, the record what was sent; two ticks have two ids."""
    bench = new_bench({"soon": SOON})
    beat = bench.leading()
    assert bench.record("soon")["total_run_count"] == 0
    first, second = bench.ticked(beat, 2)[:2]
    record = bench.record("soon")
    assert record["state"] == "sent"
    assert record["task_id"] == second.id
    assert record["total_run_count"] == 2
    assert record["due"] == second.due
    assert utc(first.due) < utc(second.due) <= utc(record["last_run_at"]) <= datetime.now(timezone.utc)
    assert first.id != second.id
    assert first.headers["etcd_lock_beat"]["name"] == "default"
    told = bench.signals(TickSentRecord)[0]
    assert (told.entry, told.task, told.task_id, told.due) == ("soon", "plain", first.id, utc(first.due))
    assert 0 <= told.late < 30
    assert not told.again


def test_options_of_the_entry_are_kept(new_bench: NewBench) -> None:
    options = {"headers": {"mine": 1, "etcd_lock": {"on_conflict": "skip"}}, "expires": 60}
    bench = new_bench({"soon": {"task": "single", "schedule": 0.3, "options": options}})
    (sent,) = bench.ticked(bench.leading())
    assert sent.headers["mine"] == 1
    assert sent.headers["expires"]
    assert sent.headers["etcd_lock"]["on_conflict"] == {"name": "skip"}
    assert sent.headers["etcd_lock"]["again"], "there may be copies"
    assert options["headers"] == {"mine": 1, "etcd_lock": {"on_conflict": "skip"}}, "the schedule's own is as it was"


def test_arguments_and_where_to_send_are_the_entrys(new_bench: NewBench) -> None:
    """Also of a task that this app does not know."""
    queue = f"elsewhere-{uuid.uuid4().hex}"
    options = {"queue": queue, "priority": 3}
    entry = {"task": "elsewhere", "schedule": 0.3, "args": (1,), "kwargs": {"full": True}, "options": options}
    bench = new_bench({"soon": entry})
    with closing(Redis.from_url(bench.redis_url)) as redis:
        found: Any = redis
        bench.tick(bench.scheduler(), lambda: found.keys(f"{queue}*"))
        (key,) = found.keys(f"{queue}*")
        message = json.loads(found.lindex(key, -1))
        found.delete(key)
    assert json.loads(base64.b64decode(message["body"]))[:2] == [[1], {"full": True}]
    assert message["properties"]["priority"] == 3
    assert not bench.sent()


def test_an_id_of_the_entrys_own_stays(new_bench: NewBench) -> None:
    bench = new_bench({"soon": {**SOON, "options": {"task_id": "mine"}}})
    assert bench.ticked(bench.leading())[0].id == "mine"


def test_two_requests_a_tick_and_none_while_nothing_is_due(new_bench: NewBench) -> None:
    with EtcdServer() as own:
        bench = new_bench({"soon": SOON, "daily": DAILY}, etcd_url=own.url, etcd_lock_beat_ttl=60)
        beat = bench.leading()
        before = requests(own)
        count = len(bench.ticked(beat, 5, "soon"))
        spent = requests(own) - before
        assert spent["Txn"] == 2 * count
        # The watch is for those who join. What reads the records for the test is a Range.
        assert set(spent) <= {"Txn", "LeaseKeepAlive", "Range", "Watch"}
        assert spent["Range"] <= 1


class Deposing(schedule):
    """An interval in whose `is_due` the beat that asks loses its leadership, once, when it is due."""

    depose: Callable[[], None] | None = None

    def is_due(self, last_run_at: datetime) -> Any:
        state = super().is_due(last_run_at)
        if state.is_due and Deposing.depose:
            depose, Deposing.depose = Deposing.depose, None
            depose()
        return state


def test_who_was_deposed_in_the_middle_of_a_tick_sends_nothing(
    new_bench: NewBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another leads and has sent it, before the fence is asked. The entry is as it was, and the slot is sent once."""
    bench = new_bench({"entry": {"task": "plain", "schedule": Deposing(1.0)}})
    frozen, other = bench.leading(), bench.scheduler()

    def depose() -> None:
        bench.depose()
        bench.ticked(other)

    monkeypatch.setattr(Deposing, "depose", depose)
    inner: Any = frozen._inner
    bench.tick(frozen, lambda: bench.signals(TickFencedRecord))
    assert len(bench.sent()) == 1
    assert inner.schedule["entry"].total_run_count == 0
    assert not inner._ledger.leads
    assert bench.record("entry")["total_run_count"] == 1
    bench.await_signal(LeaderLostRecord)


def test_a_leader_that_is_deposed_while_it_publishes_is_repeated_under_the_same_id(new_bench: NewBench) -> None:
    """It cannot write down that it has sent: whoever leads next sends the slot again, and counts it once."""
    bench = new_bench({"single": {"task": "single", "schedule": 2.0}})
    beat, other = bench.leading(), bench.scheduler()
    struck: list[str] = []

    @before_task_publish.connect
    def depose(**_: Any) -> None:
        if not struck:
            struck.append("deposed")
            bench.depose()

    try:
        bench.ticked(beat)
        assert bench.record("single")["state"] == "sending"
        first, again = bench.ticked(other)
    finally:
        before_task_publish.disconnect(depose)
    assert first.id == again.id
    assert first.headers["etcd_lock"]["nonce"] == again.headers["etcd_lock"]["nonce"], "copies of one publication"
    assert bench.record("single")["state"] == "sent"
    assert bench.record("single")["total_run_count"] == 1
    assert [each.again for each in bench.signals(TickSentRecord)] == [False, True]


def test_a_beat_that_ends_between_fence_and_publish_is_followed_under_the_same_id(new_bench: NewBench) -> None:
    class KilledError(BaseException):
        pass

    bench = new_bench({"entry": {"task": "plain", "schedule": 1.0}})
    beat = bench.leading()

    def kill(**_: Any) -> None:
        raise KilledError

    before_task_publish.connect(kill, weak=False, dispatch_uid=bench.name)
    try:
        with pytest.raises(KilledError):
            bench.ticked(beat)
    finally:
        before_task_publish.disconnect(dispatch_uid=bench.name)
    record = bench.record("entry")
    assert record["state"] == "sending"
    beat.close()
    (sent,) = bench.ticked(bench.scheduler())
    assert (sent.id, sent.due) == (record["task_id"], record["due"])


def test_a_slot_left_open_for_so_long_that_no_id_is_remembered_gives_way_to_the_newest(new_bench: NewBench) -> None:
    bench = new_bench({"hourly": {"task": "plain", "schedule": crontab(minute="*")}}, etcd_lock_done_ttl=600)
    old = datetime.now(timezone.utc).replace(second=0, microsecond=0) - timedelta(hours=3)
    before = (old - timedelta(minutes=1)).isoformat()
    bench.write(
        "hourly", state="sending", due=old.isoformat(), task_id="forgotten", last_run_at=before, total_run_count=7
    )
    (sent,) = bench.ticked(bench.scheduler())
    assert sent.id != "forgotten"
    assert datetime.now(timezone.utc) - utc(sent.due) < timedelta(minutes=2)
    assert bench.record("hourly")["total_run_count"] == 8


def test_a_broker_that_fails_costs_no_tick(new_bench: NewBench) -> None:
    """The slot is tried again with growing pauses, under the same id, and is sent when the broker is back."""
    with RedisServer() as broker:
        bench = new_bench(
            {"entry": {"task": "plain", "schedule": 1.0, "options": {"retry": False}}, "daily": DAILY},
            redis_url=broker.url,
        )
        beat = bench.leading()
        bench.ticked(beat)
        broker.kill()
        bench.tick(beat, lambda: bench.record("entry")["state"] == "sending")
        open_slot = bench.record("entry")
        inner: Any = beat._inner
        bench.tick(beat, lambda: inner._failed["entry"][0] >= 2)
        broker.start()
        sent = bench.ticked(beat)[0]
        assert (sent.id, sent.due) == (open_slot["task_id"], open_slot["due"])
        assert bench.record("entry")["total_run_count"] == 2
        assert not inner._failed


def test_what_cannot_be_published_passes_as_in_celery(new_bench: NewBench, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, others go on, and the next slot is the next try."""
    bench = new_bench({"wrong": {"task": "plain", "schedule": 0.3, "args": (object(),)}, "soon": SOON})
    beat = bench.leading()
    bench.tick(beat, lambda: bench.record("wrong").get("total_run_count", 0) >= 2)
    assert bench.record("wrong")["state"] == "failed"
    assert len(bench.sent("soon")) >= 1
    assert "Message Error" in caplog.text


@pytest.mark.parametrize("how", ["wrong arguments", "queued already"])
def test_so_do_calls_that_the_task_refuses(new_bench: NewBench, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """A typed task with other arguments; one with ``on_duplicate="raise"`` of which a message is queued."""
    bench = new_bench({"soon": {**SOON, "task": "refused", "args": (1,) if how == "queued already" else (1, 2)}})

    def one(number: int) -> None:
        """Takes one."""

    task: Any = bench.app.task
    refused = task(
        one, name="refused", base=SingletonTask, unique_queued="until_start", on_duplicate="raise", shared=False
    )
    there = 0
    if how == "queued already":
        refused.delay(1)
        there = 1
    bench.tick(bench.scheduler(), lambda: bench.record("soon").get("total_run_count", 0) >= 2)
    assert bench.record("soon")["state"] == "failed"
    assert len(bench.sent()) == there
    assert ("DuplicateTaskError" if there else "takes 1 positional argument") in caplog.text


def test_an_entry_that_cannot_be_published_keeps_no_other_from_it(new_bench: NewBench) -> None:
    """And keeps its slot, for as long as it takes: three tries here, and two pauses, the second the longer."""
    bench = new_bench({"soon": SOON, "failing": {"task": "failing", "schedule": 0.3}})
    tries: list[tuple[float, str]] = []

    def nothing() -> None:
        """Nobody runs it."""

    class Failing(Task):  # type: ignore[misc,type-arg,unused-ignore]
        def apply_async(self, *args: Any, **options: Any) -> Any:
            tries.append((time.monotonic(), options["task_id"]))
            if len(tries) < 3:
                raise OperationalError("no broker, for this one")
            return super().apply_async(*args, **options)

    task: Any = bench.app.task
    task(nothing, name="failing", base=Failing, shared=False)
    beat = bench.scheduler()
    bench.ticked(beat, entry="failing")
    (first, second, third), ids = zip(*tries[:3], strict=True)
    assert len(set(ids)) == 1
    assert second - first >= 1.0
    assert third - second >= 2.0
    assert len(bench.sent("soon")) >= 4
    bench.ticked(beat, entry="failing")
    assert tries[3][1] != ids[0]


def test_a_mark_of_its_own_that_got_no_answer_and_came_late_is_heeded(new_bench: NewBench) -> None:
    """It promises a slot under an id, and that is what is sent: found where the next mark is to be put."""
    bench = new_bench({"entry": {"task": "plain", "schedule": 1.0}})
    beat = bench.leading()
    there = bench.record("entry")
    due = datetime.now(timezone.utc).isoformat()
    bench.write("entry", **{**there, "state": "sending", "due": due, "task_id": "late"})
    (sent,) = bench.ticked(beat)
    assert (sent.id, sent.due) == ("late", due)
    assert bench.record("entry")["task_id"] == "late"
    assert bench.record("entry")["total_run_count"] == 1


def test_a_record_that_was_deleted_is_written_anew(new_bench: NewBench) -> None:
    bench = new_bench({"soon": SOON})
    beat = bench.leading()
    bench.ticked(beat)
    bench.write("soon", nonsense=True)
    before = len(bench.sent())
    bench.tick(beat, lambda: len(bench.sent()) > before + 1)
    assert len({each.id for each in bench.sent()}) == len(bench.sent())
    assert bench.record("soon")["state"] == "sent"


def test_leading_standing_by_and_leading_again(new_bench: NewBench) -> None:
    """A leader that was deposed stands for election again, and is elected when the other steps down."""
    bench = new_bench({"soon": SOON})
    first = bench.leading()
    second = bench.scheduler()
    began = time.monotonic()
    second.tick()
    assert not second.schedule, "it stands by"
    assert time.monotonic() - began < 10
    bench.depose()
    bench.ticked(second)
    bench.tick(first, lambda: not first.schedule)
    second.close()
    bench.ticked(first)
    assert len(bench.signals(LeaderElectedRecord)) == 3
    assert len({each.id for each in bench.sent()}) == len(bench.sent())
