"""What a run found: figures with their bars, in sections, with the raw data they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.contest import Spread

__all__ = ["Finding", "Section", "Verdict", "milliseconds", "table", "times"]

Verdict = Literal["reached", "missed", ""]


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure. `bar`: what it may be at most (or, with `at_least`, must be); None: it is only shown."""

    measured: str
    value: float
    shown: str
    bar: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """Whether the bar was reached; empty where there is none."""
        if self.bar is None:
            return ""
        return "reached" if (self.value >= self.bar if self.at_least else self.value <= self.bar) else "missed"


@dataclass
class Section:
    """One measurement: its findings, further tables (Markdown), plots (name to SVG) and raw data."""

    name: str
    title: str
    findings: list[Finding] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    plots: dict[str, str] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def add(self, measured: str, of: Spread | float, shown: str = "", *, bar: float | None = None, **more: Any) -> None:
        """Add a finding; a spread is shown as a ratio with its quartiles unless `shown` says otherwise."""
        value = of.median if isinstance(of, Spread) else of
        self.findings.append(Finding(measured, value, shown or (times(of) if isinstance(of, Spread) else f"{value:g}"),
                                     bar, **more))  # fmt: skip


def times(ratio: Spread) -> str:
    """A ratio for people."""
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def milliseconds(seconds: Spread) -> str:
    """A time for people."""
    return f"{seconds.median * 1e3:.2f} ms ({seconds.low * 1e3:.2f} to {seconds.high * 1e3:.2f})"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [list(columns), ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
