"""`lock_at_least_for` and `lock_at_most_for`: real workers of three pools, a TTL of 3 s."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from celery_etcd_lock import LockLost
from celery_etcd_lock.testing import EtcdServer
from tests.servers import RedisServer
from tests.tasks.shaped_tasks import LEAST, MOST
from tests.workers import Project, Run, overlaps, project, until

NewProject = Callable[..., Project]

SETTINGS: dict[str, Any] = {"imports": ["shaped_tasks"], "etcd_lock_ttl": 3}
BOUND = 120
"""Seconds, several times what anything here takes."""
SLACK = 1.0
"""Seconds, at most, between the moment from which a lock is kept and the one that the body writes down."""
GRACE = 5.0
"""Seconds after which a lost lock goes, whatever its holder does."""


@pytest.fixture(scope="module")
def forking(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with project(redis.url, etcd.url, tmp_path_factory.mktemp("forking"), **SETTINGS) as made:
        made.worker("-P", "prefork", "-c", "6")
        yield made


@pytest.fixture(scope="module")
def threading(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with project(redis.url, etcd.url, tmp_path_factory.mktemp("threading"), **SETTINGS) as made:
        made.worker("-P", "threads", "-c", "10")
        yield made


def gaps(runs: list[Run]) -> list[float]:
    """Seconds from each start to the next."""
    return [later.started - earlier.started for earlier, later in pairwise(runs)]


def test_a_lock_stays_taken_though_the_body_has_ended(forking: Project) -> None:
    """Whatever the policy and the mode the next run begins when the time is over, one that skips is skipped before."""
    tasks = ["lasts", "lasts_in_turn", "lasts_retrying", "lasts_reading"]
    results = [forking.send(task, number) for task in tasks for number in range(1 if task == "lasts_retrying" else 2)]
    until(lambda: forking.runs("lasts_reading"), "a reader")
    results += [forking.send("writes_then", 2), forking.send("lasts_skipping", 0)]
    until(lambda: [run for run in forking.runs("lasts_skipping") if run.ended < float("inf")], "the first one's end")
    assert forking.send("lasts_skipping", 1).get(timeout=BOUND) == "skipped"
    for result in results:
        result.get(timeout=BOUND)
    for task in ("lasts", "lasts_in_turn", "lasts_retrying"):
        (gap,) = gaps(forking.runs(task))
        assert gap > LEAST - SLACK, task
    readers, (writer,) = forking.runs("lasts_reading"), forking.runs("writes_then")
    assert gaps(readers)[0] < LEAST - SLACK, "readers do not wait for each other"
    assert writer.started - readers[-1].started > LEAST - SLACK
    assert len(forking.runs("lasts_skipping")) == 1


def test_a_place_of_several_stays_taken(forking: Project) -> None:
    """With a limit of two, two begin at once, the other two when the time of the first is over."""
    for result in [forking.send("lasts_two", number) for number in range(4)]:
        result.get(timeout=BOUND)
    runs = forking.runs("lasts_two")
    assert runs[2].started - runs[0].started > LEAST - SLACK
    assert runs[3].started - runs[1].started > LEAST - SLACK


def test_a_killed_worker_does_not_cut_it_short(new_project: NewProject) -> None:
    """SIGKILL of a whole worker frees what it holds after the TTL, and what is to stay taken when its time is over."""
    made = new_project(**SETTINGS)
    victim = made.worker("-P", "prefork", "-c", "2")
    made.send("lasts", 0)
    made.send("fails", 0, 600.0)
    until(lambda: len(made.runs()) == 2, "both starts")
    victim.kill()
    made.worker("-P", "solo")
    assert made.send("lasts", 1).get(timeout=BOUND) == 1
    (gap,) = gaps(made.runs("lasts"))
    assert gap > LEAST - SLACK


@pytest.mark.parametrize(("pool", "nap"), [("prefork", 600.0), ("threads", 0.05), ("solo", 600.0)])
def test_a_body_that_hangs_is_ended(pool: str, nap: float, request: pytest.FixtureRequest) -> None:
    """LockLost that names the option, inside the body; the lock is free then, and `on_lost="retry"` begins anew."""
    if pool == "solo":
        made = request.getfixturevalue("new_project")(**SETTINGS)
        made.worker("-P", "solo")
    else:
        made = request.getfixturevalue("forking" if pool == "prefork" else "threading")
    hung = made.send("hangs", 0, nap)
    with pytest.raises(LockLost, match=f"lock_at_most_for={MOST}"):
        hung.get(timeout=BOUND)
    assert made.send("hangs_retried", 1, nap).get(timeout=BOUND) == 1
    (run,) = made.runs("hangs")
    assert run.how == "LockLost"
    assert run.ended - run.started > MOST - SLACK
    assert [run.how for run in made.runs("hangs_retried")] == ["LockLost", "returned"]
    assert not made.keys("locks/hangs/")


def test_a_body_that_is_only_warned_goes_on(forking: Project) -> None:
    """`on_lost="warn"`: it returns in its own time, and the log has said that its lock was lost."""
    late = forking.send("late_warned", 7, MOST + 2 * SLACK)
    assert late.get(timeout=BOUND) == 7
    (said,) = [line for line in forking.workers[0].output.splitlines() if f"late_warned[{late.id}] has lost" in line]
    assert f"lock_at_most_for={MOST}" in said


def test_a_body_that_nothing_can_end_is_passed_by(threading: Project) -> None:
    """A thread in one long call: the next begins a grace after the loss, the log says both, and the first one ends."""
    stuck = threading.send("stuck", 0, MOST + GRACE + 5)
    until(lambda: threading.runs("stuck"), "the start")
    following = threading.send("stuck", 1, 0.1)
    assert following.get(timeout=BOUND) == 1
    with pytest.raises(LockLost, match=f"lock_at_most_for={MOST}"):
        stuck.get(timeout=BOUND)
    first, second = threading.runs("stuck")
    assert overlaps([first, second]), "it had not come back"
    assert second.token > first.token
    assert second.started - first.started > MOST + GRACE - SLACK
    said = threading.workers[0].output
    assert said.index(f"stuck[{stuck.id}] has lost its lock") < said.index("etcd_lock.expelled")
    assert "stuck" in said[said.index("etcd_lock.expelled") :].splitlines()[0]
