"""The client processes of a chaos run: started, killed, replaced, watched, and ended in an orderly way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from tests.safety.history import now
from tests.safety.holders import Options, command

__all__ = ["Clients"]

_ROOT = Path(__file__).resolve().parents[2]
_GIL_PATIENCE = 60.0
"""Seconds until a client that may hold the GIL must have done it."""
_GIL_ODDS = 0.2
"""It is not to wait for many acquisitions: on a slow machine a minute has few. Nor is every body to do it."""


class Client:
    """One process. What it says on its standard error is kept beside the history."""

    def __init__(self, options: Options) -> None:
        self.options = options
        folder = Path(options.history)
        with (folder / "clients.log").open("ab") as log:
            self.process = subprocess.Popen(
                command(options),
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONFAULTHANDLER": "1"},
                start_new_session=True,  # Ctrl-C at a terminal is for the run, which ends them itself
            )
        self.history = folder / f"holder-{self.process.pid}.jsonl"
        self._read = 0

    @property
    def pid(self) -> int:
        return self.process.pid

    def news(self) -> Iterator[dict[str, object]]:
        """What it has written down since the last time."""
        if not self.history.exists():
            return
        with self.history.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield json.loads(line)

    def end(self, timeout: float) -> str:
        """SIGTERM, and wait for the end. What was wrong with it, or nothing; then the log has its stacks."""
        self.process.terminate()
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # faulthandler writes down where each thread is
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            self.kill()
            return f"process {self.pid} ({self.options.transport}) did not end within {timeout:.0f} s"
        return f"process {self.pid} ({self.options.transport}) ended with {code}" if code else ""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Clients:
    """As many as there are `options`, of which each has a seed of its own. A context manager."""

    def __init__(self, options: Sequence[Options]) -> None:
        self._options = list(options)
        self._clients: list[Client] = []
        self._others: list[Client] = []
        self._started = 0
        self.problems: list[str] = []

    def __enter__(self) -> Clients:
        self._clients = [self._start(options) for options in self._options]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients + self._others:
            client.kill()

    def _start(self, options: Options) -> Client:
        self._started += 1
        return Client(replace(options, seed=options.seed * 1000 + self._started))

    @property
    def running(self) -> list[subprocess.Popen[bytes]]:
        return [client.process for client in self._clients]

    def replace(self, dead: subprocess.Popen[bytes]) -> None:
        """Start another in the place of one that was killed."""
        (number,) = (number for number, client in enumerate(self._clients) if client.process is dead)
        self._clients[number] = self._start(self._options[number])

    def hold_gil(self, seconds: float, ended: threading.Event) -> bool:
        """Have one more, for as long as it takes it to hold the GIL once; whether it did."""
        like = self._options[self._started % len(self._options)]
        client = self._start(replace(like, gil=seconds, gil_odds=_GIL_ODDS, locks="mutex:m1", stay=0.005))
        self._others.append(client)
        until = now() + _GIL_PATIENCE
        did = False
        while not did and now() < until and not ended.wait(0.1):
            did = any(each.get("kind") == "gil_given" for each in client.news())
        self.problems += filter(None, [client.end(60 + 2 * seconds)])
        return did

    def wait_through(self, since: float, timeout: float) -> list[str]:
        """Wait until every thread has got a lock that it asked for after `since`, and every process each of its locks.

        Gives those who have not, after `timeout` seconds.
        """
        queued: dict[object, float] = {}
        got: dict[Client, set[object]] = {client: set() for client in self._clients}
        wanted = {
            client: {*_names(client.options), *(f"holder-{number}" for number in range(client.options.threads))}
            for client in self._clients
        }
        until = now() + timeout
        while True:
            for client in self._clients:
                for said in client.news():
                    if said.get("kind") == "queued":
                        queued[said["hold"]] = float(str(said["at"]))
                    elif said.get("kind") == "acquired" and queued.get(said["hold"], 0.0) >= since:
                        got[client] |= {said["thread"], said["name"]}
            late = {client: wanted[client] - got[client] for client in self._clients if wanted[client] - got[client]}
            if not late or now() > until:
                return [
                    f"process {client.pid} ({client.options.transport}) has not got through again: "
                    + ", ".join(sorted(map(str, missing)))
                    for client, missing in late.items()
                ]
            time.sleep(0.2)

    def end(self) -> list[str]:
        """End all of them in an orderly way, at once; what was wrong."""
        clients, self._clients = self._clients, []
        said: list[str] = []
        threads = [threading.Thread(target=lambda each=each: said.append(each.end(60))) for each in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [*self.problems, *filter(None, said), *self._tracebacks()]

    def _tracebacks(self) -> list[str]:
        """What the library, or a client, did not expect: it is logged with a traceback, and nothing else is."""
        log = Path(self._options[0].history) / "clients.log"
        lines = log.read_text(errors="replace").splitlines()
        return [
            "a traceback in clients.log:\n    " + "\n    ".join(lines[max(0, number - 1) : number + 30])
            for number, line in enumerate(lines)
            if line.startswith("Traceback")
        ][:3]


def _names(options: Options) -> list[str]:
    return [options.prefix + each.split(":")[1] for each in options.locks.split(",")]
