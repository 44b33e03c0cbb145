"""Contests: contestants measured in turn, A B A B, and what that says: medians, their spread, and ratios.

Whatever slows the machine down for a while hits all contestants of a round alike, so the ratio of two is taken round
by round, and its median and quartiles over the rounds are what is reported. Nothing here knows what is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Contest", "Spread", "in_turn", "spread"]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float
    count: int

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0], len(values))
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high, len(values))


class Contest:
    """What came of the rounds: for each contestant and round the values of that block."""

    def __init__(self, blocks: Mapping[str, Sequence[Sequence[float]]]) -> None:
        self.blocks = {name: [list(block) for block in rounds] for name, rounds in blocks.items()}

    def values(self, name: str) -> Spread:
        """Of one contestant, over all its rounds."""
        return spread([value for block in self.blocks[name] for value in block])

    def ratio(self, one: str, other: str) -> Spread:
        """Of the medians of `one` and `other`, round by round."""
        pairs = zip(self.blocks[one], self.blocks[other], strict=True)
        return spread([statistics.median(mine) / statistics.median(theirs) for mine, theirs in pairs])

    def raw(self) -> dict[str, Any]:
        """All of it, as JSON takes it; seconds to a tenth of a microsecond."""
        return {
            name: [[round(value, 7) for value in block] for block in rounds] for name, rounds in self.blocks.items()
        }


def in_turn(contestants: Mapping[str, Callable[[], Sequence[float]]], *, rounds: int, warm_up: int = 1) -> Contest:
    """Each contestant gives a block of values, one after the other, `rounds` times, `warm_up` more before it counts.

    Every other round goes backwards, so that nobody always comes after the same one.
    """
    blocks: dict[str, list[Sequence[float]]] = {name: [] for name in contestants}
    for number in range(-warm_up, rounds):
        for name in list(contestants) if number % 2 else reversed(list(contestants)):
            block = contestants[name]()
            if number >= 0:
                blocks[name].append(block)
    return Contest(blocks)
