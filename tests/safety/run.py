"""A run: the store and the witness beside an etcd, holder processes, and in the end what the checker says.

with Run(etcd.endpoints, folder) as run:
    run.start(seed=1)
    run.start(seed=2, transport="grpc")
    …                       # time, and whatever is to be done to them; `run.recorder` for the record of that
    run.stop()
    report = run.report()
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from celery_etcd_lock.etcd import connect
from tests.safety.checker import Report, check
from tests.safety.history import Fault, Recorder, now, read
from tests.safety.holders import Options, command
from tests.safety.store import FencedStore
from tests.safety.witness import Witness

__all__ = ["Run"]

_ROOT = Path(__file__).resolve().parents[2]


class Run:
    """A context manager. `endpoints` are for the witness, straight to the members; the history goes to `folder`.

    `options` are those of every holder that `start` does not give others; without `endpoints` they have the witness's.
    """

    def __init__(
        self, endpoints: str | Sequence[str], folder: Path, *, prefix: str = "/safety/locks/", **options: Any
    ) -> None:
        direct = [endpoints] if isinstance(endpoints, str) else list(endpoints)
        self.folder = folder
        self.recorder = Recorder(folder, "faults")
        self.store = FencedStore(folder)
        self.witness = Witness(connect(direct), prefix)
        self.holders: list[subprocess.Popen[bytes]] = []
        self._given = {"endpoints": ",".join(direct), "prefix": prefix, **options}

    def __enter__(self) -> Run:
        self.store.__enter__()
        self.witness.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for holder in self.holders:
            if holder.poll() is None:
                holder.kill()
            holder.wait()
        self.witness.close()
        self.store.__exit__(exc_type, exc, tb)
        self.recorder.close()

    @property
    def options(self) -> Options:
        """Of a holder to which `start` gives none."""
        return Options(history=str(self.folder), store=self.store.port, **self._given)

    def start(self, **options: Any) -> subprocess.Popen[bytes]:
        """A holder process."""
        told = Options(**(vars(self.options) | options))
        holder = subprocess.Popen(command(told), cwd=_ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
        self.holders.append(holder)
        return holder

    def freeze(self, holder: subprocess.Popen[bytes]) -> None:
        """SIGSTOP, written down, and wait until all of it stands still."""
        self.recorder.write(Fault("stopped", now(), pid=holder.pid))
        holder.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self, holder: subprocess.Popen[bytes]) -> None:
        """SIGCONT, written down."""
        at = now()
        holder.send_signal(signal.SIGCONT)
        self.recorder.write(Fault("continued", at, now(), pid=holder.pid))

    def kill(self, holder: subprocess.Popen[bytes]) -> None:
        """SIGKILL, written down, and wait for the end."""
        self.recorder.write(Fault("killed", now(), pid=holder.pid))
        holder.kill()
        holder.wait()

    def stop(self, *, timeout: float = 60.0) -> None:
        """End every holder that still runs, with SIGTERM. `RuntimeError` for each that does not end well."""
        running = [holder for holder in self.holders if holder.poll() is None]
        for holder in running:
            holder.terminate()
        for holder in running:
            code = holder.wait(timeout)
            if code not in (0, -signal.SIGTERM):  # the latter: before it had begun
                raise RuntimeError(f"holder {holder.pid} ended with {code}")

    def report(self, *, ttl: float | None = None) -> Report:
        """What the checker says, once no holder runs any more."""
        return check(read(self.folder), self.witness.testify(), ttl=ttl or self.options.ttl)
