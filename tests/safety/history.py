"""The record of a safety run: what each process did and was told, what was done to it, and what the store took.

Every process appends to a file of its own, one JSON object a line, so nobody waits for anybody and a SIGKILL loses
at most the end of one line. A line is written *before* the action that it announces goes on (see `Event`).

**Times** are CLOCK_MONOTONIC in seconds (`now`). On Linux that is one clock for all processes since boot, so times of
different processes can be compared. Each is taken on that side of its action which makes an interval shorter
rather than longer: what overlaps by these times did overlap.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

__all__ = ["Event", "Fault", "History", "Record", "Recorder", "Write", "now", "read"]

EventKind: TypeAlias = Literal[
    "queued", "refused", "acquired", "looked", "lost", "left", "released", "gil_taken", "gil_given", "stalled"
]
FaultKind: TypeAlias = Literal[
    "stopped", "continued", "killed", "key_deleted", "lease_revoked", "lease_promised", "session_ended", "other"
]


def now() -> float:
    """Seconds of the system-wide monotonic clock."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


@dataclass(frozen=True, slots=True)
class Event:
    """Something a client process did or was told. Only what it knows is filled in.

    ========== ====================================================================================================
    queued     `at`: before ``acquire`` was called, for the lock `name` in `mode` with `limit`
    refused    `at`: after ``acquire`` raised; `why` is what
    acquired   `at`: after ``acquire`` returned, and before an ``is_held()`` that then said True, with `remaining()`
               from between; with `key`, `created` (its create revision), `token` and `lease`
    looked     `at`: before an ``is_held()`` that said True, and `remaining`, again from between
    lost       `at`: the loss was said, by the callback or by an ``is_held()`` that said False; `why` is the reason
    left       `at`: the body has ended; written before ``release`` is called
    released   `at`: ``release`` has returned `why`
    gil_taken  `at`: before the body began to hold the GIL; written before
    gil_given  `at`: after it
    stalled    the process did not run from `since` to `at`, though nothing of its own kept it from running
    ========== ====================================================================================================
    """

    kind: EventKind
    at: float
    pid: int
    thread: str = ""
    hold: str = ""
    """One acquisition from its beginning to its end; unique in the history."""
    name: str = ""
    mode: str = ""
    """``write``, ``read`` or ``slot``."""
    limit: int = 0
    key: str = ""
    created: int = 0
    token: int = 0
    lease: int = 0
    remaining: float = 0.0
    since: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that was done to a client process or to etcd on purpose. Whoever does it writes this.

    `at` is before it was done, `done` after. For ``continued`` `done` is what counts, for all others `at`. Two
    are no faults, but what went over the wire: ``lease_promised``, etcd has answered a grant or renewal that was sent
    `at`, and ``session_ended``, a client asks etcd to revoke its own lease. A kind that the checker need not know is
    ``other``; `what` says it in words, for people.
    """

    kind: FaultKind
    at: float
    done: float = 0.0
    pid: int = 0
    """Whose: of ``stopped`` (SIGSTOP), ``continued`` (SIGCONT) and ``killed`` (SIGKILL)."""
    key: str = ""
    """Of ``key_deleted``."""
    lease: int = 0
    """Of ``lease_revoked``, ``lease_promised`` and ``session_ended``."""
    until: float = 0.0
    """Of ``lease_promised``: `at`, and the whole TTL of the answer. No earlier, etcd says, does the lease end."""
    revision: int = 0
    """At which a key was deleted, where etcd has said so; 0: not known."""
    what: str = ""


@dataclass(frozen=True, slots=True)
class Write:
    """What the fenced store did with one write. `number` is the store's own order."""

    number: int
    at: float
    name: str
    mode: str
    token: int
    hold: str
    accepted: bool


Record: TypeAlias = "Event | Fault | Write"
_KINDS: dict[str, type[Event | Fault | Write]] = {"event": Event, "fault": Fault, "write": Write}


class Recorder:
    """Appends to one file. Threads may share it; each line is one ``write`` and is in the kernel when that returns."""

    def __init__(self, folder: Path, who: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{who}-{os.getpid()}.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, record: Record) -> None:
        os.write(self._file, dump(record).encode())

    def close(self) -> None:
        os.close(self._file)


def dump(record: Record) -> str:
    """One line. What is as it is by default is left out."""
    defaults = {field.name: field.default for field in fields(record) if field.default is not MISSING}
    said = {name: value for name, value in asdict(record).items() if name not in defaults or value != defaults[name]}
    return json.dumps({"record": type(record).__name__.lower(), **said}, separators=(",", ":")) + "\n"


def load(line: str) -> Record:
    """`ValueError` if it is not a whole line of ours."""
    if not line.endswith("\n"):
        raise ValueError("the line has no end")
    said: dict[str, Any] = json.loads(line)
    return _KINDS[said.pop("record")](**said)


@dataclass(frozen=True, slots=True)
class History:
    """All that was recorded, each kind in the order of time."""

    events: tuple[Event, ...] = ()
    faults: tuple[Fault, ...] = ()
    writes: tuple[Write, ...] = ()
    torn: frozenset[int] = frozenset()
    """Processes whose last line is not whole: to be expected only of those that were killed."""

    @classmethod
    def of(cls, records: Iterable[Record], torn: Iterable[int] = ()) -> History:
        records = list(records)
        return cls(
            tuple(sorted((each for each in records if isinstance(each, Event)), key=lambda each: each.at)),
            tuple(sorted((each for each in records if isinstance(each, Fault)), key=lambda each: each.at)),
            tuple(sorted((each for each in records if isinstance(each, Write)), key=lambda each: each.number)),
            frozenset(torn),
        )


def read(folder: Path) -> History:
    """The history in `folder`. A torn last line is left out and noted; one anywhere else is a `ValueError`."""
    torn: list[int] = []
    return History.of((record for path in sorted(folder.glob("*.jsonl")) for record in _records(path, torn)), torn)


def _records(path: Path, torn: list[int]) -> Iterator[Record]:
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            yield load(line)
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is no record: {line!r}") from error
            torn.append(int(path.stem.rpartition("-")[2]))
