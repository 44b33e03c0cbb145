"""What the bodies wrote down, and what it proves.

A body writes a line when it starts and one when it ends, with the time of CLOCK_MONOTONIC, which all
processes of one host share. Whether two of them ran at once is worked out from those lines, by `overlaps`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["Run", "cut_short", "note", "overlaps", "runs", "timeline", "written"]


@dataclass(frozen=True)
class Run:
    """One run of a body: `start` and `end` in seconds of CLOCK_MONOTONIC; infinite while no end is written."""

    job: str
    number: int
    worker: str
    pid: int
    start: float
    end: float = math.inf
    token: int = 0


def note(path: Path, **what: object) -> None:
    """Add a line, with the time and who writes it. One write to a file opened to append: lines do not mix."""
    line = json.dumps(what | {"time": time.monotonic(), "pid": os.getpid()}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def written(path: Path, job: str) -> list[dict[str, Any]]:
    """The lines about `job`, in the order in which they were written."""
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    return [line for line in lines if line["job"] == job]


def runs(path: Path, job: str) -> list[Run]:
    """Every run of `job`, in the order of their starts."""
    found: dict[tuple[int, int], Run] = {}
    for line in written(path, job):
        at = (line["number"], line["pid"])
        if line["what"] == "start":
            found[at] = Run(job, line["number"], line["worker"], line["pid"], line["time"], token=line["token"])
        else:
            found[at] = replace(found[at], end=line["time"])
    return sorted(found.values(), key=lambda run: run.start)


def cut_short(of: Iterable[Run], worker: str, at: float) -> list[Run]:
    """The same runs, those that `worker` never ended having ended `at` its death."""
    return [replace(run, end=at) if run.worker == worker and run.end == math.inf else run for run in of]


def overlaps(of: Iterable[Run]) -> list[tuple[Run, Run]]:
    """The pairs that ran at the same time, if only for an instant. One that ends as another starts is no overlap."""
    return [
        (one, other)
        for one, other in itertools.combinations(sorted(of, key=lambda run: run.start), 2)
        if other.start < one.end and one.start < other.end
    ]


def timeline(of: Sequence[Run], width: int = 56) -> list[str]:
    """A row of text for each process that ran a body; the digits are the numbers of the messages."""
    if not of:
        return ["(nothing ran)"]
    first = min(run.start for run in of)
    last = max(run.start if run.end == math.inf else run.end for run in of)
    scale = width / max(last - first, 0.001)
    rows: dict[str, list[str]] = {}
    for run in of:
        row = rows.setdefault(f"{run.worker} {run.pid}", [" "] * width)
        begin = min(int((run.start - first) * scale), width - 1)
        end = width if run.end == math.inf else max(begin + 1, int((run.end - first) * scale))
        row[begin:end] = [str(run.number % 10)] * (min(end, width) - begin)
    label = max(map(len, rows))
    return [f"{name:<{label}} |{''.join(row)}|" for name, row in sorted(rows.items())]
