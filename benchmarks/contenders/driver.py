"""Starts contenders and talks to them: the Python ones of this package, and Go's, which the tests have already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from tests.contenders.driver import build_go

__all__ = ["GO", "Contender", "Contenders"]

GO = "go"

_ROOT = Path(__file__).resolve().parents[2]


class Contender:
    """One process. A context manager, which kills it."""

    def __init__(self, command: Sequence[str | Path], url: str, *, ttl: int, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*command, "-endpoints", url, "-ttl", str(ttl)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_ROOT, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        self.hear("ready")

    def tell(self, *command: object) -> None:
        """Give it a command; what comes of it is for `hear`."""
        assert self.process.stdin is not None
        print(*command, file=self.process.stdin, flush=True)

    def hear(self, event: str) -> dict[str, Any]:
        """Its next event, which has to be `event`."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        said: dict[str, Any] = json.loads(line) if line else {"event": f"its end, {self.process.wait(30)}"}
        if said["event"] != event:
            raise RuntimeError(f"{self.process.args!r} was to say {event!r}, and said {said}")
        return said

    def processor_time(self) -> float:
        """Seconds that it has taken so far, in hundredths."""
        used = psutil.Process(self.process.pid).cpu_times()
        return float(used.user + used.system)

    def bench(self, name: str, times: int) -> list[float]:
        """Lock and unlock `name`, `times` times: the seconds of each."""
        self.tell("bench", name, times)
        return list(self.hear("benched")["seconds"])

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait(30)


class Contenders(ExitStack):
    """All contenders of one measurement; their end is its end."""

    def __init__(self, etcd: str, redis: str = "", *, ttl: int = 3600) -> None:
        super().__init__()
        self._urls = {"etcd": etcd, "redis": redis}
        self._ttl = ttl

    def start(self, kind: str) -> Contender:
        """A new process of `kind`: one of ``contenders/__main__.py``, or `GO`. `GoNotFound` says what to install."""
        url = self._urls["redis" if kind == "redis" else "etcd"]
        if kind == GO:
            folder = Path(tempfile.gettempdir(), "celery-etcd-lock-bench-go")
            folder.mkdir(exist_ok=True)
            command: list[str | Path] = [build_go(folder)]
        else:
            command = [sys.executable, "-m", "benchmarks.contenders", kind]
        environment = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"} if kind == "etcd3" else {}
        return self.enter_context(Contender(command, url, ttl=self._ttl, **environment))
