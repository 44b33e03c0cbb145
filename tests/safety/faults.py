"""What is done to a cluster and its clients, and when: a plan made from a seed, and who carries it out.

Three tracks run side by side, each one fault after the other: `MEMBERS` (at most one is down at a time, so there is a
quorum, but for elections), `NETWORK` (between all clients, or those of one side, and one member, or all) and `CLIENTS`
(lock holders, and what is theirs in etcd). Each track deals all of its faults, shuffled, before it deals any again.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

__all__ = ["KINDS", "TRACKS", "Fault", "Kind", "Side", "plan"]

T = TypeVar("T")
Side: TypeAlias = Literal["left", "right", "both"]
Kind: TypeAlias = Literal[
    "member killed",
    "member stopped",
    "leader moved",
    "network delays",
    "network drops",
    "network black hole",
    "network resets",
    "network fades",
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
    side: Side = "both"
    """Of the network: whose. The clients are on two sides, each with a network of its own."""
    pick: float = 0.0
    """Which of several, as a fraction from 0 to less than 1."""

    def picked(self, several: Sequence[T]) -> T:
        """That one of `several`, which is not empty."""
        return several[int(self.pick * len(several))]

    def __str__(self) -> str:
        target = f", {self.target}" if self.target else ""
        target += f" ({self.side})" if self.side != "both" else ""
        for_ = f", for {self.for_:.1f} s" if self.for_ else ""
        return f"{self.at:6.1f} s  {self.kind}{target}{for_}"


_SIDES: Sequence[Side] = ("left", "right", "both")


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
        side = dice.choice(_SIDES) if TRACKS[self.kind] == "network" else "both"
        return Fault(round(at, 2), self.kind, self.target, round(for_, 2), side, round(dice.random(), 4))


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
    _Card("network drops", "all", 0.3, 1.6, ttls=True),
    _Card("network black hole", "leader", 2.0, 6.0),
    _Card("network black hole", "all", 0.3, 2.0, ttls=True),
    _Card("network resets", "follower", 0.5, 3.0),
    _Card("network resets", "all", 0.2, 3.0),
    _Card("network fades", "all", 1.4, 2.6, ttls=True),
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


def plan(seed: int, seconds: float, *, ttl: float = 3.0, only: Collection[Kind] = KINDS) -> list[Fault]:
    """The faults of a run of `seconds`, in the order of time: the same ones for the same arguments."""
    dealt: list[Fault] = []
    for track, deck in _DECKS.items():
        cards = [card for card in deck if card.kind in only]
        if cards:
            dealt += _track(cards, seconds, ttl, random.Random(f"{seed}/{track}"))
    return sorted(dealt, key=lambda fault: (fault.at, fault.kind))


def _track(deck: Sequence[_Card], seconds: float, ttl: float, dice: random.Random) -> Iterator[Fault]:
    at = _FIRST
    for card in itertools.chain.from_iterable(dice.sample(deck, len(deck)) for _ in itertools.count()):
        fault = card.dealt(at, ttl, dice)
        if fault.at + fault.for_ > seconds:
            return
        yield fault
        at += fault.for_ + dice.uniform(0.2, 2.0)
