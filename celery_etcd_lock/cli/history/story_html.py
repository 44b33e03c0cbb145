"""A history as one HTML page: drawings in it, nothing around it. It loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from celery_etcd_lock.cli.history.instants import Instant
from celery_etcd_lock.cli.history.story import Span, Story, iso
from celery_etcd_lock.cli.history.story_text import Drawn, clock, moment, notes, spoken, who, window
from celery_etcd_lock.cli.history.timeline import task_and_key

__all__ = ["page"]

_DRAWN = Drawn.of("utf-8")
_WIDTH = 1000
_HEIGHT = 14

_STYLE = """
:root { color-scheme: light dark; --held: #1a7f4b; --line: #c9a227; --grid: #8884; }
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; }
h2 { font: 600 14px ui-monospace, monospace; margin: 1.6em 0 .3em; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
td, th { padding: 1px 6px; text-align: left; font-weight: normal; font-variant-numeric: tabular-nums;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
th { color: GrayText; } .came { width: 8em; } .span { width: 8em; text-align: right; } .who { width: 26%; }
svg { width: 100%; height: 14px; display: block; }
.held { fill: var(--held); } .waited { fill: var(--line); } .perhaps { fill: var(--held); opacity: .45; }
.ground { fill: var(--grid); opacity: .3; }
@media (max-width: 50em) {  /* the drawing on a line of its own, the rest beside each other */
  body { margin: 1em; } table, tbody { display: block; }
  tr { display: grid; grid-template-columns: auto auto auto 1fr; margin-bottom: 4px; }
  td, th { width: auto !important; text-align: left !important; }
  td:nth-child(2), th:nth-child(2) { grid-area: 2 / 1 / 3 / 5; }
}
footer { margin-top: 2em; color: GrayText; }
"""


def page(story: Story) -> Iterator[str]:
    """The page, piece by piece."""
    start, end = window(story)
    title = f"Locks from {clock(start, start - 90_000)} to {clock(end, start - 90_000)}"
    yield (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n"
        '<p><svg style="width:3em;display:inline"><rect class="waited" width="40" height="12"/></svg> in line '
        '<svg style="width:3em;display:inline"><rect class="held" width="40" height="12"/></svg> had it '
        '<svg style="width:3em;display:inline"><rect class="perhaps" width="40" height="12"/></svg> '
        "one of the two, or it may have ended</p>\n"
    )
    for lock, spans in story.by_lock():
        task, key = task_and_key(story.scope, lock)
        named = f"{task or 'any task'} {key}" if key else lock
        yield f'<h2 title="{escape(lock)}">{escape(named)}</h2>\n<table><tr><th class="came">came</th>'
        yield f"<th>{escape(clock(start, start))} {_DRAWN.to} {escape(clock(end, start))}</th>"
        yield '<th class="span">waited</th><th class="span">held</th><th class="who">who</th></tr>\n'
        for span in spans:
            yield _row(span, task, start, end)
        yield "</table>\n"
    yield "<footer>" + "".join(f"<p>{escape(note)}</p>" for note in notes(story, _DRAWN)) + "</footer>\n</html>\n"


def _row(span: Span, task: str, start: float, end: float) -> str:
    held = span.held()
    still = "+" if span.gone is None else ""
    times = [("came", span.came), ("had it from", span.let_in), ("gone", span.gone)]
    told = "\n".join(f"{what}: {_said(instant)}" for what, instant in times if instant) + f"\n{span.stay.key}"
    return (
        f'<tr title="{escape(told)}"><td class="came">{escape(moment(span.came, start, _DRAWN))}</td>'
        f"<td>{_drawing(span, start, end)}</td>"
        f'<td class="span">{escape(spoken(*span.waited(), _DRAWN))}{still if held is None else ""}</td>'
        f'<td class="span">{"-" if held is None else escape(spoken(*held, _DRAWN)) + still}</td>'
        f'<td class="who">{escape(who(span, task))}</td></tr>\n'
    )


def _said(instant: Instant) -> str:
    if instant.exact:
        return str(iso(instant.best))
    return f"between {iso(instant.earliest) or 'any time before'} and {iso(instant.latest)}"


def _drawing(span: Span, start: float, end: float) -> str:
    def place(at: float) -> float:
        return round(min(1.0, max(0.0, (at - start) / (end - start))) * _WIDTH, 1)

    gone = place(span.gone.best) if span.gone else float(_WIDTH)
    let_in = gone if span.let_in is None else place(span.let_in.best)
    came = place(span.came.best)
    bars = [("perhaps" if span.unsure else "waited", came, let_in), ("held", let_in, gone)]
    if span.let_in is None:
        bars.pop()
    if span.gone is not None and not span.gone.exact:
        bars.append(("perhaps" if span.let_in else "waited", gone, place(span.gone.latest)))
    drawn = "".join(
        f'<rect class="{name}" x="{left}" width="{max(2.0, round(right - left, 1))}" height="{_HEIGHT}"/>'
        for name, left, right in bars
        if right > left or name != "perhaps"
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none">'
        f'<rect class="ground" width="{_WIDTH}" height="{_HEIGHT}"/>{drawn}</svg>'
    )
