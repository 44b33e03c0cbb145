"""Locks beside each other: taken and given back, handed over, and by many threads at once."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import partial

from benchmarks import plots
from benchmarks.contenders.driver import GO, Contender, Contenders
from benchmarks.contest import Contest, in_turn, spread
from benchmarks.findings import Section, milliseconds, table, times
from benchmarks.stage import Stage
from celery_etcd_lock.testing import EtcdServer

__all__ = ["hand_over", "threads", "uncontended"]

NAMES = {
    "floor-grpc": "the floor, gRPC", "floor-gateway": "the floor, gateway",
    "same-grpc": "our own two requests, bare, gRPC", "same-gateway": "our own two requests, bare, gateway",
    "ours-grpc": "celery-etcd-lock, gRPC", "ours-gateway": "celery-etcd-lock, gateway",
    GO: "Go's concurrency.Mutex", "etcd3": "python-etcd3's Lock (gRPC)", "etcd3gw": "etcd3gw's Lock (gateway)",
    "redis": "redis-py's Lock (Redis, in memory)",
}  # fmt: skip


def uncontended(stage: Stage) -> Section:
    """A lock that nobody else wants, taken and given back."""
    section = Section("uncontended", "A lock that nobody else wants: acquire and release")
    with Contenders(stage.etcd.url, stage.redis.url) as contenders:
        started = {kind: contenders.start(kind) for kind in NAMES}
        took = {kind: -each.processor_time() for kind, each in started.items()}
        warm_up = 1
        contest = in_turn(
            {kind: partial(each.bench, f"/uncontended/{kind}", stage.sizes.pairs) for kind, each in started.items()},
            rounds=stage.sizes.close_rounds, warm_up=warm_up,
        )  # fmt: skip
        pairs = stage.sizes.pairs * (stage.sizes.close_rounds + warm_up)
        took = {kind: (took[kind] + each.processor_time()) / pairs for kind, each in started.items()}
    for ours, floor in (("ours-grpc", "floor-grpc"), ("ours-gateway", "floor-gateway")):
        wire = ours.partition("-")[2]
        section.add(f"acquire and release over {wire}, to the floor", contest.ratio(ours, floor), bar=1.15)
        section.add(
            f"for comparison: over {wire}, to our own two requests as bare bytes", contest.ratio(ours, f"same-{wire}")
        )
    for ours, other, bar in (
        ("ours-grpc", GO, 1.2), ("ours-gateway", GO, 2.0), ("ours-grpc", "etcd3", 0.5), ("ours-gateway", "etcd3", 0.75),
        ("ours-gateway", "etcd3gw", 0.4),
    ):  # fmt: skip
        wire = ours.partition("-")[2]
        section.add(f"acquire and release over {wire}, to {NAMES[other]}", contest.ratio(ours, other), bar=bar)
    for other in ("floor-grpc", "floor-gateway"):
        section.add(f"for comparison: {NAMES[other]}, to Go's Mutex", contest.ratio(other, GO))
    _show(section, contest, "a lock taken and given back, against an etcd that writes to disk", took)
    return section


def _show(section: Section, contest: Contest, what: str, processor: Mapping[str, float] | None = None) -> None:
    """`processor`: the seconds of it that the client itself takes for one, all its threads and the system's part."""
    shown = [kind for kind in NAMES if kind in contest.blocks]
    rows = [[NAMES[kind], milliseconds(contest.values(kind)), times(contest.ratio(kind, GO))] for kind in shown]
    columns = ["", "median (quartiles)", "to Go's Mutex"]
    if processor is not None:
        columns.append("of it, the client's processor")
        for kind, row in zip(shown, rows, strict=True):
            row.append(f"{processor[kind] * 1e3:.2f} ms")
        section.raw["processor_seconds"] = processor
    section.tables.append(table(columns, rows))
    bars = [(NAMES[kind], contest.values(kind)) for kind in shown]
    section.plots[section.name] = plots.bars(what[:1].upper() + what[1:], bars, unit="ms", scale=1e3)
    section.raw["seconds"] = contest.raw()


class _Two:
    """Two processes of one kind that pass a lock to each other."""

    def __init__(self, kind: str, etcd: EtcdServer, contenders: Contenders) -> None:
        self.kind = kind
        self.etcd = etcd
        self.name = f"/handed-over/{kind}"
        self.holder, self.waiter = contenders.start(kind), contenders.start(kind)
        self.holder.tell("lock", self.name)
        self.holder.hear("held")

    def pass_on(self) -> float:
        """Seconds from before the release is sent until the other one has the lock."""
        before = _watchers(self.etcd)
        self.waiter.tell("lock", self.name)
        began = time.monotonic()
        # The watch of the one before may end only now: so that the number stays is no sign that nobody waits.
        while self.kind != "redis" and _watchers(self.etcd) <= before and time.monotonic() < began + 0.3:
            time.sleep(0.01)
        time.sleep(0.05 + (time.monotonic() * 997 % 0.1))  # whoever polls is to be met at any moment
        self.holder.tell("unlock")
        until = self.holder.hear("released")["until"]
        at = self.waiter.hear("held")["at"]
        self.holder, self.waiter = self.waiter, self.holder
        return float(at) - float(until)


def _watchers(etcd: EtcdServer) -> int:
    found = re.search(r"^etcd_debugging_mvcc_watcher_total (\S+)$", etcd.metrics(), re.MULTILINE)
    return int(float(found[1])) if found else 0


def hand_over(stage: Stage) -> Section:
    """From a release to the start of the next, who waits in another process."""
    section = Section("hand-over", "A lock handed over: from the release to the next one's start")
    # Not python-etcd3: with a tenacity of today its Lock cannot wait. Nor etcd3gw, whose Lock never waits.
    kinds = ["floor-grpc", "floor-gateway", "ours-grpc", "ours-gateway", GO, "redis"]
    with Contenders(stage.etcd.url, stage.redis.url) as contenders:
        pairs = {kind: _Two(kind, stage.etcd, contenders) for kind in kinds}
        contest = in_turn(
            {kind: lambda two=two: [two.pass_on()] for kind, two in pairs.items()},  # type: ignore[misc]
            rounds=stage.sizes.hand_overs,
            warm_up=2,
        )
    for wire, bar in (("grpc", 1.2), ("gateway", 2.0)):
        ours, go = contest.values(f"ours-{wire}"), contest.values(GO)
        shown = f"{ours.median / go.median:.2f} (round by round {times(contest.ratio(f'ours-{wire}', GO))})"
        section.add(f"hand-over over {wire}, p50, to Go's Mutex", ours.median / go.median, shown, bar=bar)
        floor = contest.values(f"floor-{wire}").median
        section.add(f"for comparison: the floor's hand-over over {wire} to Go's; ours to the floor's",
                    floor / go.median, f"{floor / go.median:.2f}; {ours.median / floor:.2f}")  # fmt: skip
    _show(section, contest, "from a release to the next one's start")
    return section


def threads(stage: Stage) -> Section:
    """Pairs in a second, by threads with a lock each; and by Go's goroutines, which shows how etcd itself scales."""
    section = Section("threads", "Different locks by threads of one process: throughput")
    kinds = ["floor-grpc", "ours-grpc", "floor-gateway", "ours-gateway", GO]
    sizes = stage.sizes
    curves: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with Contenders(stage.etcd.url) as contenders:
        started = {kind: contenders.start(kind) for kind in kinds}

        def rate(contender: Contender, kind: str, count: int) -> float:
            contender.tell("crowd", f"/threads/{kind}/{count}", sizes.crowd_seconds, count)
            return float(contender.hear("counted")["count"]) / sizes.crowd_seconds

        for count in sizes.threads:
            contest = in_turn(
                {kind: lambda kind=kind, count=count: [rate(started[kind], kind, count)] for kind in kinds},  # type: ignore[misc]
                rounds=min(3, sizes.rounds), warm_up=0,
            )  # fmt: skip
            for kind in kinds:
                curves[kind].append((count, contest.values(kind).median))
    most = 8 if 8 in sizes.threads else sizes.threads[-1]
    speedup = {kind: dict(curve)[most] / dict(curve)[sizes.threads[0]] for kind, curve in curves.items()}
    there = speedup[GO] >= 4
    for wire in ("grpc", "gateway"):
        ours, floor = speedup[f"ours-{wire}"], speedup[f"floor-{wire}"]
        section.add(
            f"throughput of {most} threads to one, over {wire}", ours,
            f"{ours:.2f}; the floor's own: {floor:.2f}; etcd's, asked by Go: {speedup[GO]:.2f}",
            bar=4.0 if there else None, at_least=True,
            note="" if there else "a bar of 4 is for where etcd itself scales so, which it does not on this machine",
        )  # fmt: skip
    rows = [(NAMES[kind], *(f"{rate:,.0f}" for _, rate in curves[kind])) for kind in kinds]
    section.tables.append(table(["pairs in a second, by threads", *map(str, sizes.threads)], rows))
    named = {NAMES[kind]: curve for kind, curve in curves.items()}
    section.plots["threads"] = plots.lines("Pairs in a second", "threads", "pairs/s", named)
    section.raw["pairs_per_second"] = curves
    return section


def p50(values: list[float]) -> float:
    """The median."""
    return spread(values).median
