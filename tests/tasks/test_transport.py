"""Real workers of every pool that talk to etcd over gRPC, by a channel of their own and by a project's client."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Range
from celery_etcd_lock.exceptions import EtcdLockError
from celery_etcd_lock.testing import EtcdServer
from tests.workers import Project, overlaps

NewProject = Callable[..., Project]


def runs_them_all_and_ends(project: Project, *pool: str) -> None:
    """40 messages of one key that retry and wait: each runs, none beside another of its task; then a warm shutdown."""
    worker = project.worker(*pool)
    results = [project.send(("retrying", "waiting")[number % 2], number, 0.02) for number in range(40)]
    assert sorted(result.get(timeout=120) for result in results) == list(range(40))
    for task in ("retrying", "waiting"):
        runs = project.runs(task)
        assert len(runs) == 20
        assert overlaps(runs) == []
        tokens = [run.token for run in runs]
        assert tokens == sorted(set(tokens))
    assert worker.stop(signal.SIGTERM) == 0
    assert "Traceback" not in worker.output


@pytest.fixture(scope="module")
def only_grpc() -> Iterator[EtcdServer]:
    """An etcd without its gateway: what works there went over gRPC."""
    with EtcdServer(extra_args=["--enable-grpc-gateway=false"]) as server:
        with closing(connect(server.url)) as gateway, pytest.raises(EtcdLockError):
            gateway.range(Range("a"))
        yield server


@pytest.mark.parametrize("pool", [("prefork", "4"), ("threads", "8"), ("gevent", "8")], ids=lambda pool: pool[0])
def test_every_pool_over_grpc(new_project: NewProject, only_grpc: EtcdServer, pool: tuple[str, str]) -> None:
    """Locks are taken, one at a time, and none is left in etcd, nor a session, when the worker has ended."""
    project = new_project(only_grpc.url, etcd_lock_transport="grpc", etcd_lock_ttl=60)
    runs_them_all_and_ends(project, "-P", pool[0], "-c", pool[1])
    assert not project.keys("locks/") + project.keys("sessions/")


LENDER = """
import os, warnings
warnings.simplefilter("ignore")
import etcd3

def client():
    with open(os.environ["LENT"], "a") as lent:
        print(os.getpid(), file=lent)
    host, _, port = os.environ["ETCD_URL"].rpartition("/")[2].rpartition(":")
    return etcd3.client(host=host, port=int(port), timeout=5)
"""


def test_a_client_is_lent_to_each_child(
    new_project: NewProject,
    only_grpc: EtcdServer,
    with_etcd3: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a real etcd3 and prefork: once in each child that locks, and never in the parent, which has one apart."""
    for name, value in with_etcd3.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "lender.py").write_text(LENDER)
    lent = tmp_path / "lent"
    monkeypatch.setenv("LENT", str(lent))
    project = new_project(only_grpc.url, etcd_lock_endpoints=None, etcd_lock_client="lender.client", etcd_lock_ttl=60)
    runs_them_all_and_ends(project, "-P", "prefork", "-c", "2")
    pids = [int(line) for line in lent.read_text().split()]
    assert sorted(set(pids)) == sorted(pids)
    assert set(pids) >= {run.pid for run in project.runs()}
    assert project.workers[0].process.pid not in pids
    assert not project.keys("locks/") + project.keys("sessions/")


def test_a_client_that_cannot_be_imported_stops_the_worker(
    new_project: NewProject, with_etcd3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one clean line that says why, and before the first task."""
    monkeypatch.setenv("PYTHONPATH", with_etcd3["PYTHONPATH"])
    (tmp_path / "lender.py").write_text(LENDER)
    for path, says in (("lender.client", "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python"), ("lender.clinet", "clinet")):
        project = new_project(etcd_lock_endpoints=None, etcd_lock_client=path)
        worker = project.worker("-P", "solo", ready=False)
        assert worker.process.wait(60) != 0
        assert f"Error: {path} cannot be imported: " in worker.output
        assert says in worker.output
        assert "Traceback" not in worker.output
