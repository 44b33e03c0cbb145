"""Contenders in processes of their own, by Go's ``concurrency`` (``main.go``) and by this package (``main.py``)."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from celery_etcd_lock.etcd.api import Range, prefix_end
from celery_etcd_lock.locks import Session
from tests.workers import until

__all__ = ["PYTHON", "Contender", "GoNotFound", "Waiting", "build_go", "keys"]

_ROOT = Path(__file__).resolve().parents[2]
_GOPATH = Path("/usr/share/gocode")
"""Where Debian keeps the sources of its Go packages."""

PYTHON = (sys.executable, "-m", "tests.contenders.main")
"""What starts ``main.py``."""


class GoNotFound(RuntimeError):
    """There is no Go on this machine, or no ``concurrency`` package for it."""


def build_go(folder: Path) -> Path:
    """The program that ``main.go`` makes, built into `folder` unless it is there: by one process, however many ask.

    What Go compiled once it keeps in its own cache. `GoNotFound` says what to install; `RuntimeError` what Go said.
    """
    go, package = shutil.which("go"), _GOPATH / "src/go.etcd.io/etcd/clientv3/concurrency"
    if go is None or not package.is_dir():
        missing = "no go" if go is None else f"no {package}, as etcd 3.4 has it,"
        raise GoNotFound(f"{missing} on this machine (on Debian 12: apt-get install golang-go golang-etcd-server-dev)")
    # (CGO_ENABLED=0 would have Go compile net and what needs it once more, a quarter of the whole; as it is, what
    # Debian compiled will do, and no C compiler is asked for.)
    settings = {"GO111MODULE": "off", "GOPATH": str(_GOPATH), "GOFLAGS": ""}
    if not {"HOME", "XDG_CACHE_HOME", "GOCACHE"} & os.environ.keys():
        settings["GOCACHE"] = str(folder / "cache")
    program, unfinished = folder / "contender", folder / "contender.new"
    command = [go, "build", "-p", "2", "-o", str(unfinished), str(Path(__file__).with_name("main.go"))]
    with (folder / "contender.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if program.exists():
            return program
        done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **settings})
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        return unfinished.rename(program)


class Contender:
    """One such process. A context manager, which kills it. When its etcd is gone for good it goes by itself."""

    def __init__(self, command: Sequence[str | Path], url: str, folder: Path, *, ttl: int = 60) -> None:
        number = len(list(folder.glob("contender-*.out")))
        self._output, self._errors = (folder / f"contender-{number}.{which}" for which in ("out", "err"))
        self._seen = 0
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*command, "-endpoints", url, "-ttl", str(ttl)],
                stdin=subprocess.PIPE, stdout=output, stderr=errors, cwd=_ROOT,
            )  # fmt: skip

    def events(self) -> list[dict[str, Any]]:
        """All that it has said so far."""
        lines = self._output.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def said(self, event: str) -> bool:
        """Whether it has said `event` at all."""
        return any(each["event"] == event for each in self.events())

    def tell(self, *command: object) -> None:
        """Give it a command; what comes of it is for `expect`."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, command)).encode() + b"\n")
        self.process.stdin.flush()

    def expect(self, event: str) -> dict[str, Any]:
        """Wait for the next event, which has to be `event`, and return it."""
        until(lambda: len(self.events()) > self._seen or self.process.poll() is not None, f"the event {event!r}")
        events = self.events()
        assert len(events) > self._seen, (self.process.returncode, self._errors.read_text())
        found = events[self._seen]
        self._seen += 1
        assert found["event"] == event, (found, self._errors.read_text())
        return found

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(60)

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


class Waiting:
    """Something that blocks, in a thread of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        self.result = work()

    def get(self) -> Any:
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.result


def keys(session: Session, name: str) -> list[str]:
    """The contenders of the lock `name`, in the order in which they came."""
    return [kv.key for kv in session.transport.range(Range(name + "/", prefix_end(name + "/"), sort="create")).kvs]
