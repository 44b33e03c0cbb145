"""How costs grow: with a lock's history, locks held, sessions, sizes of keys; and what one etcd bears at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import psutil

from benchmarks import plots
from benchmarks.contenders.driver import Contenders
from benchmarks.contest import Spread, in_turn
from benchmarks.findings import Section, milliseconds, table, times
from benchmarks.stage import Stage
from celery_etcd_lock.etcd.api import Range, prefix_end
from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.testing import EtcdServer
from tests.costs import Bill, Clock, Wire, bill_of_a_ttl, fill_with_dead_names, keep_for, open_session, requests, take

__all__ = ["ceiling", "held", "history", "key_sizes", "sessions"]

WIRES: tuple[Wire, ...] = ("grpc", "gateway")
_PAIRS = 10


def _timed(work: Callable[[], object], pairs: int = _PAIRS) -> Callable[[], Sequence[float]]:
    def block() -> list[float]:
        seconds = []
        for _ in range(pairs):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return seconds

    return block


class _Fresh:
    """Takes, each time, a lock that nobody had before."""

    def __init__(self, session: Session, prefix: str) -> None:
        self._session, self._prefix, self._number = session, prefix, 0

    def __call__(self) -> None:
        self._number += 1
        take(Mutex(self._session, f"{self._prefix}{self._number:07}"))


def history(stage: Stage) -> Section:
    """A lock that was taken again and again, with nothing compacted, beside one that nobody had before."""
    section = Section("history", "A lock that was taken often since the last compaction")
    etcd, sizes = stage.quick_etcd, stage.sizes
    marks = sorted({max(1, sizes.taken // part) for part in (1_000, 100, 10, 2, 1)})
    curves: dict[str, list[tuple[float, float]]] = {}
    for wire in WIRES:
        with open_session(etcd, wire) as session:
            old, fresh, taken, ratio = Mutex(session, f"/old/{wire}/0000000"), _Fresh(session, f"/new/{wire}/"), 0, None
            for mark in marks:
                for _ in range(mark - taken):
                    take(old)
                taken = mark
                contest = in_turn(
                    {"old": _timed(partial(take, old)), "fresh": _timed(fresh)},
                    rounds=sizes.growth_rounds,
                )
                ratio = contest.ratio("old", "fresh")
                curves.setdefault(f"celery-etcd-lock, {wire}", []).append((mark, ratio.median))
            assert ratio is not None
            section.add(f"a lock taken {taken:,} times, to a fresh one, {wire}", ratio, bar=1.2)
            if wire == "gateway":
                dead = Mutex(session, "/dead-names")
                fill_with_dead_names(session.transport, dead.name, sizes.taken // 100 * 100)
                contest = in_turn(
                    {"dead": _timed(partial(take, dead)), "fresh": _timed(fresh)}, rounds=sizes.growth_rounds
                )
                section.add("for comparison: had each contender a name of its own", contest.ratio("dead", "fresh"))
    section.plots["history"] = plots.lines(
        "A lock taken often, to a fresh one", "times taken since the last compaction", "ratio", curves
    )
    section.raw["ratios"] = curves
    return section


def held(stage: Stage) -> Section:
    """One more lock, and the renewals, of a process that holds many already."""
    section = Section("held", "Locks held by one process")
    etcd, sizes, rows = stage.quick_etcd, stage.sizes, []
    curves: dict[str, list[tuple[float, float]]] = {}
    for wire in WIRES:
        asked: list[int] = []
        ratios: list[Spread] = []
        for count in sizes.held:
            clock = Clock()
            with (
                open_session(etcd, wire) as empty,
                open_session(etcd, wire, clock=clock, background=False) as full,
            ):
                keep_for(full, f"/held/{wire}/{count}/", count)
                asked.append(requests(bill_of_a_ttl(etcd, full, clock)))
                contest = in_turn(
                    {
                        "full": _timed(_Fresh(full, f"/many/{wire}/{count}/")),
                        "empty": _timed(_Fresh(empty, f"/few/{wire}/{count}/")),
                    },
                    rounds=sizes.growth_rounds,
                )
            ratios.append(contest.ratio("full", "empty"))
            rows.append((wire, f"{count:,}", asked[-1], milliseconds(contest.values("full")), times(ratios[-1])))
            curves.setdefault(f"celery-etcd-lock, {wire}", []).append((count, ratios[-1].median))
        grown, each_time = max(asked) - min(asked), ", ".join(map(str, asked))
        counts = ", ".join(f"{each:,}" for each in sizes.held)
        measured = f"how much requests in a TTL grow with locks held, {counts}, {wire}"
        section.add(measured, grown, f"{grown} ({each_time})", bar=0, note="constant")
        worst = max(ratios, key=lambda each: each.median)
        section.add(f"one more lock, beside them, to that of a process that holds none, {wire}", worst, bar=1.2)
        section.raw[wire] = {"requests": asked, "ratios": [each.plain() for each in ratios]}
    section.tables.append(
        table(["", "held", "requests in a TTL", "one more: median", "to a process that holds none"], rows)
    )
    section.plots["held"] = plots.lines(
        "One more lock, to that of a process that holds none", "locks held", "ratio", curves
    )
    return section


def sessions(stage: Stage) -> Section:
    """Sessions beside each other on one etcd, each with a lock that it holds."""
    section = Section("sessions", "Processes: sessions on one etcd, each holding a lock")
    sizes, rows, curve = stage.sizes, [], []
    seconds = 3.0 if sizes.growth_rounds > 5 else 0.5
    for count in sizes.sessions:
        with EtcdServer() as etcd, ExitStack() as stack:
            pid = etcd.pid
            before = _memory(pid)
            for number in range(count):
                session = stack.enter_context(open_session(etcd, "gateway", ttl=5))
                Mutex(session, f"/held/{number}").acquire()
            bill, used, began = Bill(etcd), _processor(pid), time.monotonic()
            time.sleep(seconds)
            took = time.monotonic() - began
            rate, used = requests(bill.so_far()) / took, (_processor(pid) - used) / took
            session = stack.enter_context(open_session(etcd, "gateway"))
            contest = in_turn({"pair": _timed(_Fresh(session, "/one/"))}, rounds=sizes.growth_rounds)
            pair = contest.values("pair")
            memory = (_memory(pid) - before) / count
        rows.append((count, f"{rate:.1f}", f"{used * 100:.1f} %", f"{memory / 1e3:.0f} kB", milliseconds(pair)))
        curve.append((float(count), pair.median * 1e3))
    section.tables.append(table(
        ["sessions, TTL 5 s", "requests per second", "of one processor, by etcd",
             "memory of etcd, each", "a lock and unlock beside them"],
        rows,
    ))  # fmt: skip
    section.plots["sessions"] = plots.lines("A lock and unlock, beside sessions", "sessions", "ms", {"gateway": curve})
    section.raw["curve"] = curve
    return section


def _memory(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def _processor(pid: int) -> float:
    times_of = psutil.Process(pid).cpu_times()
    return float(times_of.user + times_of.system)


def key_sizes(stage: Stage) -> Section:
    """Long names: time, and what a lock and unlock leave in etcd's database until it is compacted."""
    section = Section("key-sizes", "Long names")
    sizes, rows, curve = stage.sizes, [], []
    times_taken = 50 * sizes.growth_rounds
    for length in sizes.key_bytes:
        with EtcdServer() as etcd, open_session(etcd, "gateway") as session:
            lock = Mutex(session, "/" + "k" * (length - 1))
            take(lock)
            before = _in_use(session)
            contest = in_turn({"pair": _timed(partial(take, lock), 50)}, rounds=sizes.growth_rounds, warm_up=0)
            _settle(session)
            left = (_in_use(session) - before) / times_taken
            pair = contest.values("pair")
        rows.append((f"{length:,} bytes", milliseconds(pair), f"{left:,.0f} bytes"))
        curve.append((float(length), pair.median * 1e3))
    section.tables.append(table(["a name of", "a lock and unlock", "left in etcd's database by each"], rows))
    section.plots["key-sizes"] = plots.lines(
        "A lock and unlock, by the length of its name", "bytes", "ms", {"gateway": curve}
    )
    section.raw["curve"] = curve
    return section


def _in_use(session: Session) -> int:
    (status,) = session.transport.status()
    return status.db_size_in_use


def _settle(session: Session) -> None:
    """etcd writes to its database some 10 times a second."""
    time.sleep(0.3)
    session.transport.range(Range("/", prefix_end("/"), limit=1))


def ceiling(stage: Stage) -> Section:
    """As many pairs in a second as one etcd on this machine gives, to the floor and to us, by several processes."""
    section = Section("ceiling", "As much as this machine's etcd gives: pairs in a second, by 3 processes of 8 threads")
    rates = {}
    for kind in ("floor-grpc", "ours-grpc", "floor-gateway", "ours-gateway"):
        with Contenders(stage.etcd.url) as contenders:
            crowd = [contenders.start(kind) for _ in range(3)]
            for number, each in enumerate(crowd):
                each.tell("crowd", f"/ceiling/{kind}/{number}", stage.sizes.crowd_seconds, 8)
            rates[kind] = sum(each.hear("counted")["count"] for each in crowd) / stage.sizes.crowd_seconds
    section.tables.append(table(["", "pairs in a second"], [(kind, f"{rate:,.0f}") for kind, rate in rates.items()]))
    section.raw["pairs_per_second"] = rates
    return section
