"""The plan of faults: made from its seed alone, all kinds in it, no more at a time than it says."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.safety.chaos import ALL_KINDS
from tests.safety.faults import KINDS, TRACKS, plan

SEEDS = st.integers(0, 10**9)


@given(SEEDS)
def test_a_seed_is_a_plan(seed: int) -> None:
    """The same seed deals the same faults, and another seed others."""
    assert plan(seed, 60) == plan(seed, 60)
    assert plan(seed, 60) != plan(seed + 1, 60)


def test_a_plan_is_the_same_everywhere() -> None:
    """What a seed deals does not depend on the process: a run can be replayed later."""
    assert [str(fault) for fault in plan(1234, 6)] == [
        "   1.0 s  GIL held, for 4.1 s",
        "   1.0 s  leader moved, follower",
        "   1.0 s  network delays, leader (left), for 3.6 s",
        "   1.3 s  member stopped, leader, for 3.7 s",
        "   5.7 s  holder killed",
    ]


@given(SEEDS)
def test_all_kinds_come(seed: int) -> None:
    """In two minutes every kind of fault comes, whatever the seed."""
    assert {fault.kind for fault in plan(seed, ALL_KINDS)} == set(KINDS)


@given(SEEDS, st.floats(5, 300))
def test_one_at_a_time_on_each_track(seed: int, seconds: float) -> None:
    """Faults of one track do not overlap (so at most one member is down), and all are over at the end."""
    faults = plan(seed, seconds)
    assert faults == sorted(faults, key=lambda fault: fault.at)
    assert all(fault.at > 0 and fault.at + fault.for_ <= seconds for fault in faults)
    for track in set(TRACKS.values()):
        own = [fault for fault in faults if TRACKS[fault.kind] == track]
        assert all(first.at + first.for_ < second.at for first, second in pairwise(own))


@pytest.mark.parametrize("ttl", [3.0, 10.0])
def test_clients_stand_still_for_longer_than_a_lease_lives(ttl: float) -> None:
    """A holder that is stopped, or holds the GIL, does so for longer than the TTL."""
    faults = plan(1, 600, ttl=ttl)
    still = [fault.for_ for fault in faults if fault.kind in ("holder stopped", "GIL held")]
    assert min(still) > ttl


def test_the_network_fails_for_one_and_for_all() -> None:
    """Sometimes one member is out of reach, sometimes all are."""
    targets = {fault.target for fault in plan(1, ALL_KINDS) if TRACKS[fault.kind] == "network"}
    assert targets == {"leader", "follower", "all"}
