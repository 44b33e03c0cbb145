"""A history as text: for each lock a line for each contender, with a bar on one scale of time for all."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from celery_etcd_lock.cli.history.instants import Instant
from celery_etcd_lock.cli.history.story import Span, Story
from celery_etcd_lock.cli.history.timeline import task_and_key
from celery_etcd_lock.cli.tables import printable

__all__ = ["Drawn", "clock", "duration", "lines", "moment", "notes", "spoken", "who", "window"]

_NARROWEST = 60
_LEAST_BAR = 20
_NEAR = 120.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What the bars are drawn with."""

    waited: str
    held: str
    perhaps: str
    about: str
    to: str

    @classmethod
    def of(cls, encoding: str | None) -> Drawn:
        """As good as `encoding` has it."""
        try:
            "·█▒≈".encode(encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return cls(".", "#", "?", "~", "..")
        return cls("·", "█", "▒", "≈", "..")


def window(story: Story) -> tuple[float, float]:
    """From when to when the bars go: no further than there is something to see."""
    begins = [span.came.best for span in story.spans]
    if story.reach.start > 1 and story.begins.earliest > float("-inf"):
        begins.append(story.begins.best)
    start = max(story.since, min(begins, default=story.since))
    return start, max(story.now, start + 1.0)


def lines(story: Story, *, width: int | None, drawn: Drawn) -> Iterator[str]:
    """Line after line, none of them longer than `width`. None: as for a terminal of 80, and nothing is cut off."""
    cut, width = width and max(_NARROWEST, width), max(_NARROWEST, width or 80)
    bar = max(_LEAST_BAR, (width - 34) // 2)
    start, end = window(story)
    if story.spans:
        left, right = (clock(each, start).partition(".")[0] for each in (start, end))
        axis = left + right.rjust(max(len(right), bar - len(left)))
        yield f"  {'came':11} {axis[:bar]:{bar}} {'waited':>9} {'held':>9}  who"[:width].rstrip()
    for lock, spans in story.by_lock():
        yield ""
        name = printable(lock)
        yield name if cut is None or len(name) <= cut else f"...{name[3 - cut :]}"
        task, _ = task_and_key(story.scope, lock)
        for span in spans:
            came = moment(span.came, start, drawn)
            held_for = span.held()
            waited = spoken(*span.waited(), drawn)
            held = "-" if held_for is None else spoken(*held_for, drawn)
            if span.gone is None:
                waited, held = (f"{waited}+", held) if held_for is None else (waited, f"{held}+")
            row = f"  {came:11} {_bar(span, start, end, bar, drawn)} {waited:>9} {held:>9}  {who(span, task)}"
            yield printable(row)[:cut].rstrip()
    if story.spans:
        yield ""
        yield f"{drawn.waited} in line   {drawn.held} had it   {drawn.perhaps} one of the two   {drawn.about} about"
    for note in notes(story, drawn):
        yield from textwrap.wrap(note, width)


def notes(story: Story, drawn: Drawn) -> Iterator[str]:
    """What has to be said about it: how far back it goes and what is not in it."""
    reach = story.reach
    if not story.spans:
        yield "Nobody was in line for it." if story.scope.lock else "Nobody was in line for any lock."
    when = moment(story.begins, story.now, drawn)
    if reach.start <= 1:
        yield "This is all of it: etcd was never compacted."
    elif reach.compacted:
        yield f"etcd keeps history since revision {reach.start}, {when}; what was before is compacted."
    else:
        yield f"Read from revision {reach.start}, {when}, to {reach.head}; --look-back goes further."
    if story.left_out:
        yield f"{story.left_out} more are not shown; --limit shows more."
    if not reach.complete:
        yield "Not all of it was told by etcd in time: something may be missing at the end."
    for host, count in story.misfits.items():
        yield f"The clock of {host} does not go with the others: {count} times were not used."
    if any(span.gone and not span.gone.exact for span in story.spans):
        yield f"etcd has no times: what is {drawn.about} lies between the times of what was put before and after."


def clock(at: float, beside: float) -> str:
    """A time of day, to a tenth if `beside` is near; with its date, if that is of another day. Local time."""
    moment, other = datetime.fromtimestamp(at).astimezone(), datetime.fromtimestamp(beside).astimezone()
    if moment.date() != other.date():
        return moment.strftime("%m-%d %H:%M")
    tenths = f".{moment.microsecond // 100_000}" if abs(at - beside) < _NEAR else ""
    return moment.strftime("%H:%M:%S") + tenths


def moment(instant: Instant, beside: float, drawn: Drawn) -> str:
    if instant.earliest == float("-inf"):
        return f"<{clock(instant.latest, beside)}"
    return f"{'' if instant.exact else drawn.about}{clock(instant.best, beside)}"


def spoken(least: float, most: float, drawn: Drawn) -> str:
    """A duration that is known to be in an interval: one figure where that is short beside it."""
    if most == float("inf"):
        return f">{duration(least)}"
    if most - least <= max(1.0, 0.02 * most):
        return duration((least + most) / 2)
    if most - least <= 0.3 * most:
        return f"{drawn.about}{duration((least + most) / 2)}"
    return f"{duration(least)}{drawn.to}{duration(most)}"


def duration(seconds: float) -> str:
    """Short: ``12ms``, ``1.2s``, ``42s``, ``2m05``, ``3h07``, ``2d04``."""
    if seconds < 0.9995:
        return f"{round(seconds * 1000)}ms" if seconds >= 0.0005 else "0s"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    for unit, size, below in (("m", 60, 1), ("h", 3600, 60), ("d", 86400, 3600)):
        if whole < size * (24 if unit == "h" else 60) or unit == "d":
            return f"{whole // size}{unit}{whole % size // below:02d}"
    raise AssertionError


def _bar(span: Span, start: float, end: float, width: int, drawn: Drawn) -> str:
    def place(at: float) -> int:
        return min(width, max(0, int((at - start) / (end - start) * width)))

    gone = place(span.gone.best) if span.gone else width
    came = min(place(span.came.best), width - 1)
    let_in = gone if span.let_in is None else min(place(span.let_in.best), gone)
    before = drawn.perhaps if span.unsure else drawn.waited
    cells = [" "] * width
    for index in range(came, max(gone, came + 1)):
        cells[index] = before if index < let_in else drawn.held
    if span.let_in is not None:
        cells[max(came, gone - 1)] = drawn.held  # for less than a cell, perhaps
    return "".join(cells)


def who(span: Span, task: str) -> str:
    """Who that is; of which task only if it is another than `task`."""
    record = span.stay.record
    if not record:
        return span.stay.holder
    named = f" {span.stay.task}" if span.stay.task and span.stay.task != task else ""
    task_id = f" [{span.stay.task_id[:8]}]" if span.stay.task_id else ""
    ended = " (its session ended)" if span.stay.with_its_session else ""
    return f"{record['host']}:{record.get('pid', '?')}{named}{task_id}{ended}"
