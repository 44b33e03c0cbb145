"""Containers of these tests, what is done to them, and what the tasks in them wrote down."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest

# Test modules take what they need of pytest-celery from here, and so end here where it is not.
pytest.importorskip("pytest_celery", reason="make smoke runs these, in a virtualenv that has pytest-celery")

from pytest_celery import (
    CeleryTestContainer,
    CeleryTestNode,
    CeleryTestSetup,
    CeleryTestWorker,
    CeleryWorkerCluster,
    RedisContainer,
)

from celery_etcd_lock.etcd.api import KeyValue, Range, prefix_end
from celery_etcd_lock.testing.pytest_celery import EtcdLockWorkerContainer, EtcdTestNode
from tests.smoke.tasks import RECORD
from tests.workers import until

__all__ = [
    "BEAT_TTL",
    "TTL",
    "BeatContainer",
    "CeleryTestNode",
    "CeleryTestSetup",
    "CeleryTestWorker",
    "CeleryWorkerCluster",
    "Fleet",
    "Note",
    "OtherWorkerContainer",
    "QuietRedisContainer",
    "WorkerContainer",
]

TTL = 5
"""Seconds for which a dead worker holds its locks."""
BEAT_TTL = 6
"""Seconds after which a dead beat is followed."""


class QuietRedisContainer(RedisContainer):
    @classmethod
    def image(cls) -> str:
        return "redis:7"


class WorkerContainer(EtcdLockWorkerContainer):
    """Takes messages of its own queue only, so that a test chooses who runs what."""

    @classmethod
    def worker_name(cls) -> str:
        return cls.worker_queue()

    @classmethod
    def worker_queue(cls) -> str:
        return "one"

    @classmethod
    def command(cls, *args: str, **kwargs: Any) -> list[str]:
        apart = ["--concurrency=2", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        command: list[str] = super().command(*apart, *args, **kwargs)
        return command


class OtherWorkerContainer(WorkerContainer):
    @classmethod
    def worker_queue(cls) -> str:
        return "other"


class BeatContainer(EtcdLockWorkerContainer):
    """A beat of the same image, settings and environment."""

    @classmethod
    def command(cls, *args: str, **kwargs: Any) -> list[str]:
        return ["celery", "-A", "app", "beat", "-S", "etcd_lock", "-l", "INFO", "-s", "/tmp/schedule", *args]

    @property
    def ready_prompt(self) -> str:
        return "beat: Starting..."


@dataclass(frozen=True)
class Note:
    """One line that a task wrote down."""

    what: str
    host: str
    mark: str = ""
    token: int = 0
    counter: str = ""
    due: str = ""
    id: str = ""


class Fleet:
    """What runs in one test, as the test sees it."""

    def __init__(self, setup: CeleryTestSetup, etcd: EtcdTestNode, network: Any) -> None:
        self.setup = setup
        self.etcd = etcd
        self._network = network
        self.store: Any = setup.backend.container.client

    def close(self) -> None:
        self.store.close()

    def notes(self, *what: str, mark: str = "") -> list[Note]:
        """What tasks wrote down, in its order, of these kinds, of this mark if there is one."""
        lines = self.store.lrange(RECORD, 0, -1)
        notes = [Note(**json.loads(line)) for line in lines]
        return [note for note in notes if note.what in what and (not mark or note.mark == mark)]

    def await_note(self, what: str, mark: str, *, seconds: float = 60) -> Note:
        until(lambda: self.notes(what, mark=mark), f"{what} by {mark}", seconds=seconds)
        return self.notes(what, mark=mark)[0]

    def let_go(self, mark: str) -> None:
        self.store.set(f"go {mark}", 1)

    def keys(self, prefix: str) -> list[KeyValue]:
        """What etcd has under `prefix`, oldest first."""
        with closing(self.etcd.container.client) as transport:
            reply = transport.range(Range(prefix, range_end=prefix_end(prefix)))
        return sorted(reply.kvs, key=lambda kv: kv.create_revision)

    def logged_at(self, node: CeleryTestNode, *texts: str) -> str:
        """When `node` first logged a line with all these `texts`; by the engine's clock, which is one for all nodes."""

        def line() -> str:
            lines = _docker_container(node.container).logs(timestamps=True).decode(errors="replace").splitlines()
            return next((line for line in lines if all(text in line for text in texts)), "")

        return str(until(line, f"{texts} in the log of {node.name()}")).partition(" ")[0]

    def strike(self, node: CeleryTestNode, what: Callable[[Any], object]) -> None:
        """Do `what` to Docker's own container of `node`."""
        what(_docker_container(node.container))

    def disconnect(self, node: CeleryTestNode) -> None:
        """Take its network away: nothing it sends arrives, and nothing reaches it."""
        self.strike(node, self._network.disconnect)

    def reconnect(self, node: CeleryTestNode) -> None:
        self.strike(node, self._network.connect)


def _docker_container(container: CeleryTestContainer) -> Any:
    return container._container
