"""Fixtures for the tests of projects that use this package; pytest finds them by itself once it is installed.

``etcd_server``       a real etcd for the whole test run, at ``etcd_server.url``. `EtcdNotFound` says what to install.
``etcd_lock_memory``  for one test, every app of the process locks in memory: no etcd is needed.

To hold a task's lock from a test, in either: ``with held_elsewhere(task, *args): …`` of `celery_etcd_lock.testing`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    # Not at run time: pytest imports this module in every project that has the package.
    from celery_etcd_lock.etcd.memory import MemoryEtcd
    from celery_etcd_lock.testing import EtcdServer


@pytest.fixture(scope="session")
def etcd_server() -> Iterator[EtcdServer]:
    """A real etcd of this test run; see `celery_etcd_lock.testing.EtcdServer`."""
    from celery_etcd_lock.testing import EtcdServer

    with EtcdServer() as server:
        yield server


@pytest.fixture
def etcd_lock_memory() -> Iterator[MemoryEtcd]:
    """Locks in memory for this test; see `celery_etcd_lock.testing.memory_locks`."""
    from celery_etcd_lock.testing import memory_locks

    with memory_locks() as store:
        yield store
