"""The real etcd that tests share, and names of their own in it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from celery_etcd_lock.testing import EtcdNotFound, EtcdServer, find_etcd
from tests.servers import etcd3_environment


@pytest.fixture(scope="session")
def etcd() -> Iterator[EtcdServer]:
    """One real etcd for the whole run; whoever pauses or stops it uses a server of its own instead."""
    try:
        find_etcd()
    except EtcdNotFound as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    with EtcdServer() as server:
        yield server


@pytest.fixture(scope="session")
def with_etcd3() -> dict[str, str]:
    """The environment of a process that can import the real ``etcd3``."""
    return etcd3_environment()


@pytest.fixture
def prefix() -> str:
    """A part of the shared etcd's keys that is this test's alone."""
    return f"/test/{uuid.uuid4().hex}/"
