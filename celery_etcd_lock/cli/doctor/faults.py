"""What is known to be wrong with releases of etcd, as far as it touches locks. Pure.

Gathered from etcd's own changelogs and issues (as of 3.4.45, 3.5.33, 3.6.14 and 3.7.1). To keep it current, read the
CHANGELOG of each new release for leases, watches, revisions, corruption and auth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

__all__ = ["FAULTS", "Fault", "Version", "faults_of", "parsed", "written"]

Version: TypeAlias = "tuple[int, int, int]"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that was mended. `mended`: in which release, of each minor version that had it and still was kept."""

    what: str
    reference: str
    mended: Mapping[tuple[int, int], int]
    grave: bool = False
    """Nobody should run it."""
    only_with_auth: bool = False

    def in_version(self, version: Version) -> bool:
        mended = self.mended.get(version[:2])
        return mended is not None and version[2] < mended


FAULTS: Final = (
    # etcd's CHANGELOG/README.md: "Running etcd v3.5.2, v3.5.1 and v3.5.0 under high load can cause a data corruption".
    Fault("a member that is killed may lose what the others keep", "issue 13766", {(3, 5): 3}, grave=True),
    Fault("members may differ after a crash while one is defragmented", "pull request 14733", {(3, 5): 6}),
    Fault("a member that joins under auth may differ", "pull requests 14648, 14649", {(3, 4): 22, (3, 5): 6},
          only_with_auth=True),
    Fault("a watch may go back in time", "pull requests 15515, 15520", {(3, 4): 25, (3, 5): 8}),
    # Mended in part: see docs/safety.md, and `LEASES_END_EARLY`.
    Fault("a leader that was cut off ends leases that others renew", "issues 12528, 15247", {(3, 4): 31, (3, 5): 13}),
    Fault("a watch may miss changes after a compaction", "pull requests 17610, 17612", {(3, 4): 31, (3, 5): 13}),
    Fault("revisions, and so fencing tokens, may go back after a crash while it is compacted",
          "pull requests 17864, 17865", {(3, 4): 32, (3, 5): 14}),
    Fault("a renewal of a lease that has ended may be answered as if it had not", "pull requests 20615, 20616, 20813",
          {(3, 4): 38, (3, 5): 23, (3, 6): 5}),
    Fault("data may be corrupted where a member is defragmented while it catches up",
          "pull requests 20650, 20653, 20659", {(3, 4): 38, (3, 5): 23, (3, 6): 5}),
    Fault("a member that was stopped for a moment may answer reads from the past", "issue 20418",
          {(3, 4): 42, (3, 5): 28, (3, 6): 9}),
    Fault("a user may do in a transaction what no role allows", "CVE-2026-33343",
          {(3, 4): 42, (3, 5): 28, (3, 6): 9}, only_with_auth=True),
)  # fmt: skip

LEASES_END_EARLY: Final = (
    "no release is quite without it: a leader that slept for a TTL may end leases that its successor has renewed "
    "(etcd's issues 12528, 15247); then only the fencing token keeps two holders apart"
)

OLDEST: Final = (3, 4, 0)


def parsed(version: str) -> Version | None:
    """``"3.5.16"`` as numbers; a pre-release as what it comes before. None: it is no version of etcd's."""
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def written(version: Version) -> str:
    return ".".join(map(str, version))


def faults_of(version: Version, *, auth: bool) -> tuple[tuple[Fault, ...], Version]:
    """The known faults of `version`, and the oldest release of its minor version that has none of them."""
    found = tuple(fault for fault in FAULTS if fault.in_version(version) and (auth or not fault.only_with_auth))
    mended = max((fault.mended[version[:2]] for fault in found), default=version[2])
    return found, (*version[:2], mended)
