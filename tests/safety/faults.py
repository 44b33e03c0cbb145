"""What is done to a cluster and its clients, and when: a plan made from a seed, and who carries it out.

Three tracks run side by side, each one fault after the other: `MEMBERS` (at most one is down at a time, so there is a
quorum, but for elections), `NETWORK` (between the clients and one member, or all of them) and `CLIENTS` (lock holders,
and what is theirs in etcd). Each track deals all of its faults, shuffled, before it deals any again.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

__all__ = ["KINDS", "TRACKS", "Fault", "Kind", "plan"]

T = TypeVar("T")
Kind: TypeAlias = Literal[
    "member killed",
    "member stopped",
    "leader moved",
    "network delays",
    "network drops",
    "network black hole",
    "network resets",
    "holder killed",
    "holder stopped",
    "GIL held",
    "key deleted",
    "lease revoked",
    "history compacted",
]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing to do: `at` so many seconds after the start, or when the track's last one is over; `for_` seconds."""

    at: float
    kind: Kind
    target: str = ""
    """Who, as far as that can be said beforehand: ``leader``, ``follower`` or ``all``."""
    for_: float = 0.0
    """0: it is done in a moment."""
    pick: float = 0.0
    """Which of several, as a fraction from 0 to less than 1."""

    def picked(self, several: Sequence[T]) -> T:
        """That one of `several`, which is not empty."""
        return several[int(self.pick * len(several))]

    def __str__(self) -> str:
        return f"{self.at:6.1f} s  {self.kind} {self.target}" + (f", for {self.for_:.1f} s" if self.for_ else "")


@dataclass(frozen=True, slots=True)
class _Card:
    kind: Kind
    target: str = ""
    shortest: float = 0.0
    longest: float = 0.0
    ttls: bool = False
    """The two above are in TTLs, not in seconds."""

    def dealt(self, at: float, ttl: float, dice: random.Random) -> Fault:
        for_ = dice.uniform(self.shortest, self.longest) * (ttl if self.ttls else 1.0)
        return Fault(round(at, 2), self.kind, self.target, round(for_, 2), round(dice.random(), 4))


_MEMBERS = (
    _Card("member killed", "leader", 0.2, 3.0),
    _Card("member killed", "follower", 0.2, 4.0),
    _Card("member stopped", "leader", 0.5, 5.0),
    _Card("member stopped", "follower", 0.5, 6.0),
    _Card("leader moved", "follower"),
)
_NETWORK = (
    _Card("network delays", "leader", 2.0, 4.0),
    _Card("network delays", "all", 2.0, 4.0),
    _Card("network drops", "follower", 2.0, 5.0),
    _Card("network drops", "all", 0.3, 1.3, ttls=True),
    _Card("network black hole", "leader", 2.0, 6.0),
    _Card("network black hole", "all", 0.3, 1.5, ttls=True),
    _Card("network resets", "follower", 0.5, 3.0),
    _Card("network resets", "all", 0.2, 3.0),
)
_CLIENTS = (
    _Card("holder killed"),
    _Card("holder stopped", "", 1.2, 2.2, ttls=True),
    _Card("GIL held", "", 1.2, 1.8, ttls=True),
    _Card("key deleted"),
    _Card("lease revoked"),
    _Card("history compacted"),
)
_DECKS: Mapping[str, Sequence[_Card]] = {"members": _MEMBERS, "network": _NETWORK, "clients": _CLIENTS}

TRACKS: Mapping[Kind, str] = {card.kind: track for track, deck in _DECKS.items() for card in deck}
"""Which track a kind is on."""
KINDS: tuple[Kind, ...] = tuple(TRACKS)

_FIRST = 1.0
"""Seconds of peace at the beginning."""


def plan(seed: int, seconds: float, *, ttl: float = 3.0) -> list[Fault]:
    """The faults of a run of `seconds`, in the order of time: the same ones for the same arguments."""
    dice = random.Random(f"faults/{seed}")
    dealt = (fault for deck in _DECKS.values() for fault in _track(deck, seconds, ttl, random.Random(dice.random())))
    return sorted(dealt, key=lambda fault: (fault.at, fault.kind))


def _track(deck: Sequence[_Card], seconds: float, ttl: float, dice: random.Random) -> Iterator[Fault]:
    at = _FIRST
    for card in itertools.chain.from_iterable(dice.sample(deck, len(deck)) for _ in itertools.count()):
        fault = card.dealt(at, ttl, dice)
        if fault.at + fault.for_ > seconds:
            return
        yield fault
        at += fault.for_ + dice.uniform(0.2, 2.0)
