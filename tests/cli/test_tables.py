"""Tables and times, as they are drawn."""

from __future__ import annotations

from typing import Any

import pytest

from celery_etcd_lock.cli.ages import lasting
from celery_etcd_lock.cli.tables import Column, draw

COLUMNS = (Column("KEY", 6), Column("HOST", 6), Column("N", right=True))


def plain(text: str, **_: Any) -> str:
    return text


def drawn(*rows: tuple[object, ...], width: int | None) -> list[str]:
    return list(draw(plain, COLUMNS, rows, width=width))


def test_the_widest_is_shortened_first() -> None:
    """And a column of numbers never is."""
    head, line = drawn(("k" * 30, "worker-1", 12345), width=30)
    assert line == "k" * 12 + "…  worker-1  12345"
    assert len(line) == len(head) == 30


def test_no_narrower_than_can_be_read() -> None:
    """A terminal of ten columns breaks the lines rather than hide everything."""
    assert drawn(("k" * 30, "h" * 30, 1), width=10)[1] == "kkkkk…  hhhhh…  1"


def test_without_a_terminal_nothing_is() -> None:
    assert drawn(("k" * 300, "h", 1), width=None)[1] == "k" * 300 + "  h     1"


def test_wide_characters_take_two_columns() -> None:
    head, line = drawn(("注文", "h", 1), width=80)
    assert head.index("HOST") == line.index("h") + 2


@pytest.mark.parametrize("text", ["a\nb", "a\033b", "a\tb"])
def test_a_strangers_control_characters_do_not_reach_the_terminal(text: str) -> None:
    assert drawn((text, "h", 1), width=80)[1].startswith("a?b ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (0.4, "0s"), (59.6, "1m00s"), (192, "3m12s"), (7500, "2h05m"), (360000, "4d04h"), (86400, "1d00h")],
)
def test_times_are_two_units(seconds: float, text: str) -> None:
    assert lasting(seconds) == text
