"""The arithmetic of the benchmarks; what they measure is nobody's test."""

from __future__ import annotations

import pytest

from benchmarks.contest import Contest, in_turn, spread
from benchmarks.findings import Finding
from benchmarks.report import between


def test_a_ratio_is_taken_round_by_round() -> None:
    """A machine that is three times as slow in one round does not change it."""
    contest = Contest({"one": [[2.0, 2.0], [6.0, 6.0], [2.0, 2.0]], "other": [[1.0], [3.0], [1.0]]})
    assert contest.ratio("one", "other").median == 2.0
    assert contest.ratio("one", "other").high == 2.0
    assert contest.values("one").median == 2.0


def test_quartiles() -> None:
    """Of five values the second and the fourth; of one that itself."""
    assert (spread([5.0, 1.0, 2.0, 3.0, 4.0]).low, spread([5.0, 1.0, 2.0, 3.0, 4.0]).high) == (2.0, 4.0)
    assert spread([7.0]).low == spread([7.0]).high == 7.0


def test_contestants_take_turns_and_warm_up() -> None:
    """Each round has all of them, every other one backwards, and the first does not count."""
    order: list[str] = []

    def contestant(name: str) -> list[float]:
        order.append(name)
        return [float(len(order))]

    contest = in_turn({name: lambda name=name: contestant(name) for name in "AB"}, rounds=2)  # type: ignore[misc]
    assert "".join(order) == "ABBAAB"
    assert contest.blocks == {"A": [[4.0], [5.0]], "B": [[3.0], [6.0]]}


@pytest.mark.parametrize(
    ("value", "bar", "at_least", "verdict"),
    [(1.0, 1.0, False, "reached"), (1.1, 1.0, False, "missed"), (3.9, 4.0, True, "missed"), (9.0, None, False, "")],
)
def test_a_bar_is_reached_or_missed(value: float, bar: float | None, at_least: bool, verdict: str) -> None:
    """At most, or at least; without a bar neither."""
    assert Finding("x", value, "", bar, at_least).verdict == verdict


def test_the_report_leaves_alone_what_stands_around_it() -> None:
    """What people wrote stays, and a second run takes the place of the first."""
    once = between("# Benchmarks\n\nBy hand.\n", "first")
    twice = between(once + "\nBehind.\n", "second")
    assert "first" not in twice
    assert twice.startswith("# Benchmarks\n\nBy hand.\n\n<!--")
    assert twice.endswith("-->\n\nBehind.\n")
    assert "\nsecond\n" in twice
