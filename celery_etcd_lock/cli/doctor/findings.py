"""What a doctor has found, in words and as JSON. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

__all__ = ["NOT_EXAMINED", "SOUND", "WRONG", "Finding", "Level", "lines", "status_of"]

Level: TypeAlias = Literal["ok", "note", "warning", "wrong", "unknown"]

SOUND: Final = 0
WRONG: Final = 1
NOT_EXAMINED: Final = 2

_MARKS: Final = {"ok": "ok", "note": "note", "warning": "WARNING", "wrong": "WRONG", "unknown": "unknown"}


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    """``"wrong"``: locks do not work, or soon will not. ``"warning"``: they may not, some day. ``"unknown"``: it could
    not be looked at."""
    about: str
    what: str
    do: str = ""
    """What to do about it."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def status_of(findings: Iterable[Finding], *, examined: bool, strict: bool) -> int:
    """The exit status. `examined`: an etcd has answered, and let us in. `strict`: a warning is as bad as wrong."""
    if not examined:
        return NOT_EXAMINED
    bad = {"wrong", "warning", "unknown"} if strict else {"wrong"}
    return WRONG if any(finding.level in bad for finding in findings) else SOUND


def lines(findings: Iterable[Finding], width: int) -> Iterator[str]:
    """A paragraph for each, none of its lines longer than `width`."""
    for finding in findings:
        start = f"{_MARKS[finding.level]:8} {finding.about}: "
        yield from _wrapped(start + finding.what, width)
        if finding.do:
            yield from _wrapped(" " * 9 + "-> " + finding.do, width, 12)


def _wrapped(text: str, width: int, indent: int = 9) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
