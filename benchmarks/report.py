"""Writes ``docs/benchmarks.md`` between its markers, the plots beside it, and the raw data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.findings import Section, table
from benchmarks.stage import dump

__all__ = ["between", "page", "write"]

_BEGIN, _END = "<!-- written by make bench: from here -->", "<!-- to here -->"


def page(machine: Mapping[str, object], sections: Sequence[Section], took: float) -> str:
    """What stands between the markers."""
    found = [each for section in sections for each in section.findings]
    missed = sum(each.verdict == "missed" for each in found)
    barred = sum(each.bar is not None for each in found)
    about = (
        f"{machine['date']}; {machine['cpus']} CPUs ({machine['cpu']}), {machine['memory']}, {machine['system']}; "
        f"etcd {machine['etcd']}, one member on the same machine; Python {machine['python']}, "
        f"Celery {machine['celery']}, grpcio {machine['grpcio']}, protobuf {machine['protobuf']}; {took / 60:.0f} min. "
        f"{barred - missed} of {barred} bars reached. Raw data: [raw.json](benchmarks/raw.json)."
    )
    lines = [about, "", _findings(sections)]
    for section in sections:
        lines += ["", f"### {section.title}"]
        for block in section.tables:
            lines += ["", block]
        for name in section.plots:
            lines += ["", f"![{section.title}](benchmarks/{name}.svg)"]
    return "\n".join(lines)


def _findings(sections: Sequence[Section]) -> str:
    rows = []
    for section in sections:
        for each in section.findings:
            bar = "" if each.bar is None else f"{'at least' if each.at_least else 'at most'} {each.bar:g}"
            said = f"**{each.verdict}**" if each.verdict == "missed" else each.verdict
            rows.append((each.measured, each.shown, bar, f"{said}{': ' if said and each.note else ''}{each.note}"))
    return table(["measured", "found: median (quartiles)", "bar", ""], rows)


def between(old: str, new: str) -> str:
    """`old` with `new` between its markers; both are put at the end where there are none."""
    if _BEGIN not in old:
        return f"{old.rstrip()}\n\n{_BEGIN}\n\n{new}\n\n{_END}\n"
    before, _, rest = old.partition(_BEGIN)
    return f"{before}{_BEGIN}\n\n{new}\n\n{_END}{rest.partition(_END)[2]}"


def write(docs: Path, machine: Mapping[str, object], sections: Sequence[Section], took: float) -> None:
    """Everything, under `docs`."""
    folder, written = docs / "benchmarks", docs / "benchmarks.md"
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for name, svg in section.plots.items():
            (folder / f"{name}.svg").write_text(svg)
    raw = {"machine": machine, "sections": {section.name: section.raw for section in sections}}
    (folder / "raw.json").write_text(dump(raw) + "\n")
    old = written.read_text() if written.exists() else "# Benchmarks\n"
    written.write_text(between(old, page(machine, sections, took)))
