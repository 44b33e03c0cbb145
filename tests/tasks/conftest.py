"""A real broker, a real etcd, and real worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from celery_etcd_lock.testing import EtcdServer
from tests.servers import RedisNotFound, RedisServer, skip_or_fail
from tests.workers import Project, project


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    """One real Redis for the whole run, as broker and result backend; each project has a queue of its own."""
    try:
        server = RedisServer()
    except RedisNotFound as missing:
        skip_or_fail(missing)
    with server:
        yield server


@pytest.fixture
def new_project(redis: RedisServer, etcd: EtcdServer, tmp_path: Path) -> Iterator[Callable[..., Project]]:
    """Makes projects on the shared servers, or on the etcd that is given; settings as for ``app.conf``."""
    with ExitStack() as stack:

        def new(etcd_url: str = etcd.url, **settings: Any) -> Project:
            return stack.enter_context(project(redis.url, etcd_url, tmp_path, **settings))

        yield new
