"""A call published, and a call from publish to result."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

from celery.utils import uuid

from benchmarks import plots
from benchmarks.contest import in_turn
from benchmarks.findings import Section, milliseconds, table, times
from benchmarks.stage import Stage
from benchmarks.tasks.workers import Worker, client
from celery_etcd_lock.tasks.message import addressed

__all__ = ["publishing", "results"]

NAMES = {
    "plain": "a plain task", "headed": "a plain task, and a header as long as ours", "ours": "celery-etcd-lock",
    "once": "celery-once", "singleton": "celery-singleton",
    "heimdall": "celery-heimdall", "ours-gateway": "celery-etcd-lock, gateway", "ours-grpc": "celery-etcd-lock, gRPC",
    "floor-gateway": "a plain task that sends the bare pair, gateway",
    "floor-grpc": "a plain task that sends the bare pair, gRPC",
}  # fmt: skip

_numbers = itertools.count()


def publishing(stage: Stage) -> Section:
    """``delay()``, with another argument each time: nobody has a reason to refuse it."""
    section = Section("delay", "A call published: `delay()`")
    tasks = unread(stage)
    kinds = ["plain", "headed", "ours", "once", "singleton", "heimdall"]
    headers = addressed(None, uuid(), {})  # the same for all: no more than that it is in the message
    sends = {name: tasks[name].delay for name in kinds if name != "headed"}
    sends["headed"] = lambda number: tasks["plain"].apply_async((number,), headers=headers)

    def block(name: str) -> Sequence[float]:
        seconds = []
        for _ in range(stage.sizes.calls):
            number = next(_numbers)
            began = time.perf_counter()
            sends[name](number)
            seconds.append(time.perf_counter() - began)
        return seconds

    contest = in_turn(
        {name: lambda name=name: block(name) for name in kinds},  # type: ignore[misc]
        rounds=stage.sizes.close_rounds,
    )
    section.add("delay() of a singleton (locked when run), to a plain task's", contest.ratio("ours", "plain"), bar=1.03)
    for name in [kind for kind in kinds if kind not in {"plain", "ours"}]:
        section.add(f"for comparison: delay() with {NAMES[name]}", contest.ratio(name, "plain"))
    rows = [(NAMES[name], milliseconds(contest.values(name)), times(contest.ratio(name, "plain"))) for name in kinds]
    section.tables.append(table(["", "median (quartiles)", "to a plain task"], rows))
    section.plots["delay"] = plots.bars(
        "delay(): a call published to Redis",
        [(NAMES[name], contest.values(name)) for name in kinds],
        unit="ms",
        scale=1e3,
    )
    section.raw["seconds"] = contest.raw()
    return section


def unread(stage: Stage) -> Any:
    """The tasks of an app whose queue nobody reads: who works them off would take the processor."""
    return client({"BENCH_BROKER": stage.redis.url, "BENCH_ETCD": stage.etcd.url, "BENCH_QUEUE": "unread"}).tasks


def results(stage: Stage) -> Section:
    """A task that does nothing, from publish to result, by a prefork child."""
    section = Section("result", "A task that does nothing, from publish to result (prefork)")
    with Worker(stage, "gateway") as gateway, Worker(stage, "grpc") as grpc:
        tasks = {name: gateway.app.tasks[name] for name in ("plain", "once", "singleton", "heimdall")}
        tasks |= {"ours-gateway": gateway.app.tasks["ours"], "ours-grpc": grpc.app.tasks["ours"]}
        tasks |= {"plain-grpc": grpc.app.tasks["plain"], "floor-grpc": grpc.app.tasks["bare_pair"]}
        tasks["floor-gateway"] = gateway.app.tasks["bare_pair"]

        def block(name: str) -> Sequence[float]:
            seconds = []
            more = (name.partition("-")[2],) if name.startswith("floor") else ()
            # heimdall's worker waits for the lock that its own message holds, a second by default: one is enough.
            for _ in range(1 if name == "heimdall" else stage.sizes.results):
                number = next(_numbers)
                began = time.perf_counter()
                assert tasks[name].delay(number, *more).get(timeout=30) == number
                seconds.append(time.perf_counter() - began)
            return seconds

        contest = in_turn(
            {name: lambda name=name: block(name) for name in tasks},  # type: ignore[misc]
            rounds=stage.sizes.rounds,
        )
    section.add("publish to result over gRPC, to a plain task", contest.ratio("ours-grpc", "plain-grpc"), bar=1.6)
    section.add("publish to result over the gateway, to a plain task", contest.ratio("ours-gateway", "plain"), bar=2.0)
    kinds = ["plain", "floor-grpc", "floor-gateway", "ours-grpc", "ours-gateway", "once", "singleton", "heimdall"]
    for wire, plain in (("grpc", "plain-grpc"), ("gateway", "plain")):
        section.add(f"for comparison: {NAMES[f'floor-{wire}']}, to one that does not",
                    contest.ratio(f"floor-{wire}", plain))  # fmt: skip
    for name in kinds[5:]:
        section.add(f"for comparison: publish to result with {NAMES[name]}", contest.ratio(name, "plain"))
    rows = [(NAMES[name], milliseconds(contest.values(name)), times(contest.ratio(name, "plain"))) for name in kinds]
    section.tables.append(table(["", "median (quartiles)", "to a plain task"], rows))
    section.plots["result"] = plots.bars(
        "From publish to result", [(NAMES[name], contest.values(name)) for name in kinds], unit="ms", scale=1e3
    )
    section.raw["seconds"] = contest.raw()
    return section
