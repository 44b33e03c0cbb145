"""What a run is played on: the servers, and how large its samples are."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version

import psutil

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.testing import EtcdServer
from tests.costs import processor
from tests.servers import RedisServer

__all__ = ["SMOKE", "Sizes", "Stage", "machine", "say"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of each."""

    rounds: int = 40
    close_rounds: int = 120
    """Of contests where a few hundredths count."""
    pairs: int = 25
    """Of lock and unlock in one block."""
    hand_overs: int = 60
    calls: int = 40
    """``delay()`` in one block."""
    results: int = 12
    """Calls whose result is waited for, in one block."""
    deaths: int = 5
    patience: float = 45.0
    """Seconds for which peers are waited for after a death."""
    imports: int = 15
    taken: int = 20_000
    held: tuple[int, ...] = (1, 10, 100, 1_000, 10_000)
    waiters: tuple[int, ...] = (2, 10, 50, 200, 500)
    sessions: tuple[int, ...] = (1, 10, 50, 100, 200)
    key_bytes: tuple[int, ...] = (20, 100, 500, 2_000, 8_000)
    threads: tuple[int, ...] = (1, 2, 4, 8, 16)
    crowd_seconds: float = 2.0
    growth_rounds: int = 20


SMOKE = Sizes(
    rounds=2, close_rounds=2, pairs=3, hand_overs=2, calls=3, results=2, deaths=1, patience=0.0, imports=1, taken=50,
    held=(1, 10), waiters=(2, 4), sessions=(1, 4), key_bytes=(20, 500), threads=(1, 2), crowd_seconds=0.2,
    growth_rounds=2,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stage:
    """The servers. `etcd` is as it is run for real: it writes to disk before it answers. `quick_etcd` does not wait."""

    etcd: EtcdServer
    quick_etcd: EtcdServer
    redis: RedisServer
    sizes: Sizes

    @classmethod
    @contextmanager
    def opened(cls, sizes: Sizes) -> Iterator[Stage]:
        """With servers of its own."""
        with EtcdServer(fsync=True) as etcd, EtcdServer() as quick, RedisServer() as redis:
            yield cls(etcd, quick, redis, sizes)


def machine(stage: Stage) -> dict[str, str | int]:
    """What and when: date, processor, versions."""
    transport = connect(stage.etcd.url)
    (status,) = transport.status()
    transport.close()
    packages = ["celery-etcd-lock", "celery", "kombu", "redis", "grpcio", "protobuf", "urllib3", "etcd3", "etcd3gw"]
    packages += ["celery-once", "celery-singleton", "celery-heimdall"]
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "cpu": processor(),
        "cpus": os.cpu_count() or 0,
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "etcd": status.version,
        **{name: version(name) for name in packages},
    }


def say(what: str) -> None:
    """Tell whoever watches how far it is."""
    print(what, file=sys.stderr, flush=True)


def dump(value: object) -> str:
    """As the raw data are written."""
    return json.dumps(value, separators=(",", ":"))
