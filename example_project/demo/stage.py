"""What the story is played on: an etcd, a broker, two workers and beats, all of them gone when it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from celery_etcd_lock.testing import EtcdServer
from example_project.demo import files, record
from tests.servers import RedisNotFound, RedisServer, find_redis

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A real ``celery …``, with all its children in a process group of their own."""

    def __init__(self, name: str, folder: Path, *command: str) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "example_project.demo.app", *command, "-l", "info"],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL to it and all its children at once. Safe to call twice."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def has_said(self, what: str) -> bool:
        return what in self._log.read_text(errors="replace")


class Beat(Process):
    """A real beat, whose scheduler is ours."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder, "beat", "-S", "etcd_lock", "-s", str(folder / f"{name}-schedule"))


class Worker(Process):
    """A real prefork worker."""

    def __init__(self, name: str, children: int, folder: Path) -> None:
        self.children = children
        self._record = folder / "record"
        options = [
            *("-P", "prefork", "-c", str(children), "-n", f"{name}@demo", "-Q", f"jobs,{name}"),
            *("--without-mingle", "--without-gossip", "--without-heartbeat"),
        ]
        super().__init__(name, folder, "worker", *options)

    def wait_ready(self, *, timeout: float = 60.0) -> None:
        """Wait until it takes messages. `RuntimeError` when it ends, or does not within `timeout` seconds."""
        ready = await_until(lambda: self._said_ready() or self._process.poll() is not None, timeout=timeout)
        if not ready or self._process.poll() is not None:
            raise RuntimeError(f"{self.name} did not start; its log:\n{self._log.read_text(errors='replace')[-2000:]}")

    def _said_ready(self) -> bool:
        return bool(record.written(self._record, f"ready {self.name}@demo"))


@dataclass(frozen=True)
class Stage:
    """`folder` holds the record and all logs; `broker` and `etcd` are what to call them in print."""

    folder: Path
    etcd: str
    broker: str
    workers: list[Worker]
    ends: contextlib.ExitStack

    def beats(self, count: int) -> list[Beat]:
        """Start so many beats, one after the other, so that it is known which leads first."""
        started = []
        for number in range(1, count + 1):
            beat = Beat(f"beat{number}", self.folder)
            self.ends.callback(beat.kill)
            await_until(lambda beat=beat: beat.has_said("beat: Starting"), timeout=60)  # type: ignore[misc]
            started.append(beat)
        return started


@contextlib.contextmanager
def opened() -> Iterator[Stage]:
    """Start everything, and end it however the block ends. Sets the environment that `demo.app` reads.

    The folder stays, for whoever wants to read what the workers said. `RuntimeError` says what could not be started.
    """
    parent = ROOT / ".demo"
    parent.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent))
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(EtcdServer())
        try:
            redis = stack.enter_context(RedisServer(binary=find_redis(fetch=False)))
            broker, urls = "Redis", (f"{redis.url}/0", f"{redis.url}/1")
        except RedisNotFound:
            broker = "Celery's filesystem transport"
            urls = ("filesystem://", f"{files.__name__}:Results+file://{folder}/results")
        os.environ["DEMO_FOLDER"] = str(folder)
        os.environ["DEMO_BROKER"], os.environ["DEMO_RESULTS"] = urls
        os.environ["CELERY_ETCD_LOCK_ENDPOINTS"] = etcd.url
        workers = []
        for name, children in (("worker1", 2), ("worker2", 4)):
            worker = Worker(name, children, folder)
            stack.callback(worker.kill)
            worker.wait_ready()  # one after the other: two at once break the filesystem transport's own files
            workers.append(worker)
        yield Stage(folder, _version(etcd.binary), broker, workers, stack)


def _version(etcd: Path) -> str:
    said = subprocess.run([etcd, "--version"], check=True, capture_output=True, text=True).stdout
    return said.partition("\n")[0].replace("etcd Version:", "etcd")


def await_until(condition: Callable[[], object], *, timeout: float) -> bool:
    """Ask until `condition` holds; False when it does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
