"""What a chaos run has found: in words, and as the table of docs/safety.md."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from celery_etcd_lock import __version__

if TYPE_CHECKING:
    from tests.safety.chaos import Outcome

__all__ = ["BEGIN", "END", "table", "text", "write"]

BEGIN = "<!-- written by make chaos: begin -->"
END = "<!-- written by make chaos: end -->"


def text(outcome: Outcome) -> str:
    """For people at a terminal."""
    lines = [
        f"{outcome.seconds:.0f} s of faults, seed {outcome.seed}, transport {outcome.transport}, etcd {outcome.etcd}",
        f"faults injected: {_faults(outcome)}",
        str(outcome.report),
        *(f"problem: {problem}" for problem in outcome.problems),
    ]
    return "\n".join(lines)


def write(page: Path, outcome: Outcome) -> None:
    """Put the figures between the two marks in `page`. `ValueError` if it does not have them."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no place for the figures: the lines {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{BEGIN}\n{table(outcome)}\n{END}{after}")


def table(outcome: Outcome) -> str:
    """The figures, and where and when they were taken, in Markdown."""
    rows = [("", ""), ("---", "---"), *_rows(outcome)]
    return "\n".join(f"| {name} | {figure} |" for name, figure in rows)


def _rows(outcome: Outcome) -> Iterator[tuple[str, str]]:
    found = outcome.report
    day = time.strftime("%Y-%m-%d", time.gmtime())
    kernel = platform.release().split("-")[0]
    yield "run", f"{day}, {outcome.seconds:.0f} s, seed {outcome.seed}, transports: {outcome.transport}"
    python = f"Python {platform.python_version()}"
    machine = f"{platform.system()} {kernel}, {os.cpu_count()} cores"
    yield "with", f"celery-etcd-lock {__version__}, three members of etcd {outcome.etcd}, {python}, {machine}"
    yield "faults injected", _faults(outcome)
    yield "acquisitions", f"{found.acquisitions}, of which {found.killed} were ended by SIGKILL"
    yield "hand-overs", f"{found.handovers}, {found.between_processes} from one process to another"
    by_hand = f"{found.losses_by_hand} after a key was deleted or a lease revoked by hand"
    yield "losses", f"{found.losses}: {found.losses_in_time} said in time, {by_hand}, the others on waking up"
    yield "leases that etcd ended early", str(found.leases_ended_early)
    yield "worst takeover", f"{found.worst_takeover:.1f} s"
    late = ", ".join(
        f"{cause} {number} (with {found.overlaps[cause]} others)" for cause, number in sorted(found.late.items())
    )
    yield "holders who could not know (excused)", late or "none"
    fences = Counter(each.fence for each in found.excused)
    yield (
        "their overlaps at the fenced store",
        f"{fences['refused']} refused, {fences['nothing came late']} in which nothing was written late, 0 let through",
    )
    yield "**violations**", f"**{len(found.violations)}**"


def _faults(outcome: Outcome) -> str:
    each = ", ".join(f"{kind} {number}" for kind, number in sorted(outcome.injected.items()))
    return f"{sum(outcome.injected.values())}: {each}"
