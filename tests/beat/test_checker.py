"""The checker finds each way in which beats can be wrong, and nothing where they are right."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from tests.beat.checker import Disturbance, Receipt, Report, Rules, check
from tests.beat.faults import DECK, plan

BEGIN = 1_800_000_000.0


def receipt(
    at: float, *, name: str = "", due: float | None = None, pid: int = 1, sent: float | None = None,
    entry: str = "second",
) -> Receipt:  # fmt: skip
    """One that came `at` so many seconds after the beginning, and was due and `sent` then, unless it says otherwise."""
    due = at if due is None else due
    moment = datetime.fromtimestamp(BEGIN + due, timezone.utc)
    left = BEGIN + (at if sent is None else sent)
    return Receipt(entry, name or f"id-{due}", BEGIN + at, moment.isoformat(), pid, left)


def judged(
    receipts: list[Receipt],
    *disturbances: Disturbance,
    once: tuple[str, ...] = (),
    promised: dict[str, str] | None = None,
) -> Report:
    rules = Rules({"second": 1.0}, slack=0.5, once=once)
    return check(receipts, disturbances, rules, begin=BEGIN, end=BEGIN + 10, promised=promised)


def struck(what: str, at: float, *, late: float = 1.0, pid: int = 1, woke: float | None = None) -> Disturbance:
    """A beat was killed or frozen `at` so many seconds after the beginning."""
    strikes = [BEGIN + moment for moment in (at, woke) if moment is not None]
    return Disturbance(what, BEGIN + at, BEGIN + at + late, pid, () if what == "stopped" else tuple(strikes))


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
        ([each for each in right() if each.at != BEGIN + 5] + [receipt(4.7, due=5.0)], "0.300 s before its time"),
        ([each for each in right() if each.at != BEGIN + 5] + [receipt(5.8, due=5.0)], "0.8 s late without a reason"),
        (
            [each for each in right() if each.at != BEGIN + 5] + [receipt(5.9, due=5.0, sent=5.9)],
            "two ticks were sent 0.100 s apart",
        ),
        ([*right()[:4], *(receipt(second + 0.7) for second in range(5, 10))], "1 times the interval and 0.700 s apart"),
        ([*right(), Receipt("second", "id", BEGIN + 5.5, "")], "does not say for when it is"),
    ],
    ids=[
        "two ids",
        "twice",
        "burst",
        "gap",
        "ended early",
        "began late",
        "nothing",
        "too early",
        "too late",
        "at once",
        "another phase",
        "no due time",
    ],
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
    rules = Rules({"second": 1.0}, slack=0.5, plain=True)
    assert any("under 2 ids" in each for each in check(sent, (), rules, begin=BEGIN, end=BEGIN + 10).violations)
    assert check(sent[::2], (), rules, begin=BEGIN, end=BEGIN + 10).violations == []


def minutes(*due: float) -> Report:
    rules = Rules({"minute": 60.0}, slack=3.0, calendar=("minute",))
    first = -BEGIN % 60
    receipts = [receipt(first + each, entry="minute") for each in due]
    return check(receipts, (), rules, begin=BEGIN + first - 5, end=BEGIN + first + 185)


def test_a_calendar_is_held_to_all_its_slots_and_to_no_other() -> None:
    assert minutes(0, 60, 120, 180).violations == []
    assert any(f"{BEGIN + 120:.3f} is missing" in each for each in minutes(0, 60, 180).violations)
    assert any("nothing is due at" in each for each in minutes(0, 60, 90, 120, 180).violations)


def test_a_slot_of_a_calendar_that_still_has_time_is_not_missing() -> None:
    rules = Rules({"minute": 60.0}, slack=3.0, calendar=("minute",))
    first = -BEGIN % 60
    receipts = [receipt(first, entry="minute")]
    assert check(receipts, (), rules, begin=BEGIN + first - 5, end=BEGIN + first + 62).violations == []


def frozen_out() -> list[Receipt]:
    """Nobody sends from the fourth second to the seventh; then another beat does, on time by Celery's rules."""
    return [
        *(receipt(float(second)) for second in (1, 2, 3)),
        *(receipt(float(second), pid=2) for second in (7, 8, 9)),
    ]


@pytest.mark.parametrize(
    ("disturbance", "copy"),
    [
        pytest.param(struck("killed", 3.1, late=4.0), receipt(6.9, due=3.0, pid=2), id="killed after publish"),
        pytest.param(struck("frozen", 3.1, late=4.0, woke=8.0), receipt(6.9, due=3.0, pid=2), id="frozen after it"),
        pytest.param(
            struck("frozen", 6.9, late=4.0, woke=8.0), receipt(8.1, due=7.0, pid=1, sent=6.9), id="frozen before it"
        ),
        pytest.param(Disturbance("etcd", BEGIN + 2.5, BEGIN + 7), receipt(6.9, due=3.0, pid=2), id="etcd away"),
        pytest.param(Disturbance("etcd", BEGIN + 2.5, BEGIN + 7), receipt(6.9, due=3.0), id="etcd away, same beat"),
    ],
)
def test_what_excuses_a_repeat(disturbance: Disturbance, copy: Receipt) -> None:
    away = Disturbance("etcd away", BEGIN + 3.5, BEGIN + 6.8, 9)
    report = judged([*frozen_out(), copy], disturbance, away)
    assert [each for each in report.violations if "received" in each] == []
    (repeat,) = report.repeats
    assert disturbance.what in repeat


@pytest.mark.parametrize(
    ("disturbance", "copy"),
    [
        pytest.param(struck("stopped", 3.1), receipt(6.9, due=3.0, pid=2), id="a stop, which ends the tick"),
        pytest.param(struck("killed", 3.1, pid=3), receipt(6.9, due=3.0, pid=2), id="a kill of another beat"),
        pytest.param(struck("killed", 3.1), receipt(3.4, due=3.0), id="a kill of who sent both"),
        pytest.param(struck("killed", 3.1), receipt(8.2, due=8.0, pid=1), id="a kill long before"),
        pytest.param(Disturbance("etcd", BEGIN + 5, BEGIN + 7), receipt(6.9, due=3.0, pid=2), id="etcd away later"),
        pytest.param(
            Disturbance("etcd", BEGIN + 5, BEGIN + 10, strikes=(BEGIN + 5, BEGIN + 6)),
            receipt(9.9, due=8.0, pid=3),
            id="etcd back again",
        ),
    ],
)
def test_what_does_not(disturbance: Disturbance, copy: Receipt) -> None:
    report = judged([*frozen_out(), copy], disturbance)
    assert any("received 2 times" in each for each in report.violations)
    assert report.repeats == []


def test_nothing_excuses_a_repeat_of_a_singleton() -> None:
    copy = receipt(6.9, due=3.0, pid=2)
    report = judged([*frozen_out(), copy], struck("killed", 3.1, late=4.0), once=("second",))
    assert any("received 2 times" in each for each in report.violations)


def test_a_disturbance_excuses_a_gap_as_long_as_itself() -> None:
    assert judged(frozen_out(), struck("killed", 3.5, late=3.4)).violations == []
    assert any("without a reason" in each for each in judged(frozen_out(), struck("killed", 3.5)).violations)


def test_a_tick_in_the_middle_of_which_a_beat_was_killed_must_come() -> None:
    assert judged(right(), promised={"id-5.0": "killed"}).violations == []
    assert judged(right(), promised={"lost": "killed"}).violations == ["lost never came: killed"]


def test_disturbances_that_overlap_count_once() -> None:
    gap = [each for each in right() if not 2.5 < each.at - BEGIN < 6.5]
    twice = [Disturbance("one", BEGIN + 2.5, BEGIN + 4.0), Disturbance("two", BEGIN + 3.0, BEGIN + 4.0)]
    assert any("3.5 s without a reason" in each for each in judged(gap, *twice).violations)


def test_a_seed_deals_the_same_faults_and_all_of_them() -> None:
    one, same, other = ([next(faults) for faults in [plan(seed, 3.0)] * 2 * len(DECK)] for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert {(each.kind, each.target) for each in one[: len(DECK)]} == {card[:2] for card in DECK}
