"""What the plugin adds to a process: memory of a worker's child, time to import."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contest import in_turn, spread
from benchmarks.findings import Section, table
from benchmarks.stage import Stage
from benchmarks.tasks.workers import Worker

__all__ = ["imported", "memory"]

_MB = 1e6
_RUNS = 200
_GRPCIO = "uses grpcio itself, without the plugin"
_PROTOBUF = "uses grpcio itself and has protobuf, without the plugin"
_PROTOBUFS = ("google.protobuf.descriptor_pb2", "google.protobuf.message_factory")
"""What ours imports of it. All of it before the fork, as ours has it."""
_ROOT = Path(__file__).resolve().parents[2]


def memory(stage: Stage) -> Section:
    """Of a prefork child that has run some tasks, each kind of worker twice."""
    section = Section("memory", "Memory of a worker's child (prefork)")
    runs = min(_RUNS, stage.sizes.calls * 5)
    rows, figures = [], {}
    for title, plugin, task, wire, include in (
        ("without the plugin", False, "plain", "gateway", ()),
        ("with it, gateway", True, "ours", "gateway", ()),
        ("with it, gRPC", True, "ours", "grpc", ()),
        (_GRPCIO, False, "bare_pair", "grpc", ("grpc",)),
        (_PROTOBUF, False, "bare_pair", "grpc", ("grpc", *_PROTOBUFS)),
    ):
        with_wire = [wire] if task == "bare_pair" else []
        found = [_memory(stage, wire, runs, task, with_wire, plugin=plugin, include=include) for _ in range(2)]
        resident, own = (spread([each[number] for each in found]).median for number in (0, 1))
        figures[title] = {"rss": resident, "uss": own}
        rows.append((title, f"{resident / _MB:.1f} MB", f"{own / _MB:.1f} MB"))
    bare = figures["without the plugin"]
    for measured, title, bar in (
        ("memory of a child over one without the plugin, gateway", "with it, gateway", 6.0),
        ("memory of a child over one without the plugin, gRPC", "with it, gRPC", 6.0),
        (f"for comparison: memory of a child that {_GRPCIO}", _GRPCIO, None),
        (f"for comparison: memory of a child that {_PROTOBUF}", _PROTOBUF, None),
    ):
        resident, own = ((figures[title][name] - bare[name]) / _MB for name in ("rss", "uss"))
        section.add(measured, resident, f"{resident:+.1f} MB resident ({own:+.1f} MB of its own)", bar=bar)
    section.tables.append(table([f"after {runs} tasks", "resident", "its own"], rows))
    section.raw["bytes"] = figures
    return section


def _memory(
    stage: Stage, wire: str, runs: int, task: str, more: Sequence[str], *, plugin: bool, include: Sequence[str]
) -> tuple[int, int]:
    with Worker(stage, wire, plugin=plugin, peers=False, include=include) as worker:
        for number in range(runs):
            worker.app.tasks[task].delay(number, *more).get(timeout=60)
        (child,) = worker.children()
        found = child.memory_full_info()
        return found.rss, found.uss


def _used() -> float:
    """Seconds of processor time, of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


_BODY = "def x(): pass\n"
_CELERY = "from celery import Celery\napp = Celery('x')\n" + _BODY + "app.task(name='x')(x)\napp.finalize()\n"
_OURS = (
    "from celery import Celery\napp = Celery('x')\nfrom celery_etcd_lock import singleton_task\n" + _BODY
    + "singleton_task(name='x', app=app)(x)\napp.finalize()\n"
)  # fmt: skip


def imported(stage: Stage) -> Section:
    """A program that makes an app with one task: Celery's, and a singleton.

    In processor time: what else runs here would double a wall clock's. All of it compiled, as pip leaves it: this tree
    need not be, and where Python may write no bytecode it would be compiled each time, and Celery not.
    """
    section = Section("import", "Import time: a program with one task")
    with tempfile.TemporaryDirectory(prefix="bench-") as compiled:
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": compiled}

        def seconds(program: str) -> list[float]:
            before = _used()
            subprocess.run([sys.executable, "-c", program], check=True, cwd=_ROOT, env=environment)
            return [_used() - before]

        programs = {"celery": lambda: seconds(_CELERY), "ours": lambda: seconds(_OURS)}
        contest = in_turn(programs, rounds=stage.sizes.imports)  # the round that warms up compiles
    added = spread(
        [mine[0] - theirs[0] for mine, theirs in zip(contest.blocks["ours"], contest.blocks["celery"], strict=True)]
    )
    shown = f"{added.median * 1e3:+.0f} ms ({added.low * 1e3:.0f} to {added.high * 1e3:.0f})"
    section.add("import time over Celery's (processor)", added.median * 1e3, shown, bar=50.0)
    celery = contest.values("celery")
    section.tables.append(table(["processor time", "median"], [
        ("a program with a plain task", f"{celery.median * 1e3:.0f} ms"),
        ("with a singleton", f"{contest.values('ours').median * 1e3:.0f} ms"),
    ]))  # fmt: skip
    section.raw["seconds"] = contest.raw()
    return section
