"""Two beats in two containers: every tick is sent once, also when the one that leads is killed."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise

import pytest

from tests.smoke.fleet import BEAT_TTL, BeatContainer, CeleryTestNode, CeleryTestWorker, CeleryWorkerCluster, Fleet
from tests.workers import until


@pytest.fixture
def celery_worker_cluster(celery_worker: CeleryTestWorker) -> CeleryWorkerCluster:
    return CeleryWorkerCluster(celery_worker)


@pytest.fixture
def beats(fleet: Fleet, one_beat: BeatContainer, other_beat: BeatContainer) -> list[CeleryTestNode]:
    return [CeleryTestNode(one_beat), CeleryTestNode(other_beat)]


def leader(fleet: Fleet) -> str:
    """The host of the beat that leads, "" if none does."""
    kvs = fleet.keys("/celery/beat/default/leader/")
    return str(json.loads(kvs[0].value)["host"]) if kvs else ""


def ticks(fleet: Fleet) -> dict[str, list[str]]:
    """The ids under which each tick came, by when it was due."""
    came = defaultdict(list)
    for note in fleet.notes("tick"):
        came[note.due].append(note.id)
    return came


def test_each_tick_is_sent_once_and_the_standby_goes_on(fleet: Fleet, beats: list[CeleryTestNode]) -> None:
    """A tick that the killed one was about to confirm may come once more, under the same id; no other does."""
    until(lambda: len(ticks(fleet)) >= 5, "five ticks")
    assert len(fleet.keys("/celery/beat/default/leader/")) == 2, "one leads, the other stands by"
    first = leader(fleet)
    (leading,) = [beat for beat in beats if beat.hostname() == first]
    quiet = ticks(fleet)
    assert all(len(ids) == 1 for ids in quiet.values()), quiet
    leading.kill()
    until(lambda: leader(fleet) not in {first, ""}, "the other's turn", seconds=10 * BEAT_TTL)
    before = len(ticks(fleet))
    until(lambda: len(ticks(fleet)) >= before + 5, "five more ticks")
    came = ticks(fleet)
    assert all(len(set(ids)) == 1 for ids in came.values()), came
    assert sum(len(ids) > 1 for ids in came.values()) <= 1, came
    assert all(one < two for one, two in pairwise(came)), "in their order"
