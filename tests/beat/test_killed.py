"""A beat that is killed in the middle of a tick, by SIGKILL, in a process of its own: what the worker receives."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.beat.beats import Beats
from tests.workers import until

NewBeats = Callable[..., Beats]


@pytest.mark.parametrize(
    ("at", "entry", "times"),
    [
        pytest.param("before publish", "second", 1, id="between fence and publish"),
        pytest.param("after publish", "second", 2, id="between publish and confirmation"),
        pytest.param("after publish", "alone", 1, id="the same, of a singleton task: the copy is dropped"),
    ],
)
def test_the_slot_is_sent_again_under_its_id(new_beats: NewBeats, at: str, entry: str, times: int) -> None:
    beats = new_beats()
    beats.strike(at, signal.SIGKILL, entry)
    worker = beats.worker()
    killed = beats.beat()
    killed.process.wait(60)
    record = next(json.loads(kv.value) for kv in beats.keys("entry/") if kv.key.endswith(f"/{entry}"))
    assert record["state"] == "sending"
    assert record["task_id"] == beats.await_struck().id
    beats.beat()

    def later() -> list[Any]:
        return [each for each in beats.received(entry) if each.due > record["due"]]

    until(lambda: len(later()) >= 2, "the ticks after it")
    counted = Counter(each.id for each in beats.received(entry))
    assert counted.pop(record["task_id"]) == times
    assert set(counted.values()) == {1}
    if entry == "alone":
        assert "etcd_lock.copy_dropped" in worker.output
