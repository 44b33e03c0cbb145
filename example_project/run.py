"""``python -m example_project.run``: the shop without Docker, in the foreground, until Ctrl-C.

An etcd, a Redis, two workers, two beats and the page, all on loopback. What they write is in a folder of its own, and
goes with them: the database too, for an etcd that begins anew gives tokens lower than those that the rows remember.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from celery_etcd_lock.testing import EtcdNotFound, EtcdServer
from tests.servers import RedisNotFound, RedisServer, free_port

ROOT = Path(__file__).resolve().parent.parent
PORT = 8000
PATIENCE = 60.0
"""Seconds after which what has not started will not start."""
GRACE = 20.0
"""Seconds for which a worker may finish what it does, when all is to end."""
COMPACTION = ("--auto-compaction-mode=periodic", "--auto-compaction-retention=5m")


class Process:
    """One part of the shop, in a process group of its own: Ctrl-C is for who has started it."""

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str], *command: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> int | None:
        return self._process.poll()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """`RuntimeError`, with what it said, if it ends before it is ready, or is not in time."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if self.ended is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start; it said:\n{self.said()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Ask it to end."""
        if self.ended is None:
            self._process.terminate()

    def wait(self, deadline: float) -> None:
        """For its end, until that moment of the monotonic clock."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """What is left of it, children too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


class Shop:
    """All of it; a context manager. `url` is where the page is."""

    def __init__(self, port: int | None = None) -> None:
        self.url = f"http://127.0.0.1:{port or _default_port()}"
        self.parts: list[Process] = []
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> Shop:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all of it. Ctrl-C meanwhile: at once."""
        try:
            for part in reversed(self.parts):  # beats first: what they would send now nobody would take
                part.stop()
            deadline = time.monotonic() + GRACE
            for part in self.parts:
                part.wait(deadline)
        finally:
            for part in self.parts:
                part.kill()
            self._ends.close()

    def _start(self) -> None:
        parent = ROOT / ".example"
        parent.mkdir(exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(dir=parent))
        self._ends.callback(shutil.rmtree, self.folder, ignore_errors=True)
        etcd = self._ends.enter_context(EtcdServer(extra_args=COMPACTION))
        redis = self._ends.enter_context(RedisServer())
        self._environment = os.environ | {
            "CELERY_ETCD_LOCK_ENDPOINTS": etcd.url,
            "SHOP_REDIS": redis.url,
            "SHOP_DATABASE": str(self.folder / "db.sqlite3"),
        }
        manage, host = "example_project/manage.py", self.url.removeprefix("http://")
        made = [sys.executable, manage, "set_up"]
        subprocess.run(made, cwd=ROOT, env=self._environment, check=True, stdout=subprocess.DEVNULL)
        page = self._run("page", manage, "runserver", "--noreload", host)
        workers = [self._celery(name, "worker", "-c", "3", "-n", f"{name}@%h") for name in ("worker1", "worker2")]
        beats = [self._celery(name, "beat", "-S", "etcd_lock", "--pidfile=") for name in ("beat1", "beat2")]
        page.wait_until(lambda: _answers(f"{self.url}/healthy"))
        for parts, says in ((workers, " ready."), (beats, "beat: Starting")):
            for part in parts:
                part.wait_until(lambda part=part, says=says: says in part.said())  # type: ignore[misc]

    def _celery(self, name: str, *command: str) -> Process:
        return self._run(name, "-m", "celery", "-A", "example_project.shop", *command, "-l", "info")

    def _run(self, name: str, *command: str) -> Process:
        part = Process(name, self.folder, self._environment, *command)
        self.parts.append(part)
        return part


def _default_port() -> int:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", PORT))
        except OSError:
            return free_port()
    return PORT


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m example_project.run", description=__doc__)
    options.add_argument("--port", type=int, help=f"of the page; {PORT}, or a free one, unless you say")
    port = options.parse_args().port
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print("starting an etcd, a Redis, two workers, two beats and the page", flush=True)
    try:
        with Shop(port) as shop:
            print(
                f"\n    {shop.url}\n\nCtrl-C ends all of it. To see a lock come free that its holder cannot give back:"
            )
            for part in shop.parts:
                if part.name.startswith(("worker", "beat")):
                    print(f"    kill -9 -{part.pid}   # {part.name}")
            print(f"What they say: {shop.folder}/*.log", flush=True)
            _watch(shop)
    except (EtcdNotFound, RedisNotFound, RuntimeError, subprocess.CalledProcessError) as why:
        print(f"The shop cannot be opened: {why}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped")
    return 0


def _watch(shop: Shop) -> None:
    """Until Ctrl-C: say who has ended."""
    gone: set[str] = set()
    while True:
        for part in shop.parts:
            if part.ended is not None and part.name not in gone:
                gone.add(part.name)
                how = f"by signal {-part.ended}" if part.ended < 0 else f"with status {part.ended}"
                print(f"{part.name} has ended, {how}", flush=True)
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
