"""Plots as SVG, drawn by hand: bars with their quartiles, and lines over a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from benchmarks.contest import Spread

__all__ = ["bars", "lines"]

_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b7791f", "#c53030", "#319795", "#4a5568")
_STYLE = (
    "<style>text{font:13px sans-serif;fill:#222}.t{font-weight:bold}.s{fill:#666;font-size:11px}"
    "line,path{stroke:#999;fill:none}</style><rect width='100%' height='100%' fill='#fff'/>"
)


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}'>"
    return "\n".join([head, _STYLE, *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, what: str, kind: str = "", anchor: str = "start") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' class='{kind}' text-anchor='{anchor}'>{escape(what)}</text>"


def bars(title: str, rows: Sequence[tuple[str, Spread]], *, unit: str, scale: float = 1.0) -> str:
    """One bar for each: its length the median, the thin line its quartiles."""
    left, width, step = 270, 430, 28
    most = max(max(each.high, each.median) for _, each in rows) * scale or 1.0
    parts = [_text(10, 22, title, "t")]
    for number, (label, each) in enumerate(rows):
        y = 40 + number * step
        middle, low, high = (left + value * scale / most * width for value in (each.median, each.low, each.high))
        colour = _COLOURS[0] if label.startswith("celery-etcd-lock") else "#a0aec0"
        parts += [
            _text(left - 8, y + 14, label, anchor="end"),
            f"<rect x='{left}' y='{y}' width='{max(1.0, middle - left):.1f}' height='18' fill='{colour}'/>",
            f"<line x1='{low:.1f}' x2='{high:.1f}' y1='{y + 9}' y2='{y + 9}' style='stroke:#222;stroke-width:2'/>",
            _text(max(high, middle) + 6, y + 14, f"{each.median * scale:.3g} {unit}", "s"),
        ]
    return _svg(left + width + 90, 50 + len(rows) * step, parts)


def lines(
    title: str, across: str, up: str, series: Mapping[str, Sequence[tuple[float, float]]], *, from_zero: bool = True
) -> str:
    """Curves over a logarithmic axis."""
    left, top, width, height = 70, 40, 470, 250
    xs = sorted({x for points in series.values() for x, _ in points})
    most = max(y for points in series.values() for _, y in points) * 1.05 or 1.0
    least = 0.0 if from_zero else min(y for points in series.values() for _, y in points)
    first, last = math.log(max(xs[0], 1e-9)), math.log(max(xs[-1], 1e-9))

    def place(x: float, y: float) -> tuple[float, float]:
        far = (math.log(max(x, 1e-9)) - first) / ((last - first) or 1.0)
        return left + far * width, top + height - (y - least) / ((most - least) or 1.0) * height

    parts = [_text(10, 22, title, "t"), _text(left + width / 2, top + height + 40, across, anchor="middle")]
    parts += [_text(place(x, least)[0], top + height + 18, f"{x:,.0f}", "s", "middle") for x in xs]
    for tick in range(5):
        value = least + (most - least) * tick / 4
        y = place(xs[0], value)[1]
        parts += [
            f"<line x1='{left}' x2='{left + width}' y1='{y:.1f}' y2='{y:.1f}' style='stroke:#eee'/>",
            _text(left - 6, y + 4, f"{value:.3g}", "s", "end"),
        ]
    parts.append(_text(left - 60, top - 6, up, "s"))
    for number, (name, points) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [place(x, y) for x, y in points]
        path = " L".join(f"{right:.1f},{down:.1f}" for right, down in places)
        parts.append(f"<path d='M{path}' style='stroke:{colour};stroke-width:2'/>")
        parts += [f"<circle cx='{right:.1f}' cy='{down:.1f}' r='3' fill='{colour}'/>" for right, down in places]
        y = top + 14 + number * 20
        parts += [f"<rect x='{left + width + 16}' y='{y - 9}' width='12' height='10' fill='{colour}'/>"]
        parts.append(_text(left + width + 34, y, name))
    return _svg(left + width + 260, top + height + 56, parts)
