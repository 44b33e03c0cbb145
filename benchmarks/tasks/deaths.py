"""``kill -9`` to the child that runs a task: how long until the next may run."""

from __future__ import annotations

import os
import signal
import time
import uuid

from benchmarks.contest import spread
from benchmarks.findings import Section, table
from benchmarks.stage import Stage, say
from benchmarks.tasks.app_names import PEERS
from benchmarks.tasks.workers import Worker, until

__all__ = ["killed"]

_LONG = 300.0
"""Seconds: a body that does not end by itself."""


def killed(stage: Stage) -> Section:
    """With a TTL of 30 s, of the session and of the peers' locks alike."""
    section = Section("killed", "`kill -9` to a child that runs the task, TTL 30 s: until the next one starts")
    seconds: dict[str, list[float]] = {}
    for wire in ("gateway", "grpc"):
        with Worker(stage, wire, children=2) as worker:
            seconds[wire] = [_next_waits(worker) for _ in range(stage.sizes.deaths)]
        found = spread(seconds[wire])
        shown = f"{found.median:.2f} s ({min(seconds[wire]):.2f} to {max(seconds[wire]):.2f}, of {found.count})"
        section.add(f"until the next runner starts, over {wire}", found, shown, bar=3.0)
    if stage.sizes.patience:
        say(f"  peers after a kill: up to {stage.sizes.patience:g} s")
        with Worker(stage, children=len(PEERS) + 1) as worker:
            seconds |= {name: [took] for name, took in _peers(worker, stage.sizes.patience).items()}
        for name, title in PEERS.items():
            (took,) = seconds[name]
            shown = f"{took:.1f} s" if took < stage.sizes.patience else f"more than {took:.0f} s"
            section.add(f"for comparison: until {title} lets the next one run", took, shown)
    section.raw["seconds"] = seconds
    rows = [(name, ", ".join(f"{each:.2f}" for each in took)) for name, took in seconds.items()]
    section.tables.append(table(["", "seconds, of each death"], rows))
    return section


def _next_waits(worker: Worker) -> float:
    key = uuid.uuid4().hex
    task = worker.app.tasks["ours_holds"]
    task.delay(key, _LONG)
    (first,) = until(lambda: worker.starts(key)) or [None]
    assert first, "the task did not start"
    task.delay(key, 0.0)
    time.sleep(1.0)  # it stands in the queue
    assert len(worker.starts(key)) == 1
    died = time.monotonic()
    os.kill(first["pid"], signal.SIGKILL)
    assert until(lambda: len(worker.starts(key)) > 1), "nobody followed"
    return float(worker.starts(key)[1]["at"]) - died


def _peers(worker: Worker, patience: float) -> dict[str, float]:
    """They refuse at publish: so somebody publishes again and again."""
    for name in PEERS:
        worker.app.tasks[f"{name}_holds"].delay(name, _LONG)
        assert until(lambda name=name: worker.starts(name)), name  # type: ignore[misc]
    died = time.monotonic()
    for name in PEERS:
        os.kill(worker.starts(name)[0]["pid"], signal.SIGKILL)
    took: dict[str, float] = {}
    while len(took) < len(PEERS) and time.monotonic() < died + patience:
        for name in PEERS.keys() - took.keys():
            if len(starts := worker.starts(name)) > 1:
                took[name] = starts[1]["at"] - died
            else:
                worker.app.tasks[f"{name}_holds"].delay(name, _LONG)
        time.sleep(0.1)
    return {name: took.get(name, patience) for name in PEERS}
