"""What is done to beats and their etcd, and when: a plan made from a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["DECK", "SHORT", "Fault", "Kind", "plan"]

Kind: TypeAlias = Literal[
    "killed",
    "frozen",
    "stopped",
    "killed before publish",
    "killed after publish",
    "frozen before publish",
    "frozen after publish",
    "etcd killed",
    "etcd frozen",
]
"""*Before publish* and *after publish* are moments of a tick, both between its fence and its confirmation."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing to do, so many seconds after the one before is over."""

    after: float
    kind: Kind
    target: Literal["leader", "standby"]
    """Of the beats, or of the members of etcd."""
    for_: float
    """Seconds: until it is started again, or goes on."""
    pick: float = 0.0
    """Which of several, as a fraction from 0 to less than 1."""

    def __str__(self) -> str:
        return f"{self.target} {self.kind} for {self.for_:.1f} s"


SHORT = (
    Fault(1.0, "killed after publish", "leader", 0.5),
    Fault(2.0, "frozen before publish", "leader", 4.0),
    Fault(1.0, "stopped", "leader", 0.5),
    Fault(1.5, "etcd killed", "leader", 1.0),
)
"""Something of each sort, in less than half a minute, with a TTL of 3 s."""

DECK: tuple[tuple[Kind, Literal["leader", "standby"], float, float], ...] = (
    # Seconds in TTLs: a freeze that costs the leadership, and one that does not.
    ("killed", "leader", 0.1, 2.0),
    ("killed", "leader", 0.1, 0.5),
    ("killed", "standby", 0.1, 1.0),
    ("frozen", "leader", 1.2, 2.5),
    ("frozen", "leader", 1.2, 2.5),
    ("frozen", "leader", 0.1, 0.6),
    ("frozen", "standby", 0.5, 2.5),
    ("killed before publish", "leader", 0.1, 1.0),
    ("killed after publish", "leader", 0.1, 1.0),
    ("frozen before publish", "leader", 1.2, 2.5),
    ("frozen after publish", "leader", 1.2, 2.5),
    ("stopped", "leader", 0.1, 1.0),
    ("stopped", "leader", 0.1, 0.3),
    ("stopped", "standby", 0.1, 1.0),
    ("etcd killed", "leader", 0.1, 1.0),
    ("etcd frozen", "leader", 0.5, 1.5),
    ("etcd killed", "standby", 0.1, 1.0),
)
"""Kind, target, and for how long at least and at most."""


def plan(seed: int, ttl: float) -> Iterator[Fault]:
    """The faults of a run, without end: the same ones for the same arguments. Each kind before any comes again."""
    dice = random.Random(f"{seed}/beat")
    for kind, target, shortest, longest in itertools.chain.from_iterable(
        dice.sample(DECK, len(DECK)) for _ in itertools.count()
    ):
        after, for_ = dice.uniform(0.5, 4.0), dice.uniform(shortest, longest) * ttl
        yield Fault(round(after, 2), kind, target, round(for_, 2), round(dice.random(), 4))
