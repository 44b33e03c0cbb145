"""What locks cost, counted by the server and timed in pairs: measured here, held to their bars by the tests.

``python -m tests.costs`` (or ``make costs``) prints the figures that `docs/costs.md` has, of this machine and today.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import platform
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import psutil

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Delete, Put, Range, Transport, Txn, prefix_end
from celery_etcd_lock.locks import HeldLock, Lock, Mutex, RWLock, Semaphore, Session
from celery_etcd_lock.testing import EtcdServer

__all__ = ["Bill", "Crowd", "Pair", "Wire", "alternate", "fill_with_dead_names", "in_turn", "keep_for", "open_session"]

Wire = Literal["gateway", "grpc"]

LONG = 3600
"""Seconds: a TTL under which no renewal comes in between."""

_REQUESTS = re.compile(
    r'^grpc_server_msg_received_total\{grpc_method="(\w+)",grpc_service="etcdserverpb[^}]*\} (\S+)$', re.MULTILINE
)
_BYTES = re.compile(r"^etcd_network_client_grpc_(received|sent)_bytes_total (\S+)$", re.MULTILINE)
_WATCHES = re.compile(r"^etcd_debugging_mvcc_(watcher|watch_stream)_total (\S+)$", re.MULTILINE)


class Bill:
    """What a server was asked since this was made, over whatever wire: inside it, the gateway's requests are gRPC's."""

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        self._start = self._read()

    def _read(self) -> Counter[str]:
        metrics = self._server.metrics()
        found = _REQUESTS.findall(metrics) + _BYTES.findall(metrics)
        return Counter({name: int(float(value)) for name, value in found})

    def so_far(self) -> Counter[str]:
        """Messages to the server by verb (``Txn``, ``Watch``, ``LeaseKeepAlive``), and ``received``, ``sent`` bytes."""
        return self._read() - self._start


def requests(bill: Counter[str]) -> int:
    return bill.total() - bill["received"] - bill["sent"]


def watches(server: EtcdServer) -> tuple[int, int]:
    """How many watches there are, and on how many streams."""
    found = {name: int(float(value)) for name, value in _WATCHES.findall(server.metrics())}
    return found["watcher"], found["watch_stream"]


def until(condition: Callable[[], object], *, seconds: float = 120) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to pass within {seconds} s"
        time.sleep(0.02)


# -- time


@dataclass(frozen=True)
class Pair:
    """Two things done in turn, A B A B: the medians, in seconds."""

    one: float
    other: float

    @property
    def ratio(self) -> float:
        return self.one / self.other


def in_turn(one: Callable[[], object], other: Callable[[], object], *, times: int = 300) -> Pair:
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(times):
        for work, times_of in zip((one, other), took, strict=True):
            began = time.perf_counter()
            work()
            times_of.append(time.perf_counter() - began)
    return Pair(statistics.median(took[0]), statistics.median(took[1]))


class Fresh:
    """Takes and gives back, each time, a lock that nobody had before. `like` makes one of a name."""

    def __init__(self, like: Callable[[str], Lock], prefix: str) -> None:
        self._like = like
        self._prefix = prefix
        self._number = 0

    def __call__(self) -> None:
        self._number += 1
        take(self._like(f"{self._prefix}{self._number:06}"))


def take(lock: Lock, *, blocking: bool = True) -> None:
    assert lock.acquire(blocking=blocking).release() == "released"


# -- staging


@contextmanager
def open_session(server: EtcdServer, wire: Wire, **options: Any) -> Iterator[Session]:
    transport = connect(server.url, transport=wire, timeout=60)
    try:
        with Session(transport, **{"ttl": LONG, **options}) as session:
            yield session
    finally:
        transport.close()


KINDS: dict[str, Callable[[Session, str], Lock]] = {
    "Mutex": Mutex,
    "RWLock.read": lambda session, name: RWLock(session, name).read(),
    "RWLock.write": lambda session, name: RWLock(session, name).write(),
    "Semaphore": lambda session, name: Semaphore(session, name, limit=3),
}


def in_threads(*works: Callable[[], object]) -> None:
    """All at once; raises what the first of them to fail raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


def take_often(lock: Lock, times: int) -> None:
    """Waiting for it and not, by turns."""
    for number in range(times):
        take(lock, blocking=bool(number % 2))


def fill_with_dead_names(transport: Transport, name: str, count: int) -> None:
    """What `count` acquisitions would leave if each contender had a name of its own, as etcd's own tools have."""
    for batch in range(0, count, 100):
        keys = [f"{name}/write/{number:x}" for number in range(batch, batch + 100)]
        transport.txn(Txn([], [Put(key, b"x" * 90) for key in keys]))
        transport.txn(Txn([], [Delete(key) for key in keys]))


def alternate(locks: Sequence[Lock], times: int) -> None:
    """All want it at once, and again as soon as they have given it back: `times` holds in all."""

    def come(lock: Lock) -> None:
        for _ in range(times // len(locks)):
            take(lock)

    in_threads(*(lambda lock=lock: come(lock) for lock in locks))


def keep_for(session: Session, prefix: str, count: int) -> list[HeldLock]:
    """`count` locks, taken by four threads."""
    held: list[HeldLock] = []

    def come(first: int) -> None:
        held.extend(Mutex(session, f"{prefix}{number:06}").acquire() for number in range(first, count, 4))

    in_threads(*(lambda first=first: come(first) for first in range(4)))
    return held


class Clock:
    """A session's, moved by hand. Such a session does nothing by itself (``background=False``)."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def bill_of_a_ttl(server: EtcdServer, session: Session, clock: Clock) -> Counter[str]:
    """What keeping `session` costs while its TTL goes by on its `clock`."""
    bill = Bill(server)
    for _ in range(60):
        clock.now += session.ttl / 60
        session.keep()
    return bill.so_far()


# -- many who wait


class Crowd:
    """Waiters for one lock, in threads of several processes with a session each. A context manager.

    First all of them wait; at `hand_over` the lock goes from one to the next.
    """

    def __init__(self, server: EtcdServer, wire: Wire, name: str, *, waiters: int, processes: int) -> None:
        self.waiters = waiters
        self.processes = processes
        self._server = server
        self._wire: Wire = wire
        self._name = name
        self._stack = ExitStack()
        self._members: list[tuple[psutil.Process, Connection]] = []

    def __enter__(self) -> Crowd:
        with self._stack as stack:
            spawn = multiprocessing.get_context("spawn")
            self._session = stack.enter_context(open_session(self._server, self._wire))
            self._held = Mutex(self._session, self._name).acquire()
            share, rest = divmod(self.waiters, self.processes)
            assert not rest
            for _ in range(self.processes):
                ours, theirs = spawn.Pipe()
                work = (self._server.url, self._wire, self._name, share, theirs)
                process = spawn.Process(target=_wait_in_line, args=work, daemon=True)
                process.start()
                theirs.close()
                stack.callback(process.join)
                stack.callback(process.kill)
                stack.callback(ours.close)
                self._members.append((psutil.Process(process.pid), ours))
            self._hear("open")
            self.joining = self._joined()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _tell(self, word: str) -> None:
        for _, member in self._members:
            member.send(word)

    def _hear(self, word: str) -> list[Any]:
        heard = []
        for _, member in self._members:
            assert member.poll(120), f"no {word!r} from a process"
            said, what = member.recv()
            assert said == word, (said, what)
            heard.append(what)
        return heard

    def _joined(self) -> Counter[str]:
        """Let them come, wait until all of them wait; what that cost."""
        bill = Bill(self._server)
        self._tell("come")
        self._hear("waiting")
        until(lambda: watches(self._server)[0] == self.processes)
        cost = bill.so_far()
        everybody = Range(self._name + "/", prefix_end(self._name + "/"), count_only=True)
        assert self._session.transport.range(everybody).count == self.waiters + 1
        return cost

    def connections(self) -> list[int]:
        """Of each process, to the server."""
        port = int(self._server.url.rpartition(":")[2])
        return [
            sum(bool(each.raddr) and each.raddr.port == port for each in process.net_connections("tcp"))
            for process, _ in self._members
        ]

    def hand_over(self) -> tuple[Counter[str], float]:
        """Release; when each has been in, once and alone: what that cost, and how many seconds it took."""
        bill, began = Bill(self._server), time.monotonic()
        assert self._held.release() == "released"
        tokens = [token for done in self._hear("done") for token in done]
        took, cost = time.monotonic() - began, bill.so_far()
        assert len(set(tokens)) == self.waiters
        return cost, took


def _wait_in_line(url: str, wire: Wire, name: str, waiters: int, parent: Connection) -> None:
    """A process of a crowd."""
    transport = connect(url, transport=wire, timeout=60)
    with Session(transport, ttl=LONG) as session:
        parent.send(("open", None))
        tokens: list[int] = []

        def come() -> None:
            with Mutex(session, name).acquire(timeout=600) as held:
                tokens.append(held.fencing_token)

        def waiting() -> int:
            behind_ours = sum(len(each.listeners) for each in list(session.contenders._by_key.values()))
            behind_others = sum(
                len(who) for each in list(session.wakeups._watches.values()) for who in list(each._waiting.values())
            )
            return behind_ours + behind_others

        parent.recv()
        threads = [threading.Thread(target=come, daemon=True) for _ in range(waiters)]
        for thread in threads:
            thread.start()
        until(lambda: waiting() == waiters)
        parent.send(("waiting", None))
        for thread in threads:
            thread.join()
        parent.send(("done", tokens))
        parent.recv()  # until it is killed: what it has open is counted


# -- for people


def say(what: str, *figures: str) -> None:
    print(f"| {what} | {' | '.join(figures)} |", flush=True)


def headline(*columns: str) -> None:
    print()
    say(*columns)
    say(*["---"] * len(columns))


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


def say_pair(what: str, pair: Pair) -> None:
    say(what, ms(pair.one), ms(pair.other), f"{pair.ratio:.2f}")


def taken_often(server: EtcdServer, wire: Wire, times: int, pairs: int) -> None:
    with open_session(server, wire) as session, open_session(server, wire) as other:
        headline(f"{wire}: taken often", "median", "a fresh lock, in turn with it", "ratio")
        for kind, like in KINDS.items():
            old = like(session, f"/{wire}/old/{kind}/000000")
            often = times if kind == "Mutex" else times // 10
            take_often(old, often)
            fresh = Fresh(lambda name, like=like: like(session, name), f"/{wire}/new/{kind}/")  # type: ignore[misc]
            say_pair(f"{kind}, after {often:,} acquisitions", in_turn(lambda old=old: take(old), fresh, times=pairs))  # type: ignore[misc]
        fresh = Fresh(lambda name: Mutex(session, name), f"/{wire}/fresh/")
        old = Mutex(session, f"/{wire}/names")
        fill_with_dead_names(session.transport, old.name, times)
        say_pair(
            f"for comparison: as if {times:,} contenders had a name each",
            in_turn(lambda: take(old), fresh, times=pairs),
        )

        def hand_over(name: str, count: int = 10) -> None:
            alternate([Mutex(session, name), Mutex(other, name)], count)

        hand_over(f"/{wire}/contended", times // 10)
        numbers = itertools.count()
        pair = in_turn(
            lambda: hand_over(f"/{wire}/contended"),
            lambda: hand_over(f"/{wire}/uncontended/{next(numbers)}"),
            times=max(1, pairs // 10),
        )
        say_pair(f"10 hand-overs between two sessions, after {times // 10:,}", pair)


def held_at_once(server: EtcdServer, wire: Wire, most: int, pairs: int) -> None:
    headline(
        f"{wire}: held by one session", "requests per TTL", "bytes to and from etcd", "another: median",
        "of an empty session, in turn", "ratio", "memory each", "all freed by close",
    )  # fmt: skip
    for count in sorted({1, max(1, most // 100), most}):
        clock = Clock()
        with (
            open_session(server, wire) as empty,
            open_session(server, wire, clock=clock, background=False) as holder,
        ):
            process = psutil.Process()
            before = process.memory_info().rss
            held = keep_for(holder, f"/{wire}/held/{count}/", count)
            memory = process.memory_info().rss - before
            bill = bill_of_a_ttl(server, holder, clock)
            pair = in_turn(
                Fresh(lambda name: Mutex(holder, name), f"/{wire}/many/{count}/"),
                Fresh(lambda name: Mutex(empty, name), f"/{wire}/few/{count}/"),
                times=pairs,
            )
            began = time.monotonic()
            holder.close()
            closed = time.monotonic() - began
            assert not any(lock.is_held() for lock in held)
        each = f"{memory / count / 1000:.1f} kB" if count > 1000 else "-"
        say(f"{count:,} locks", str(requests(bill)), f"{bill['received']:,}, {bill['sent']:,}",
            ms(pair.one), ms(pair.other), f"{pair.ratio:.2f}", each, ms(closed))  # fmt: skip


def waited_for(server: EtcdServer, wire: Wire, crowds: list[int]) -> None:
    headline(
        f"{wire}: waiting for one lock", "requests to stand in line", "requests per hand-over",
        "bytes to and from etcd per hand-over", "time per hand-over", "watches", "connections of each process",
    )  # fmt: skip
    for waiters in crowds:
        for processes in (1, 4) if waiters % 4 == 0 else (1, 2):
            name = f"/{wire}/crowd/{processes}/{waiters:04}"
            with Crowd(server, wire, name, waiters=waiters, processes=processes) as crowd:
                connections, (watching, _streams) = crowd.connections(), watches(server)
                cost, took = crowd.hand_over()
            over = waiters + 1  # the first holder's release among them
            say(f"{waiters} in {processes} process{'es' * (processes > 1)}",
                f"{requests(crowd.joining) / waiters:.2f}", f"{requests(cost) / over:.2f}",
                f"{cost['received'] / over:.0f}, {cost['sent'] / over:.0f}", ms(took / over),
                str(watching), ", ".join(map(str, connections)))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.costs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wires", nargs="+", choices=["gateway", "grpc"], default=["gateway", "grpc"])
    parser.add_argument(
        "--times", type=int, default=20_000, help="how often a mutex is taken, other kinds a tenth of it"
    )
    parser.add_argument("--locks", type=int, default=10_000, help="how many one session holds")
    parser.add_argument("--waiters", type=int, nargs="+", default=[2, 50, 500], help="even numbers")
    parser.add_argument("--pairs", type=int, default=300, help="how often two things are timed in turn")
    asked = parser.parse_args()
    with EtcdServer() as server:
        with open_session(server, asked.wires[0]) as session:
            (status,) = session.transport.status()
        print(
            f"{datetime.now(timezone.utc):%Y-%m-%d}; etcd {status.version}, one member on the same machine, without "
            f"fsync; Python {platform.python_version()}; {os.cpu_count()} CPUs, {processor()}"
        )
        for wire in asked.wires:
            taken_often(server, wire, asked.times, asked.pairs)
            held_at_once(server, wire, asked.locks, asked.pairs)
            waited_for(server, wire, asked.waiters)


def processor() -> str:
    """Its name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
