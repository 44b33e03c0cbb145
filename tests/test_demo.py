"""The demo's evidence: what it works out from the record must be right, or it would prove nothing."""

from __future__ import annotations

import math
import multiprocessing
import random
from pathlib import Path

import pytest

from example_project.demo.record import Run, cut_short, note, overlaps, runs, timeline, written


def run(number: int, start: float, end: float, token: int = 0) -> Run:
    return Run("job", number, "worker", number, start, end, token)


def test_runs_one_after_the_other_do_not_overlap() -> None:
    """Runs in any order of mention, the next beginning as the one before ends, are no overlap."""
    assert overlaps([run(2, 2, 3), run(0, 0, 1), run(1, 1, 2)]) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 2), (1, 3)), ((0, 9), (1, 2)), ((0, 1), (0, 1)), ((0, 1.001), (1, 2)), ((0, math.inf), (99, 100))],
    ids=["partly", "inside", "the same", "an instant", "without an end"],
)
def test_runs_at_the_same_time_overlap(one: tuple[float, float], other: tuple[float, float]) -> None:
    """However two runs share time, they are found, whichever comes first."""
    first, second = run(0, *one), run(1, *other)
    for order in ([first, second], [second, first]):
        assert [{*pair} for pair in overlaps(order)] == [{first, second}]


def test_every_pair_is_found() -> None:
    """All pairs that a check of each against each finds are found, in a hundred random records."""
    rng = random.Random(1)
    for _ in range(100):
        made = [
            run(n, start, start + rng.uniform(0.1, 3)) for n, start in enumerate(rng.uniform(0, 9) for _ in "12345678")
        ]
        by_hand = sum(
            max(one.start, other.start) < min(one.end, other.end) for one in made for other in made if one is not other
        )
        assert len(overlaps(made)) * 2 == by_hand


def test_a_death_ends_what_the_dead_worker_had_not_ended() -> None:
    """Only its own unended runs end with it: who ran after is not cut short, and who ran at that time overlaps."""
    dead = Run("job", 0, "w1", 1, start=1, end=math.inf)
    before, after, beside = (
        Run("job", n, w, n, *times) for n, w, times in [(2, "w1", (0, 1)), (3, "w2", (5, 6)), (4, "w2", (3, 9))]
    )
    assert cut_short([before, dead, after], "w1", 4) == [before, Run("job", 0, "w1", 1, 1, 4), after]
    assert overlaps(cut_short([before, dead, after], "w1", 4)) == []
    assert len(overlaps(cut_short([dead, beside], "w1", 4))) == 1


def test_the_record_keeps_what_bodies_write(tmp_path: Path) -> None:
    """A start and its end become a run of its job alone; a start without an end is one that never ended."""
    path = tmp_path / "record"
    note(path, what="start", job="a", number=0, worker="w1", token=7)
    note(path, what="start", job="b", number=0, worker="w1", token=0)
    note(path, what="end", job="a", number=0)
    (ended,) = runs(path, "a")
    (unended,) = runs(path, "b")
    assert (ended.number, ended.worker, ended.token) == (0, "w1", 7)
    assert ended.start <= ended.end < math.inf
    assert unended.end == math.inf
    assert runs(path, "c") == runs(tmp_path / "none", "a") == []


def test_lines_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    """Four processes that write at once leave every line whole."""
    path = tmp_path / "record"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(line["number"] for line in written(path, "job")) == sorted([*range(4)] * 200)


def _write(path: Path, number: int) -> None:
    for _ in range(200):
        note(path, what="start", job="job", number=number, worker="w", token=0)


def test_the_timeline_shows_who_ran_when() -> None:
    """One row for each process, to scale, with the last digit of each run's number."""
    assert timeline([run(1, 0, 5), run(12, 5, 10)], width=10) == ["worker 1  |11111     |", "worker 12 |     22222|"]
    assert timeline([]) == ["(nothing ran)"]
