"""Two workers in two containers: they exclude each other, also when one is paused, cut off or killed."""

from __future__ import annotations

import time
from operator import methodcaller
from typing import Any

import pytest

from tests.smoke.fleet import TTL, CeleryTestWorker, Fleet
from tests.smoke.tasks import count_alone, count_beside, write
from tests.workers import until

COUNTS = 12


@pytest.fixture
def one(fleet: Fleet) -> CeleryTestWorker:
    return fleet.setup.worker_cluster[0]


@pytest.fixture
def other(fleet: Fleet) -> CeleryTestWorker:
    return fleet.setup.worker_cluster[1]


def send(task: Any, worker: CeleryTestWorker, *args: str) -> Any:
    return task.apply_async(args, queue=worker.worker_queue)


def test_two_containers_exclude_each_other(fleet: Fleet, one: CeleryTestWorker, other: CeleryTestWorker) -> None:
    """No count is lost with the lock, though both take part; without it some are: they do run beside each other."""
    for task, counter in ((count_beside, "beside"), (count_alone, "alone")):
        for result in [send(task, worker, counter) for worker in (one, other) * (COUNTS // 2)]:
            result.get(60)
        hosts = {note.host for note in fleet.notes("counted") if note.counter == counter}
        assert len(hosts) == 2, f"{counter}: only {hosts} took part"
    assert int(fleet.store.get("beside")) < COUNTS
    assert int(fleet.store.get("alone")) == COUNTS


def test_a_paused_worker_is_followed_and_its_write_refused(
    fleet: Fleet, one: CeleryTestWorker, other: CeleryTestWorker
) -> None:
    """Another runs meanwhile; when it is awake again it hears that its lock is lost, and what it writes is refused."""
    paused = send(write, one, "row", "paused")
    before = fleet.await_note("began", "paused")
    fleet.strike(one, methodcaller("pause"))
    try:
        after = send(write, other, "row", "after")
        began = fleet.await_note("began", "after")
        fleet.let_go("after")
        assert after.get(60) == "after"
    finally:
        fleet.strike(one, methodcaller("unpause"))
    fleet.await_note("refused", "paused")
    assert began.token > before.token
    assert fleet.notes("lost", mark="paused")
    assert fleet.notes("written", mark="after")
    assert fleet.store.hget("row row", "by") == "after"
    until(lambda: paused.state == "FAILURE", "the end of the task that lost its lock")
    assert type(paused.result).__name__ == "LockLost"


def test_a_worker_that_is_cut_off_knows_before_another_runs_and_is_of_use_again(
    fleet: Fleet, one: CeleryTestWorker, other: CeleryTestWorker
) -> None:
    """It knows by itself that its lock is lost; when its network is back it runs tasks, and locks, as before."""
    send(write, one, "row", "cut off")
    fleet.await_note("began", "cut off")
    after = send(write, other, "row", "after")
    until(lambda: after.state == "RETRY", "the other's wait")
    fleet.disconnect(one)
    fleet.await_note("began", "after")
    assert fleet.logged_at(one, "etcd_lock.lost") < fleet.logged_at(other, "began after")
    assert fleet.logged_at(one, "gave up cut off")
    fleet.reconnect(one)
    fleet.let_go("after")
    assert after.get(60) == "after"
    back = send(write, one, "row", "back")
    fleet.await_note("began", "back", seconds=120)
    contender = send(write, other, "row", "contender")
    until(lambda: contender.state == "RETRY", "the other's wait for the lock of the one that is back")
    assert one.container.attrs["Config"]["Hostname"] in str(contender.info), "whom it waits for"
    for mark, result in (("back", back), ("contender", contender)):
        fleet.let_go(mark)
        assert result.get(60) == mark


def test_a_killed_worker_is_followed_within_the_ttl(
    fleet: Fleet, one: CeleryTestWorker, other: CeleryTestWorker
) -> None:
    """Nobody gives its locks back: they are free when its lease ends, and the next runs."""
    send(write, one, "row", "killed")
    before = fleet.await_note("began", "killed")
    after = send(write, other, "row", "after")
    until(lambda: after.state == "RETRY", "the other's wait")
    killed = time.monotonic()
    one.kill()
    assert not fleet.notes("began", mark="after")
    began = fleet.await_note("began", "after")
    assert time.monotonic() - killed < 5 * TTL
    assert began.token > before.token
    fleet.let_go("after")
    assert after.get(60) == "after"
    assert not fleet.notes("written", mark="killed")
