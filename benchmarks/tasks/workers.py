"""Workers of `app`, as processes, and a client's view of the same app in this process."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.stage import Stage

__all__ = ["Worker", "client", "until"]

_ROOT = Path(__file__).resolve().parents[2]


def until(condition: Callable[[], Any], *, seconds: float = 60) -> Any:
    """Wait until `condition` gives something true, and return that; None if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)
    return value


class Worker:
    """One ``celery worker`` with a queue of its own. A context manager, which kills it."""

    def __init__(
        self,
        stage: Stage,
        wire: str = "gateway",
        *,
        children: int = 1,
        plugin: bool = True,
        peers: bool = True,
        include: Sequence[str] = (),
    ) -> None:
        """`include`: modules that it imports before it forks."""
        self.folder = tempfile.TemporaryDirectory(prefix="bench-")
        self.record = Path(self.folder.name, "record.jsonl")
        self.environment = {
            "BENCH_BROKER": stage.redis.url, "BENCH_ETCD": stage.etcd.url, "BENCH_WIRE": wire,
            "BENCH_QUEUE": f"q{uuid.uuid4().hex}", "BENCH_RECORD": str(self.record),
            "BENCH_TASKS": ",".join(name for name, there in (("ours", plugin), ("peers", peers)) if there),
        }  # fmt: skip
        self.log = Path(self.folder.name, "log")
        module = "celery" if plugin else "benchmarks.tasks.bare"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "-A", "benchmarks.tasks.app", "worker", "-l", "INFO", "-P", "prefork",
                 "-c", str(children), "--without-gossip", "--without-mingle", "--without-heartbeat",
                 "-n", f"{self.environment['BENCH_QUEUE']}@bench", *(["-I", ",".join(include)] if include else [])],
                env={**os.environ, **self.environment}, cwd=_ROOT, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        if not until(lambda: " ready." in self.log.read_text(errors="replace") or self.process.poll() is not None):
            raise RuntimeError("a worker did not start")
        if self.process.poll() is not None:
            raise RuntimeError(f"a worker ended:\n{self.log.read_text(errors='replace')[-3000:]}")
        self.app = client(self.environment)

    def children(self) -> list[psutil.Process]:
        """Those of its pool."""
        return psutil.Process(self.process.pid).children()

    def starts(self, key: str) -> list[dict[str, Any]]:
        """What `app.holds` has written down of `key`."""
        lines = self.record.read_text().splitlines(keepends=True) if self.record.exists() else []
        return [entry for line in lines if line.endswith("\n") and (entry := json.loads(line))["key"] == key]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)
        self.app.close()
        self.folder.cleanup()


def client(environment: dict[str, str]) -> Any:
    """The app of that environment, made anew: for whoever publishes."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        return runpy.run_path(str(Path(__file__).with_name("app.py")))["app"]
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
