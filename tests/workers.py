"""Real Celery workers as processes, and what their tasks wrote down."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery import Celery
from celery.result import AsyncResult

from celery_etcd_lock.etcd import Transport, connect
from celery_etcd_lock.etcd.api import KeyValue, Range, prefix_end

__all__ = ["Project", "Run", "Worker", "close_app", "collect_garbage", "overlaps", "until"]

_HERE = Path(__file__).parent


def until(condition: Callable[[], Any], what: str = "it", *, seconds: float = 60) -> Any:
    """Wait until `condition` gives something true, and return that; fail if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come to pass within {seconds} s"
        time.sleep(0.02)
    return value


@dataclass(frozen=True)
class Run:
    """One run of a body."""

    id: str
    number: int
    pid: int
    token: int
    key: str
    started: float
    ended: float = float("inf")
    """Infinite: it was killed, or still runs."""
    how: str = "killed"
    task: str = ""


def overlaps(runs: list[Run]) -> list[tuple[Run, Run]]:
    """The pairs of runs that were inside at the same time."""
    ordered = sorted(runs, key=lambda run: run.started)
    return [(one, two) for i, one in enumerate(ordered) for two in ordered[i + 1 :] if two.started < one.ended]


class Worker:
    """One ``celery worker``, with its children."""

    def __init__(self, environment: dict[str, str], log: Path, arguments: list[str], *, ready: bool = True) -> None:
        self.log = log
        self._handle = log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "project", "worker", "-l", "INFO", "--without-gossip",
             "--without-mingle", "--without-heartbeat", "-n", f"w{uuid.uuid4().hex[:8]}@test", *arguments],
            env=environment, cwd=log.parent, stdout=self._handle, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        if ready:
            self.await_ready()

    def await_ready(self) -> None:
        """Wait until it takes messages; fail, with what it said, if it ended instead."""
        until(lambda: " ready." in self.output or self.process.poll() is not None, "the worker's start")
        assert self.process.poll() is None, self.output

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end, and wait for that."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def kill(self) -> None:
        """SIGKILL to it and all its children at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)
        self._handle.close()


@dataclass
class Project:
    """The project in `tests/tasks/project.py`, on one broker, one etcd and a queue of its own."""

    broker_url: str
    etcd_url: str
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    queue: str = field(default_factory=lambda: f"q{uuid.uuid4().hex}")
    workers: list[Worker] = field(default_factory=list)
    backend_url: str = ""
    """Empty: the broker."""

    def __post_init__(self) -> None:
        self.backend_url = self.backend_url or self.broker_url
        self.settings = {"etcd_lock_namespace": self.queue, **self.settings}
        self.record = self.folder / f"{self.queue}.jsonl"
        self.app = Celery("client", broker=self.broker_url, backend=self.backend_url, set_as_current=False)
        self.app.conf.task_default_queue = self.queue

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(_HERE.parent), str(_HERE / "tasks"), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "BROKER_URL": self.broker_url,
            "BACKEND_URL": self.backend_url,
            "ETCD_URL": self.etcd_url,
            "QUEUE": self.queue,
            "RECORD": str(self.record),
            "SETTINGS": json.dumps(self.settings),
        }

    def worker(self, *arguments: str, ready: bool = True, settings: dict[str, Any] | None = None) -> Worker:
        """Start a worker; with prefork and 4 children unless `arguments` say otherwise. `settings`: of it alone."""
        log = self.folder / f"worker-{self.queue}-{len(self.workers)}.log"
        environment = {**self.environment, "SETTINGS": json.dumps({**self.settings, **(settings or {})})}
        worker = Worker(environment, log, list(arguments or ("-P", "prefork", "-c", "4")), ready=ready)
        self.workers.append(worker)
        return worker

    def send(self, task: str, *args: Any, **kwargs: Any) -> AsyncResult[Any]:
        """Publish a message, by name."""
        return self.app.send_task(task, args, kwargs)

    def runs(self, task: str | None = None) -> list[Run]:
        """What the bodies wrote down, in the order of their starts."""
        runs: dict[tuple[str, int, float], Run] = {}
        latest: dict[tuple[str, int], tuple[str, int, float]] = {}
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        for line in lines:
            entry = json.loads(line)
            if task is not None and entry["task"] != task:
                continue
            who = (entry["id"], entry["pid"])
            if entry["event"] == "start":
                latest[who] = (*who, entry["at"])
                runs[latest[who]] = Run(
                    entry["id"], entry["number"], entry["pid"], entry["token"], entry["key"], entry["at"],
                    task=entry["task"],
                )  # fmt: skip
            else:
                begun = runs[latest[who]]
                runs[latest[who]] = Run(
                    begun.id, begun.number, begun.pid, begun.token, begun.key, begun.started,
                    entry["at"], entry["ended"], begun.task,
                )  # fmt: skip
        return sorted(runs.values(), key=lambda run: run.started)

    def connect(self) -> Transport:
        """A transport to its etcd, of the kind that its workers use; to be closed."""
        grpc = "etcd_lock_client" in self.settings or self.settings.get("etcd_lock_transport") == "grpc"
        return connect(self.etcd_url, transport="grpc" if grpc else "gateway")

    def etcd_revision(self) -> int:
        """Where etcd's history has come to."""
        with closing(self.connect()) as transport:
            return transport.range(Range("/", limit=1)).header.revision

    def keys(self, under: str = "") -> list[KeyValue]:
        """What the project has in etcd, in all or `under` a part of its names: ``locks/``, ``sessions/``."""
        prefix = f"/{self.queue}/{under}"
        with closing(self.connect()) as transport:
            return list(transport.range(Range(prefix, prefix_end(prefix))).kvs)

    def revoke_the_holders_lease(self, lock: str) -> None:
        """As an operator's ``etcdctl lease revoke`` does."""
        (holder,) = until(lambda: self.keys(f"locks/{lock}/"), "the holder's key")
        with closing(self.connect()) as transport:
            transport.lease_revoke(holder.lease)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        close_app(self.app)
        collect_garbage()


def close_app(app: Celery) -> None:
    """Close `app` and its connections to its result backend, which it leaves to the garbage collector otherwise."""
    backend: Any = app.backend
    # Results that were not waited for would unsubscribe when they go, from a broker that is gone by then.
    consumer: Any = getattr(backend, "result_consumer", None)
    if getattr(consumer, "_pubsub", None):
        consumer._pubsub.close()
        consumer._pubsub = None
    client: Any = vars(backend).get("client")
    if client is not None:
        client.connection_pool.disconnect()
    app.close()


def collect_garbage() -> None:
    """Do now what else comes at a bad time.

    Celery and redis-py leave sockets to the garbage collector, which would complain of them in another test; and
    Celery 5.4 unsubscribes from a result that goes, for minutes where its Redis is not there any more.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@contextmanager
def project(
    broker_url: str, etcd_url: str, folder: Path, *, backend_url: str = "", **settings: Any
) -> Iterator[Project]:
    opened = Project(broker_url, etcd_url, folder, settings, backend_url=backend_url)
    try:
        yield opened
    finally:
        opened.close()
