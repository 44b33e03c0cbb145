"""``python -m benchmarks``: measures all of it, or the sections that are named, and writes or prints the report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import growth, locks, report, requests
from benchmarks.findings import Section
from benchmarks.stage import SMOKE, Sizes, Stage, machine, say
from benchmarks.tasks import calls, deaths, footprint

_DOCS = Path(__file__).resolve().parents[1] / "docs"

SECTIONS: dict[str, Callable[[Stage], Section]] = {
    "uncontended": locks.uncontended,
    "hand-over": locks.hand_over,
    "requests": requests.counted,
    "delay": calls.publishing,
    "result": calls.results,
    "killed": deaths.killed,
    "memory": footprint.memory,
    "import": footprint.imported,
    "threads": locks.threads,
    "history": growth.history,
    "held": growth.held,
    "sessions": growth.sessions,
    "key-sizes": growth.key_sizes,
    "ceiling": growth.ceiling,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").replace("`", ""))
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of: {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--smoke", action="store_true", help="the least of everything, printed and not written")
    parser.add_argument("--rounds", type=int, help="of each contest")
    parser.add_argument(
        "--out", type=Path, help="where to write it; else docs/ if all was measured, and nowhere if not"
    )
    asked = parser.parse_args()
    if unknown := set(asked.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    sizes = SMOKE if asked.smoke else Sizes(rounds=asked.rounds, close_rounds=asked.rounds) if asked.rounds else Sizes()
    began = time.monotonic()
    sections = []
    with Stage.opened(sizes) as stage:
        about = machine(stage)
        for name in asked.sections or SECTIONS:
            say(f"{time.monotonic() - began:6.0f} s  {name}")
            sections.append(SECTIONS[name](stage))
    took = time.monotonic() - began
    out = asked.out or (None if asked.smoke or asked.sections else _DOCS)
    if out is None:
        print(report.page(about, sections, took))
    else:
        report.write(out, about, sections, took)
        say(f"{took:6.0f} s  written to {out}")


if __name__ == "__main__":
    main()
