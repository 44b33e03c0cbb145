"""The blocks of code of a page, and what each language's are taken for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LANGUAGES", "ROOT", "Block", "blocks_of", "pages"]

ROOT = Path(__file__).resolve().parents[2]

LANGUAGES = frozenset({"console", "python", "sh"})
"""What is executed. ``{eval-rst}``, ``{include}`` and ``{toctree}`` are Sphinx's own, and built by ``make docs``."""

_SPHINX = frozenset({"{eval-rst}", "{include}", "{toctree}"})


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    """Of its first line of code, from 1."""
    language: str
    code: str
    needs_docker: bool = False
    """``python docker``: of that only the syntax is looked at."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> re.Match[str] | None:
        """The file that it shows, where its first line is ``# name.py``, or ``# name.py, at its end``."""
        return re.match(r"# (?P<path>[\w/]+\.py)(?P<more>, at its end)?\n", self.code)


def pages() -> list[str]:
    """README and every page of docs, as paths from the root."""
    return ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]


def blocks_of(page: str) -> list[Block]:
    """Those to execute, in their order. `ValueError` for one that says no language, or one that nobody executes."""
    return [block for block in _fenced(page) if block.language not in _SPHINX]


def _fenced(page: str) -> Iterator[Block]:
    language, docker, begun, code = "", False, 0, list[str]()
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        fence = re.match(r" *```(.*)", line)
        if begun == 0 and fence:
            language, begun, code = (fence[1].split() or [""])[0], number + 1, []
            docker = fence[1].split()[1:] == ["docker"]
            if language not in LANGUAGES | _SPHINX:
                raise ValueError(f"{page}:{number}: nobody executes a block of {language or 'no language'!r}")
        elif begun and fence:
            yield Block(page, begun, language, "\n".join(code) + "\n", docker)
            begun = 0
        elif begun:
            code.append(line)
        elif line.startswith("    ") and re.match(r" {4}(\$|make |pip |celery |etcd|python |--)", line):
            raise ValueError(f"{page}:{number}: an indented block says no language: write ```sh")
