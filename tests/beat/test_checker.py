"""The checker finds each way in which beats can be wrong, and nothing where they are right."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from tests.beat.checker import Disturbance, Receipt, Report, check
from tests.beat.faults import plan

BEGIN = 1_800_000_000.0


def receipt(at: float, *, name: str = "", due: float | None = None) -> Receipt:
    """One of the entry ``second``, `at` so many seconds after the beginning."""
    moment = datetime.fromtimestamp(BEGIN + (at if due is None else due), timezone.utc)
    return Receipt("second", name or f"id-{at}", BEGIN + at, moment.isoformat())


def judged(receipts: list[Receipt], *disturbances: Disturbance, once: tuple[str, ...] = ()) -> Report:
    return check(
        receipts, disturbances, {"second": 1.0}, begin=BEGIN, end=BEGIN + 10, slack=0.5, once=once
    )  # fmt: skip


def right() -> list[Receipt]:
    return [receipt(float(second)) for second in range(1, 10)]


def test_every_tick_once_is_right() -> None:
    report = judged(right())
    assert (report.violations, report.repeats, report.received) == ([], [], {"second": 9})


@pytest.mark.parametrize(
    ("receipts", "violation"),
    [
        ([*right(), receipt(5.2, name="another", due=5.0)], "under 2 ids"),
        ([*right(), receipt(5.4, name="id-5.0", due=5.0)], "received 2 times"),
        ([*right(), receipt(5.5)], "0.500 s apart"),
        ([each for each in right() if each.at != BEGIN + 5], "nothing for 2.0 s"),
        (right()[:-2], "nothing for 3.0 s"),
        (right()[2:], "nothing for 3.0 s"),
        ([], "nothing for 10.0 s"),
    ],
    ids=["two ids", "twice", "burst", "gap", "ended early", "began late", "nothing"],
)
def test_what_is_wrong_is_found(receipts: list[Receipt], violation: str) -> None:
    report = judged(receipts)
    assert any(violation in each for each in report.violations), report.violations


def test_plain_beats_are_held_to_the_clock() -> None:
    """A message that does not say for when it is counts for the second in which it comes."""
    sent = [
        Receipt("second", f"id-{second}-{beat}", BEGIN + second + beat / 10, "")
        for second in range(10)
        for beat in (1, 2)
    ]
    assert any("under 2 ids" in each for each in judged(sent).violations)


def test_a_disturbance_excuses_a_gap_and_a_repeat() -> None:
    receipts = [each for each in right() if not 3.5 < each.at - BEGIN < 6.5]
    receipts.append(receipt(6.9, name="id-3.0", due=3.0))
    killed = Disturbance("leader killed", BEGIN + 3.5, BEGIN + 6.8)
    report = judged(receipts, killed)
    assert report.violations == []
    assert len(report.repeats) == 1
    assert "leader killed" in report.repeats[0]


def test_it_excuses_no_more_than_that() -> None:
    killed = Disturbance("leader killed", BEGIN + 3.5, BEGIN + 4.5)
    gap = [each for each in right() if not 3.5 < each.at - BEGIN < 7.5]
    assert any("without a reason" in each for each in judged(gap, killed).violations)
    late = [*right(), receipt(8.2, name="id-8.0", due=8.0)]
    assert any("received 2 times" in each for each in judged(late, killed).violations)
    twice = [*right(), receipt(4.2, name="id-4.0", due=4.0)]
    assert any("received 2 times" in each for each in judged(twice, killed, once=("second",)).violations)


def test_disturbances_that_overlap_count_once() -> None:
    gap = [each for each in right() if not 2.5 < each.at - BEGIN < 6.5]
    twice = [Disturbance("one", BEGIN + 2.5, BEGIN + 4.0), Disturbance("two", BEGIN + 3.0, BEGIN + 4.0)]
    assert any("3.5 s without a reason" in each for each in judged(gap, *twice).violations)


def test_a_seed_deals_the_same_faults_and_all_of_them() -> None:
    one, same, other = ([next(faults) for faults in [plan(seed, 3.0)] * 26] for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert {(each.kind, each.target) for each in one[:13]} == {(each.kind, each.target) for each in one}
