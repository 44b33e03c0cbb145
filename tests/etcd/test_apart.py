"""A transport in a process apart."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import psutil
import pytest

from celery_etcd_lock.etcd.apart import Apart
from celery_etcd_lock.etcd.api import Delete, Put, Range, Txn, Watch
from celery_etcd_lock.exceptions import EtcdUnavailable, LeaseNotFound
from celery_etcd_lock.testing import EtcdServer


@pytest.fixture(scope="module")
def apart(etcd: EtcdServer) -> Iterator[Apart]:
    pytest.importorskip("grpc")
    opened = Apart({"endpoints": (etcd.url,), "transport": "grpc"})
    yield opened
    opened.close()
    opened.close()


def test_its_verbs_answer_as_any_transport_does(apart: Apart, etcd: EtcdServer, prefix: str) -> None:
    """Values and errors come through as they are; what it does not do it says."""
    assert apart.endpoints == (etcd.url,)
    granted = apart.lease_grant(60)
    assert apart.txn(Txn([], [Put(prefix + "a", b"1", granted.lease)])).succeeded
    assert apart.lease_renew(granted.lease).ttl == 60
    assert apart.lease_time_to_live(granted.lease, keys=True).keys == (prefix + "a",)
    assert apart.range(Range(prefix + "a")).kvs[0].value == b"1"
    assert apart.delete(Delete(prefix + "a")).deleted == 1
    apart.lease_revoke(granted.lease)
    with pytest.raises(LeaseNotFound):
        apart.lease_revoke(granted.lease)
    assert apart.status()[0].endpoint == etcd.url
    with pytest.raises(NotImplementedError):
        apart.watch(Watch(prefix))


def test_this_process_has_no_grpc_of_its_own_and_one_more_beside_it(apart: Apart) -> None:
    """The process apart is a child, made once; if it is killed the call says so, and the next starts another."""
    apart.status()
    (child,) = [each for each in psutil.Process().children() if "etcd.apart" in " ".join(each.cmdline())]
    apart.status()
    child.kill()
    child.wait()
    with pytest.raises(EtcdUnavailable, match="has ended"):
        apart.status()
    assert apart.status()
    assert threading.current_thread() is threading.main_thread()
    assert os.getpid() != child.pid


def test_it_ends_with_its_user(apart: Apart) -> None:
    """Closing ends the process."""
    apart.status()
    (child,) = [each for each in psutil.Process().children() if "etcd.apart" in " ".join(each.cmdline())]
    apart.close()
    assert not child.is_running()
