"""What a run costs etcd: counted by etcd, of a real worker."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from celery_etcd_lock.testing import EtcdServer
from tests.workers import Project

NewProject = Callable[..., Project]

RUNS = 30


@pytest.fixture(scope="module")
def own() -> Iterator[EtcdServer]:
    """An etcd whose requests nobody else makes."""
    with EtcdServer() as server:
        yield server


def requests(server: EtcdServer) -> Counter[str]:
    found = re.findall(r'^grpc_server_started_total\{grpc_method="(\w+)",.*\} (\d+)$', server.metrics(), re.MULTILINE)
    return Counter({method: int(number) for method, number in found if int(number)})


@pytest.mark.parametrize(
    ("task", "txns"),
    [
        pytest.param("early", 2, id="taken and given back"),
        pytest.param("late", 3, id="acks_late: and marked as done"),
    ],
)
def test_a_run_that_nobody_is_in_the_way_of(
    new_project: NewProject, etcd: EtcdServer, own: EtcdServer, task: str, txns: int
) -> None:
    """So many transactions and nothing else, but for renewals, which are the session's."""
    project = new_project(own.url, imports=["delivered_twice"], etcd_lock_ttl=60)
    project.worker("-P", "solo")
    project.send(task, 0, 0.0).get(timeout=60)  # opens the session
    before = requests(own)
    for number in range(RUNS):
        project.send(task, number, 0.0).get(timeout=60)
    project.workers[-1].stop()
    spent = requests(own) - before
    del spent["LeaseKeepAlive"], spent["LeaseRevoke"], spent["LeaseTimeToLive"]
    assert spent["Txn"] in {txns * RUNS, txns * RUNS + txns - 2}, "the first run's mark may come late"
    assert set(spent) <= {"Txn", "LeaseGrant"}
    assert spent["LeaseGrant"] <= 1, "that of all the marks"
