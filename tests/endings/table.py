"""The tables of docs/endings.md: written from what was measured, and read again."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

from celery_etcd_lock import __version__
from tests.endings.measuring import By, Ended, Kept
from tests.endings.ways import POOLS, WAYS, Pool, Way

__all__ = ["BEGIN", "END", "FATE", "FREE", "Found", "cells", "tables", "write"]

BEGIN = "<!-- written by make endings: begin -->"
END = "<!-- written by make endings: end -->"

FREE, FATE = "the lock is free after", "the body, then its message"
"""The corners of the two tables."""

Found: TypeAlias = dict[tuple[Pool, Way], list[Ended]]
"""Each cell, measured once or several times."""

_BY: dict[By, str] = {"release": "", "parent": ", by its parent", "lease": ", by its lease"}
_KEPT: dict[Kept, str] = {
    "": "and nothing more: the broker has no message",
    "queued": "and its message is in the queue",
    "unacknowledged": "and the broker delivers its message again",
}


def write(page: Path, text: str) -> None:
    """Put the figures between the two marks in `page`. `ValueError` if it does not have them."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no place for the figures: the lines {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def tables(found: Found, etcd: str, redis: str, command: str) -> str:
    """When, with what and where it was measured, and both tables, in Markdown."""
    times = max(map(len, found.values()))
    lines = [
        f"Measured on {time.strftime('%Y-%m-%d', time.gmtime())} by `{command}`, "
        + (f"each cell {times} times: the median" if times > 1 else "each cell once")
        + f". celery-etcd-lock {__version__}, Celery {version('celery')}, billiard {version('billiard')}, gevent "
        f"{version('gevent')}, etcd {etcd}, Redis {redis}, Python {platform.python_version()}, {platform.system()} "
        f"{platform.release().split('-')[0]}, {os.cpu_count()} cores, all on one machine.",
        "", *_table(FREE, found, _free), "", *_table(FATE, found, _fate),
    ]  # fmt: skip
    return "\n".join(lines)


def cells(text: str) -> dict[tuple[str, str, str], str]:
    """What the tables in a page say, by table (its corner), row and column."""
    said: dict[tuple[str, str, str], str] = {}
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
            continue
        row = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not header:
            header = row
        elif set("".join(row)) != {"-"}:
            said |= {(header[0], row[0], column): cell for column, cell in zip(header[1:], row[1:], strict=False)}
    return said


def _table(corner: str, found: Found, text: Callable[[list[Ended]], str]) -> Iterator[str]:
    yield _row(corner, *(pool.title for pool in POOLS))
    yield _row(*["---"] * (len(POOLS) + 1))
    for way in WAYS:
        yield _row(way.title, *(_cell(found, pool, way, text) for pool in POOLS))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(found: Found, pool: Pool, way: Way, text: Callable[[list[Ended]], str]) -> str:
    if way.child and not pool.children:
        whole = next(each for each in WAYS if each.name == "worker")
        return f"no child; as the whole worker: {text(found[pool, whole])}"
    return text(found[pool, way])


def _free(measured: list[Ended]) -> str:
    """Of several, the median's."""
    one = sorted(measured, key=lambda each: each.freed)[len(measured) // 2]
    seconds = f"{one.freed:.3f} s" if one.freed < 0.1 else f"{one.freed:.2f} s"
    if one.by == "lease":
        return f"the TTL ({one.way.ttl} s here): {seconds}"
    if one.went_on:
        warm = one.way.name == "warm"
        return f"{'the body finishes' if warm else 'not enforced by Celery, the body goes on'}; when it ends: {seconds}"
    return seconds + _BY[one.by]


def _fate(measured: list[Ended]) -> str:
    """Of several, all that there were."""
    return " *or* ".join(dict.fromkeys(map(_one_fate, measured)))


def _one_fate(one: Ended) -> str:
    fate = one.fate
    how = {"returned": "returns", "killed": "is killed"}.get(one.how, f"`{one.how}`")
    again = f" in its run no. {fate.runs}" if fate.runs > 1 else ""
    if fate.ready:
        return f"{how}; {fate.state}{f' (`{fate.error}`)' if fate.error else ''}{again}"
    return f"{how}; {fate.state}{again}, {_KEPT[fate.kept]}"
