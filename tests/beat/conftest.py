"""Benches, and beats as processes: see `bench.py`, `beats.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from celery_etcd_lock.testing import EtcdServer
from tests.beat.beats import Beats
from tests.beat.bench import Bench
from tests.servers import RedisServer
from tests.workers import collect_garbage


@pytest.fixture
def new_bench(redis: RedisServer, etcd: EtcdServer) -> Iterator[Callable[..., Bench]]:
    """Makes benches for a schedule, on the shared servers or those that are given; settings as for ``app.conf``."""
    with ExitStack() as stack:

        def new(
            schedule: dict[str, Any], *, etcd_url: str = etcd.url, redis_url: str = redis.url, **settings: Any
        ) -> Bench:
            return stack.enter_context(closing(Bench(redis_url, etcd_url, schedule, settings)))

        yield new
    collect_garbage()


@pytest.fixture
def new_beats(redis: RedisServer, etcd: EtcdServer, tmp_path: Path) -> Iterator[Callable[..., Beats]]:
    """Makes projects for beats as processes, on the shared servers; settings as for ``app.conf``."""
    with ExitStack() as stack:

        def new(etcd_url: str = etcd.url, **settings: Any) -> Beats:
            return stack.enter_context(Beats(redis.url, etcd_url, tmp_path, settings))

        yield new
