"""What the plugin adds to a process: memory of a worker's child, time to import."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.contest import in_turn, spread
from benchmarks.findings import Section, table
from benchmarks.stage import Stage
from benchmarks.tasks.workers import Worker

__all__ = ["imported", "memory"]

_MB = 1e6
_RUNS = 200
_ROOT = Path(__file__).resolve().parents[2]


def memory(stage: Stage) -> Section:
    """Of a prefork child that has run some tasks, each kind of worker twice."""
    section = Section("memory", "Memory of a worker's child (prefork)")
    runs = min(_RUNS, stage.sizes.calls * 5)
    rows, figures = [], {}
    for title, wire, plugin, task in (
        ("without the plugin", "gateway", False, "plain"),
        ("with it, gateway", "gateway", True, "ours"),
        ("with it, gRPC", "grpc", True, "ours"),
    ):
        found = [_memory(stage, wire, runs, task, plugin=plugin) for _ in range(2)]
        resident, own = (spread([each[number] for each in found]).median for number in (0, 1))
        figures[title] = {"rss": resident, "uss": own}
        rows.append((title, f"{resident / _MB:.1f} MB", f"{own / _MB:.1f} MB"))
    bare = figures["without the plugin"]
    for wire in ("gateway", "gRPC"):
        with_it = figures[f"with it, {wire}"]
        resident, own = ((with_it[name] - bare[name]) / _MB for name in ("rss", "uss"))
        section.add(f"memory of a child over one without the plugin, {wire}", resident,
                    f"{resident:+.1f} MB resident ({own:+.1f} MB of its own)", bar=6.0)  # fmt: skip
    section.tables.append(table([f"after {runs} tasks", "resident", "its own"], rows))
    section.raw["bytes"] = figures
    return section


def _memory(stage: Stage, wire: str, runs: int, task: str, *, plugin: bool) -> tuple[int, int]:
    with Worker(stage, wire, plugin=plugin, peers=False) as worker:
        for number in range(runs):
            worker.app.tasks[task].delay(number).get(timeout=60)
        (child,) = worker.children()
        found = child.memory_full_info()
        return found.rss, found.uss


_BODY = "def x(): pass\n"
_CELERY = "from celery import Celery\napp = Celery('x')\n" + _BODY + "app.task(name='x')(x)\napp.finalize()\n"
_OURS = (
    "from celery import Celery\napp = Celery('x')\nfrom celery_etcd_lock import singleton_task\n" + _BODY
    + "singleton_task(name='x', app=app)(x)\napp.finalize()\n"
)  # fmt: skip


def imported(stage: Stage) -> Section:
    """A program that makes an app with one task: Celery's, and a singleton."""
    section = Section("import", "Import time: a program with one task")

    def seconds(program: str) -> list[float]:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True, cwd=_ROOT, env=os.environ)
        return [time.perf_counter() - began]

    contest = in_turn({"celery": lambda: seconds(_CELERY), "ours": lambda: seconds(_OURS)}, rounds=stage.sizes.imports)
    added = spread(
        [mine[0] - theirs[0] for mine, theirs in zip(contest.blocks["ours"], contest.blocks["celery"], strict=True)]
    )
    shown = f"{added.median * 1e3:+.0f} ms ({added.low * 1e3:.0f} to {added.high * 1e3:.0f})"
    section.add("import time over Celery's", added.median * 1e3, shown, bar=50.0)
    celery = contest.values("celery")
    section.tables.append(table(["", "median"], [
        ("a program with a plain task", f"{celery.median * 1e3:.0f} ms"),
        ("with a singleton", f"{contest.values('ours').median * 1e3:.0f} ms"),
    ]))  # fmt: skip
    section.raw["seconds"] = contest.raw()
    return section
