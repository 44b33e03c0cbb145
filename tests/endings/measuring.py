"""What happens to a lock, to its body and to its message when the body ends, measured in real workers.

All times are of the machine's one monotonic clock: the body writes down when it ends, the test when it strikes, and a
watch of etcd when the lock's key goes.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from celery import states
from redis import Redis

from celery_etcd_lock.etcd.api import Watch, prefix_end
from tests.endings.ways import GOES_ON, LIMIT, TTL, WAYS, Pool, Way, possible
from tests.workers import Project, Run, Worker, overlaps, project, until

__all__ = ["By", "Ended", "Fate", "Kept", "measure"]

By = Literal["release", "parent", "lease"]
Kept = Literal["", "queued", "unacknowledged"]

HOLDER, FOLLOWER = 0, 1
"""As in `tests/tasks/ending.py`."""

WAITERS = 16
"""As many as wait at once, at most."""

SILENCE = 3.0
"""Seconds for which nothing is heard of a message, until it is taken that nothing will be."""


@dataclass(frozen=True)
class Fate:
    """What has become of a message."""

    state: str
    error: str
    """The type of a failure."""
    runs: int
    kept: Kept
    """Where the broker still has it."""

    @property
    def ready(self) -> bool:
        """Whether a caller who waits for its result gets one."""
        return self.state in states.READY_STATES


@dataclass(frozen=True)
class Ended:
    """One ending, as it was measured. Seconds."""

    pool: Pool
    way: Way
    how: str
    """How the body said that it ended: ``returned``, or an exception's name; or ``killed``: it said nothing."""
    lasted: float
    """From the strike until the body ended by itself, or the lock was free."""
    after_end: float
    """From the end that the body wrote down until the lock was free; where it wrote none, from the strike."""
    went_on: bool
    """It was struck, and went on until it was let go."""
    by: By
    """What freed the lock: its holder, the holder's parent, who saw it die, or the end of the lease."""
    fate: Fate
    waiter: float
    """From when the lock was free until the next one was in."""
    overlaps: int
    """Pairs of runs under this lock that were inside at the same time."""
    tokens_grow: bool

    @property
    def freed(self) -> float:
        """From the strike until the lock was free; or from the body's end, where it ended by itself."""
        return self.after_end if self.went_on or not self.way.strikes else self.lasted


class Deletions:
    """When each key under a prefix was first deleted, and which are there. A context manager, with a thread."""

    def __init__(self, opened: Project, prefix: str) -> None:
        self._transport = opened.connect()
        self._stream = self._transport.watch(Watch(prefix, prefix_end(prefix)))
        self._watching = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._at: dict[str, float] = {}
        self._there: set[str] = set()

    def __enter__(self) -> Deletions:
        self._thread.start()
        assert self._watching.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._thread.join()
        self._transport.close()

    def _watch(self) -> None:
        for reply in self._stream:
            now = time.monotonic()
            self._watching.set()
            for event in reply.events:
                if event.kind == "put":
                    self._there.add(event.kv.key)
                else:
                    self._there.discard(event.kv.key)
                    self._at.setdefault(event.kv.key, now)

    def at(self, key: str) -> float | None:
        return self._at.get(key)

    def beside(self, key: str) -> int:
        """How many keys the lock has that this one is of."""
        return sum(each.startswith(key.rpartition("/")[0] + "/") for each in list(self._there))


def measure(
    redis: str, etcd: str, folder: Path, pool: Pool, ways: Iterable[Way] = WAYS
) -> dict[Way, Ended | Exception]:
    """Have a body end in each of `ways` in workers of `pool`, and measure it; what went wrong, in its place."""
    wanted = [way for way in ways if possible(pool, way) and (pool.children or not way.child)]
    with project(redis, etcd, folder, etcd_lock_ttl=TTL, imports=["ending"], **pool.settings) as opened:
        return _Measuring(opened, pool).all(wanted)


class _Measuring:
    def __init__(self, opened: Project, pool: Pool) -> None:
        self.project = opened
        self.pool = pool
        self.slots = threading.Semaphore(pool.slots)
        self.broker = Redis.from_url(opened.broker_url)

    def all(self, ways: list[Way]) -> dict[Way, Ended | Exception]:
        together = [way for way in ways if not way.worker]
        alone = [way for way in ways if way.worker and way.worker != signal.SIGTERM]
        at_last = [way for way in ways if way.worker == signal.SIGTERM]
        workers = {way.name: self.start(way.name, 1, way.settings) for way in alone}
        shared = self.start("shared", self.pool.slots)
        self.project.worker("-P", "threads", "-c", str(WAITERS), "-Q", self.queue("next"), ready=False)
        for worker in self.project.workers:
            worker.await_ready()
        with (
            Deletions(self.project, f"/{self.project.queue}/locks/") as self.deletions,
            ThreadPoolExecutor(WAITERS) as threads,
        ):
            measured = {way: threads.submit(self.attempt, way, shared, "shared") for way in together}
            measured |= {way: threads.submit(self.attempt, way, workers[way.name], way.name) for way in alone}
            found = {way: future.result() for way, future in measured.items()}
            found |= {way: self.attempt(way, shared, "shared") for way in at_last}
        self.broker.close()
        return {way: found[way] for way in ways}

    def start(self, name: str, slots: int, settings: dict[str, Any] | None = None) -> Worker:
        return self.project.worker(
            *self.pool.worker(slots), "-Q", self.queue(name), ready=False, settings=settings or {}
        )

    def queue(self, name: str) -> str:
        return f"{self.project.queue}-{name}"

    def attempt(self, way: Way, worker: Worker, name: str) -> Ended | Exception:
        try:
            return self.end(way, worker, self.queue(name))
        except Exception as error:  # noqa: BLE001  # of one cell: the others are measured all the same
            failure = RuntimeError(f"{way.title} under {self.pool.title}; its worker said:\n{worker.output[-4000:]}")
            failure.__cause__ = error
            return failure

    def end(self, way: Way, worker: Worker, queue: str) -> Ended:
        options: dict[str, Any] = {way.limit: LIMIT} if way.limit else {}
        with self.slot(way):
            task = "ending_late" if way.late else "ending"
            result = self.project.app.send_task(task, (HOLDER, way.how, way.name), queue=queue, **options)
            run = until(lambda: self.runs(way), "the start")[0]
            until(lambda: self.signs(way), "its first sign of life")
            waiter = self.project.app.send_task("ending", (FOLLOWER, "return", way.name), queue=self.queue("next"))
            until(lambda: self.deletions.at(run.key) or self.deletions.beside(run.key) > 1, "the waiter's key")
            struck = self.strike(way, worker, run, result)
            free = self.free(way, run, struck)
        until(waiter.ready, "the waiter's end")
        fate = self.fate(way, worker, result, queue)
        runs = self.runs(way)
        run = runs[0]
        ended = self.last_sign(way) if run.how == "killed" else run.ended
        if way.limit:
            struck = min(struck, ended)  # its clock has begun some milliseconds before the body
        following = next(each for each in runs if each.id == waiter.id)
        return Ended(
            pool=self.pool, way=way, how=run.how, lasted=free - struck,
            after_end=free - (struck if run.how == "killed" else run.ended),
            went_on=way.strikes and run.how == "returned",
            by="release" if run.how != "killed" else self.who_freed(worker, run.pid),
            fate=fate,
            waiter=following.started - free,
            overlaps=len(overlaps([replace(run, ended=ended), *runs[1:]])),
            tokens_grow=all(one.token < two.token for one, two in itertools.pairwise(runs)),
        )  # fmt: skip

    @contextmanager
    def slot(self, way: Way) -> Iterator[None]:
        """One of those of the shared worker, unless it has a worker of its own."""
        if way.worker:
            yield
            return
        with self.slots:
            yield

    def runs(self, way: Way) -> list[Run]:
        return [run for run in self.project.runs() if f"/{way.name}/" in run.key]

    def strike(self, way: Way, worker: Worker, run: Run, result: Any) -> float:
        """Strike it, or let it end by itself: when."""
        now = time.monotonic()
        if way.worker == signal.SIGKILL:
            worker.kill()
        elif way.worker:
            worker.process.send_signal(way.worker)
        elif way.child:
            os.kill(run.pid, signal.SIGKILL)
        elif way.revoke:
            result.revoke(terminate=True, signal=way.revoke)
        elif way.limit:
            return run.started + LIMIT
        else:
            self.let_go(way)
        return now

    def let_go(self, way: Way) -> None:
        Path(f"{self.project.record}.{way.name}.go").touch()

    def signs(self, way: Way) -> list[float]:
        """When the body was seen alive."""
        path = Path(f"{self.project.record}.{way.name}.alive")
        whole, _, _ = (path.read_text() if path.exists() else "").rpartition("\n")
        return [float(sign) for sign in whole.split()]

    def last_sign(self, way: Way) -> float:
        """Of one that was killed, and so did not write down its end."""
        return self.signs(way)[-1]

    def free(self, way: Way, run: Run, struck: float) -> float:
        """When its lock was free; a body that goes on is let go when there is no hope left that Celery ends it."""
        patience = GOES_ON if way.worker == signal.SIGTERM else self.pool.patience
        deadline = struck + patience + float(way.settings.get("worker_soft_shutdown_timeout", 0))
        until(lambda: self.deletions.at(run.key) or time.monotonic() > deadline)
        self.let_go(way)
        return cast("float", until(lambda: self.deletions.at(run.key), "the lock's end"))

    def who_freed(self, worker: Worker, pid: int) -> By:
        """The parent says so, a moment after it has done it."""
        said, heard = f"etcd_lock.orphans_freed: process {pid} ", time.monotonic() + SILENCE
        until(lambda: said in worker.output or worker.process.poll() is not None or time.monotonic() > heard)
        return "parent" if said in worker.output else "lease"

    def fate(self, way: Way, worker: Worker, result: Any, queue: str) -> Fate:
        heard = time.monotonic() + (60 if way.answered else SILENCE)
        until(lambda: result.ready() or time.monotonic() > heard, seconds=90)
        runs = [run for run in self.runs(way) if run.id == result.id]
        if runs[-1].how == "returned":
            # Another worker that hears of a revoke may have said REVOKED meanwhile, which does not last.
            until(lambda: f"[{result.id}] succeeded in" in worker.output, "the word that it has succeeded")
        meta = result.backend.get_task_meta(result.id)
        error = type(meta["result"]).__name__ if meta["status"] == "FAILURE" else ""
        kept: Kept = "" if result.ready() else self.kept(result.id, queue)
        return Fate(meta["status"], error, len(runs), kept)

    def kept(self, task_id: str, queue: str) -> Kept:
        """Where the broker has a message of this id."""
        there: Any = self.broker
        if any(task_id.encode() in message for message in there.lrange(queue, 0, -1)):
            return "queued"
        if any(task_id.encode() in message for message in there.hvals("unacked")):
            return "unacknowledged"
        return ""
