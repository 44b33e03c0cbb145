"""Real ``celery beat`` processes, a worker, and what it received from them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import KeyValue, Range, prefix_end
from celery_etcd_lock.exceptions import EtcdLockError
from tests.beat.checker import Receipt
from tests.workers import until

__all__ = ["Beat", "Beats", "Struck"]

_HERE = Path(__file__).parent


class Beat:
    """One process that can be stopped, frozen and killed; `name` in the log."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        folder.mkdir(exist_ok=True)
        self._command = [sys.executable, "-m", "celery", *command]
        self._environment = environment
        self._folder = folder
        self.start()

    def start(self) -> None:
        self._said_before = len(self.output) if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, cwd=self._folder, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, what: str, *, seconds: float = 60) -> None:
        """Wait until its log has `what`."""
        until(lambda: what in self.output or self.process.poll() is not None, f"{self.name}: {what!r}", seconds=seconds)
        assert what in self.output, self.output

    def await_start(self) -> None:
        """Wait until this start of it, not one before, has come so far that a signal finds Celery's handlers."""
        until(
            lambda: "beat: Starting..." in self.output[self._said_before :] or self.process.poll() is not None,
            f"{self.name}: its start",
        )

    def stop(self) -> int:
        """SIGTERM, and wait for the end."""
        self.process.terminate()
        return self.process.wait(60)

    def pause(self) -> None:
        """SIGSTOP, and wait until all of it stands still."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, to it and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(60)


@dataclass(frozen=True, slots=True)
class Struck:
    """A beat that has sent itself a signal in the middle of a tick."""

    pid: int
    when: float
    """Unix time."""
    entry: str
    id: str
    """Of the task that it was about to send, or had sent."""


@dataclass
class Beats:
    """A project with beats of its own, in one namespace and one queue; a context manager."""

    broker_url: str
    etcd_url: str
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    app: str = "beating"
    queue: str = field(default_factory=lambda: f"q{uuid.uuid4().hex}")
    processes: list[Beat] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    """More of the environment."""

    def __post_init__(self) -> None:
        self.record = self.folder / f"{self.queue}.jsonl"
        self.settings = {
            "etcd_lock_namespace": self.queue, "etcd_lock_beat_ttl": 3, "etcd_lock_timeout": 1, **self.settings,
        }  # fmt: skip

    def __enter__(self) -> Beats:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for each in self.processes:
            each.kill()

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(_HERE.parents[1]), str(_HERE), os.environ.get("PYTHONPATH", "")]),
            "BROKER_URL": self.broker_url,
            "CELERY_ETCD_LOCK_ENDPOINTS": self.etcd_url,
            "QUEUE": self.queue,
            "RECORD": str(self.record),
            "SETTINGS": json.dumps(self.settings),
            **self.variables,
        }

    def _begin(self, kind: str, *arguments: str) -> Beat:
        name = f"{kind}-{len(self.processes)}"
        command = ["-A", self.app, kind, "-l", "INFO", *arguments]
        self.processes.append(Beat(name, command, self.environment, self.folder / name))
        return self.processes[-1]

    def beat(self, *arguments: str, scheduler: str = "etcd_lock") -> Beat:
        """Start one more ``celery beat``."""
        return self._begin("beat", "-S", scheduler, *arguments)

    def worker(self, *arguments: str) -> Beat:
        """Start the worker, and wait until it is ready."""
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "-n", f"{self.queue}@test")
        worker = self._begin("worker", *quiet, *(arguments or ("-P", "threads", "-c", "4")))
        worker.says(" ready.")
        return worker

    def strike(self, at: str, number: signal.Signals, entry: str = "") -> None:
        """Have the next beat that comes there (``before publish``, ``after publish``; of `entry`, if it is given) send
        that signal to itself: in the middle of a tick, between fence and confirmation."""
        self._forget_strike()
        ready = self.record.with_suffix(".ready")
        ready.write_text(json.dumps({"at": at, "signal": int(number), "entry": entry}))
        ready.rename(f"{self.record}.strike")

    def struck(self) -> Struck | None:
        """What came of `strike`; None: nothing so far."""
        file = Path(f"{self.record}.struck")
        return Struck(**json.loads(file.read_text())) if file.exists() else None

    def await_struck(self, *, seconds: float = 60) -> Struck:
        found: Struck = until(self.struck, "a beat that strikes itself", seconds=seconds)
        return found

    def _forget_strike(self) -> None:
        for suffix in ("strike", "struck"):
            Path(f"{self.record}.{suffix}").unlink(missing_ok=True)

    def received(self, entry: str | None = None) -> list[Receipt]:
        """What the worker has received, in the order of time."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        receipts = [Receipt(**json.loads(line)) for line in lines]
        return sorted((each for each in receipts if entry in {None, each.entry}), key=lambda each: each.at)

    def keys(self, under: str) -> list[KeyValue]:
        """What the beats have in etcd: ``leader/``, ``entry/``; the oldest first."""
        prefix = f"/{self.queue}/beat/default/{under}"
        with closing(connect(self.etcd_url, timeout=2)) as transport:
            return list(transport.range(Range(prefix, prefix_end(prefix), sort="create")).kvs)

    def leader(self) -> Beat | None:
        """The beat that leads; None: none, or etcd does not say."""
        with suppress(EtcdLockError):
            for kv in self.keys("leader/"):
                pid = json.loads(kv.value)["pid"]
                return next((each for each in self.processes if each.pid == pid), None)
        return None

    def take_over_twice(self, within: float) -> tuple[Beat, Beat]:
        """Kill the leader, freeze the next for longer than its lease, and wake it. Returns it and the third."""
        killed = self.await_leader()
        killed.kill()
        frozen = self.await_leader(other_than=killed, seconds=within)
        self._await_ticks("ticks of the second leader")
        frozen.pause()
        third = self.await_leader(other_than=frozen, seconds=within)
        self._await_ticks("ticks of the third leader")
        frozen.resume()
        frozen.says("etcd_lock.leader_lost")
        return frozen, third

    def _await_ticks(self, what: str) -> None:
        there = len(self.received("second"))
        until(lambda: len(self.received("second")) >= there + 2, what)

    def await_leader(self, *, other_than: Beat | None = None, seconds: float = 60) -> Beat:
        found: Beat = until(
            lambda: (leader := self.leader()) is not None and leader is not other_than and leader,
            "a leader",
            seconds=seconds,
        )
        return found
