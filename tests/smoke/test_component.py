"""The fixture set itself, with one worker: what `celery_etcd_lock.testing.pytest_celery` promises."""

from __future__ import annotations

import pytest

from celery_etcd_lock.testing import held_elsewhere
from tests.smoke.fleet import CeleryTestSetup, CeleryTestWorker, CeleryWorkerCluster, Fleet
from tests.smoke.tasks import once


@pytest.fixture
def celery_worker_cluster(celery_worker: CeleryTestWorker) -> CeleryWorkerCluster:
    return CeleryWorkerCluster(celery_worker)


def test_worker_and_test_lock_in_the_same_etcd(celery_setup: CeleryTestSetup, fleet: Fleet) -> None:
    """The worker knows etcd's address, is kept out by a lock that the test holds, and the test's own marks stand."""
    assert celery_setup.worker.container.env["CELERY_ETCD_LOCK_ENDPOINTS"] == fleet.etcd.config()["url"]
    assert celery_setup.ready(ping=True, control=True)
    queue = celery_setup.worker.worker_queue
    assert once.apply_async(("free",), queue=queue).get(60) == "run"
    with held_elsewhere(once, "taken"):
        assert once.apply_async(("taken",), queue=queue).get(60) == "skipped"
    assert once.apply_async(("taken",), queue=queue).get(60) == "run"
    first = once.apply_async(("queued",), queue="nobody's")
    assert once.apply_async(("queued",), queue=queue).id == first.id
    assert [kv.key for kv in fleet.keys("/celery/queued/")], "the mark is in the etcd of this test"
