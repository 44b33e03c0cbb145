"""The project that workers run and clients publish to: one task of each kind, all with the same body.

From the environment: BENCH_BROKER, BENCH_ETCD, BENCH_WIRE, BENCH_QUEUE, BENCH_RECORD (where starts are noted), and
BENCH_TASKS: which kinds there are, besides the plain one: ``ours``, ``peers``, both or none.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery

from benchmarks.contenders import floor

BROKER = os.environ["BENCH_BROKER"]
QUEUE = os.environ["BENCH_QUEUE"]
TTL = 30
"""Seconds: of the session, and of the peers' locks."""

app = Celery("bench", broker=BROKER, backend=BROKER, set_as_current=False)
app.conf.update(
    task_default_queue=QUEUE,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    etcd_lock_endpoints=os.environ.get("BENCH_ETCD", ""),
    etcd_lock_transport=os.environ.get("BENCH_WIRE", "gateway"),
    etcd_lock_namespace=QUEUE,
    etcd_lock_ttl=TTL,
    ONCE={"backend": "celery_once.backends.Redis", "settings": {"url": f"{BROKER}/0", "default_timeout": TTL}},
    singleton_backend_url=BROKER,
    singleton_lock_expiry=TTL,
)


def nothing(number: int) -> int:
    """The body of all of them."""
    return number


def holds(key: str, seconds: float) -> None:
    """A body that takes its time, and says when it began, and where."""
    line = json.dumps({"key": key, "pid": os.getpid(), "at": time.monotonic()})
    with Path(os.environ["BENCH_RECORD"]).open("a") as record:
        record.write(line + "\n")
    time.sleep(seconds)


app.task(name="plain", shared=False)(nothing)


_takes: dict[str, Callable[[str], Callable[[], object]]] = {}
"""By wire, made in the child that runs."""


def bare_pair(number: int, wire: str) -> int:
    """A body that sends the floor's pair of requests, and does nothing else."""
    if wire not in _takes:
        over = floor.over_grpc if wire == "grpc" else floor.over_gateway
        _takes[wire] = over(os.environ["BENCH_ETCD"], 3600)
    _takes[wire](f"/bare/{number}")()
    return number


app.task(name="bare_pair", shared=False)(bare_pair)

kinds = os.environ.get("BENCH_TASKS", "ours,peers").split(",")

if "peers" in kinds:
    from celery_heimdall import HeimdallTask
    from celery_once import QueueOnce
    from celery_singleton import Singleton

    peers: dict[str, dict[str, Any]] = {
        "once": {"base": QueueOnce, "once": {"graceful": True}},
        "singleton": {"base": Singleton, "lock_expiry": TTL},
        "heimdall": {"base": HeimdallTask, "heimdall": {"unique": True, "unique_timeout": TTL}},
    }
    for name, options in peers.items():
        app.task(name=name, shared=False, **options)(nothing)
        app.task(name=f"{name}_holds", shared=False, **options)(holds)

if "ours" in kinds:
    from celery_etcd_lock import Conflict, SingletonTask

    app.task(name="ours", shared=False, base=SingletonTask)(nothing)
    app.task(
        name="ours_holds", shared=False, base=SingletonTask, unique_on="key", on_conflict=Conflict.wait(timeout=60)
    )(holds)
