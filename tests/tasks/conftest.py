"""A real broker, a real etcd, and real worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from celery_etcd_lock.testing import EtcdServer
from tests.rabbit import RabbitNotFound, RabbitServer
from tests.servers import RedisServer, skip_or_fail
from tests.workers import Project, project


@pytest.fixture(scope="session")
def rabbit() -> Iterator[RabbitServer]:
    """One real RabbitMQ for the whole run, as the broker of those who name it: ``new_project(broker=rabbit.url)``.

    Under ``CI`` a missing one fails, unless ``WITHOUT_RABBITMQ`` says why it could not be had.
    """
    try:
        server = RabbitServer()
    except RabbitNotFound as missing:
        if reason := os.environ.get("WITHOUT_RABBITMQ"):
            pytest.skip(f"{missing}: {reason}")
        skip_or_fail(missing)
    with server:
        yield server


@pytest.fixture
def new_project(redis: RedisServer, etcd: EtcdServer, tmp_path: Path) -> Iterator[Callable[..., Project]]:
    """Makes projects on the shared servers, or on the etcd or the broker that is given; settings as for ``app.conf``.

    Results are in Redis, whatever the broker.
    """
    with ExitStack() as stack:

        def new(etcd_url: str = etcd.url, *, broker: str = "", **settings: Any) -> Project:
            return stack.enter_context(
                project(broker or redis.url, etcd_url, tmp_path, backend_url=redis.url, **settings)
            )

        yield new
