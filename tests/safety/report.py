"""What a chaos run has found, in words, and as the table of docs/safety.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.safety.chaos import Outcome

__all__ = ["text"]


def text(outcome: Outcome) -> str:
    faults = ", ".join(f"{kind} {number}" for kind, number in sorted(outcome.injected.items()))
    lines = [
        f"{outcome.seconds:g} s of faults, seed {outcome.seed}, transport {outcome.transport}, etcd {outcome.etcd}",
        f"{sum(outcome.injected.values())} faults: {faults}",
        str(outcome.report),
        *(f"problem: {problem}" for problem in outcome.problems),
    ]
    return "\n".join(lines)
