"""Tables: as wide as the terminal, columns shortened with … where they do not fit; elsewhere as wide as they are.

In a pipe nothing is shortened, and each line stands by itself, for ``grep`` and ``awk``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import east_asian_width

__all__ = ["Column", "draw", "printable", "terminal_width"]

_GAP = "  "


@dataclass(frozen=True)
class Column:
    """`least`: the width below which it is not shortened; 0: it is never."""

    title: str
    least: int = 0
    right: bool = False


def terminal_width() -> int | None:
    """Of the terminal that is written to, in columns; None: it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def draw(
    style: Any, columns: Sequence[Column], rows: Sequence[Sequence[object]], *, width: int | None, indent: str = ""
) -> Iterator[str]:
    """The lines of the table, its head first. `style`: Celery's ``ctx.obj.style``. `width` None: no limit."""
    texts = [[printable(cell) for cell in row] for row in rows]
    widths = [max([_wide(column.title), *(_wide(row[i]) for row in texts)]) for i, column in enumerate(columns)]
    if width is not None:
        _fit(widths, columns, width - len(indent) - len(_GAP) * (len(columns) - 1))
    yield indent + style(_line([column.title for column in columns], columns, widths), bold=True)
    for row in texts:
        yield indent + _line(row, columns, widths)


def printable(cell: object) -> str:
    """On one line, whatever somebody has put into etcd: no escape sequence of a stranger's reaches a terminal."""
    text = str(cell)
    return text if text.isprintable() else "".join(each if each.isprintable() else "?" for each in text)


def _fit(widths: list[int], columns: Sequence[Column], room: int) -> None:
    while sum(widths) > room:
        shrinkable = [i for i, column in enumerate(columns) if column.least and widths[i] > column.least]
        if not shrinkable:
            return
        widths[max(shrinkable, key=lambda i: widths[i])] -= 1


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    parts = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        text = _shortened(cell, width)
        space = " " * (width - _wide(text))
        parts.append(space + text if column.right else text + space)
    return _GAP.join(parts).rstrip()


def _wide(text: str) -> int:
    return len(text) if text.isascii() else sum(2 if east_asian_width(each) in "WF" else 1 for each in text)


def _shortened(text: str, width: int) -> str:
    if _wide(text) <= width:
        return text
    while text and _wide(text) > width - 1:
        text = text[:-1]
    return text + "…"
