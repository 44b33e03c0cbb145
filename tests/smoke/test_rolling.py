"""A rolling deploy: a worker of an earlier image and one of this, old Celery and new, on one etcd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.smoke.fleet import CeleryTestWorker, CeleryWorkerCluster, Fleet
from tests.smoke.tasks import count_alone, write
from tests.workers import until

COUNTS = 12


def await_put_back(result: Any) -> None:
    until(lambda: result.state == "RETRY", "the wait")


@pytest.fixture
def celery_worker_cluster(
    celery_worker: CeleryTestWorker, celery_old_worker: CeleryTestWorker
) -> Iterator[CeleryWorkerCluster]:
    cluster = CeleryWorkerCluster(celery_worker, celery_old_worker)
    yield cluster
    cluster.teardown()


def test_old_and_new_exclude_each_other(fleet: Fleet) -> None:
    """Each is kept out by the other, and knows who it is; no count is lost between them."""
    new, old = fleet.setup.worker_cluster
    assert "v5.4.0 (" in old.logs()
    assert "v5.4.0 (" not in new.logs()
    for holder, contender in ((old, new), (new, old)):
        name = holder.hostname()
        held = write.apply_async((name, f"held by {name}"), queue=holder.worker_queue)
        fleet.await_note("began", f"held by {name}")
        waits = write.apply_async((name, f"waits for {name}"), queue=contender.worker_queue)
        await_put_back(waits)
        assert holder.container.attrs["Config"]["Hostname"] in str(waits.info), "whom it waits for"
        assert not fleet.notes("began", mark=f"waits for {name}")
        for mark, result in ((f"held by {name}", held), (f"waits for {name}", waits)):
            fleet.let_go(mark)
            assert result.get(60) == mark
        first, second = fleet.notes("written")[-2:]
        assert second.token > first.token
    counts = [count_alone.apply_async(("mixed",), queue=worker.worker_queue) for worker in (new, old) * (COUNTS // 2)]
    for count in counts:
        count.get(60)
    assert int(fleet.store.get("mixed")) == COUNTS
    assert len({note.host for note in fleet.notes("counted")}) == 2
