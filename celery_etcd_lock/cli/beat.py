"""``beat``: which beat leads, which stand by, and what became of the last tick of each entry."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import click
from celery.bin.base import CeleryCommand, CeleryOption

from celery_etcd_lock.beat.record import Record, entry_name, entry_prefix, leader_name
from celery_etcd_lock.cli.ages import ago, iso, lasting, left
from celery_etcd_lock.cli.connected import connected
from celery_etcd_lock.cli.leases import left_of
from celery_etcd_lock.cli.pages import keys_below
from celery_etcd_lock.cli.queues import Contender
from celery_etcd_lock.cli.tables import Column, draw, printable, terminal_width
from celery_etcd_lock.etcd.api import KeyValue, LeaseKeys
from celery_etcd_lock.locks.queue import admitted

__all__ = ["beat"]

_BEATS = (
    Column("STATE"),
    Column("HOST", 8),
    Column("PID", right=True),
    Column("AGE", right=True),
    Column("TTL", right=True),
)
_ENTRIES = (
    Column("ENTRY", 12),
    Column("LAST TICK", 12),
    Column("DUE", 12),
    Column("STATE"),
    Column("RUNS", right=True),
    Column("TASK ID", 9),
)


@click.command(cls=CeleryCommand)
@click.argument("name", required=False)
@click.option("--json", "as_json", cls=CeleryOption, is_flag=True, help_group="Beat Options", help="As JSON.")
@click.pass_context
def beat(ctx: click.Context, name: str | None, as_json: bool) -> None:
    """Which beat leads, which stand by, and the last ticks.

    Of the beats of one NAME, or of all.

    \b
    AGE        since it stands for election
    LAST TICK  how long ago the entry last ran
    DUE        the time for which its task was, or is being, sent
    STATE      sending: the message may be out, or not yet; sent; failed: it could not be published; -: never sent
    """  # noqa: D301 - click's mark for lines that stay
    now = datetime.now(timezone.utc)
    with connected(ctx) as etcd:
        found = _beats(etcd.settings.namespace, keys_below(etcd.transport, etcd.below("beat")))
        if name is not None and name not in found:
            known = f"there are {', '.join(sorted(found))}" if found else "nor of any other name"
            raise click.ClickException(f"no beat of the name {name!r} has stood for election: {known}")
        shown = [found[name]] if name is not None else [found[each] for each in sorted(found)]
        asked = left_of(etcd.transport, (each.kv.lease for group in shown for each in group.candidates))
    if as_json:
        ctx.obj.echo(json.dumps([group.to_json(asked) for group in shown], ensure_ascii=False, indent=1))
        return
    if not shown:
        click.echo("no beat has stood for election: start one with: celery -A proj beat -S etcd_lock", err=True)
    for group in shown:
        _show(ctx, group, now, asked)


@dataclass
class _Beats:
    """All beats of one name."""

    name: str
    election: str
    """The name of it in etcd."""
    standing: list[KeyValue] = field(default_factory=list)
    entries: dict[str, Record] = field(default_factory=dict)

    @property
    def candidates(self) -> list[Contender]:
        """The leader, and who stands by in the order in which they would follow."""
        inside = admitted(self.election, self.standing)
        ordered = sorted(self.standing, key=lambda kv: kv.create_revision)
        return [Contender(kv, kv.create_revision in inside, leftover=False) for kv in ordered]

    def to_json(self, asked: dict[int, LeaseKeys]) -> dict[str, Any]:
        said = [
            {**each.to_json(), "ttl": asked[each.kv.lease].ttl if each.kv.lease in asked else None}
            for each in self.candidates
        ]
        return {
            "name": self.name,
            "leader": said[0] if said else None,
            "standbys": said[1:],
            "entries": {entry: json.loads(record.to_json()) for entry, record in self.entries.items()},
        }


def _beats(namespace: str, kvs: Iterable[KeyValue]) -> dict[str, _Beats]:
    found: dict[str, _Beats] = {}
    for kv in kvs:
        name = kv.key.split("/")[3]
        group = found.setdefault(name, _Beats(name, leader_name(namespace, name)))
        entries = entry_prefix(namespace, name)
        if kv.key.startswith(group.election + "/"):
            group.standing.append(kv)
        elif kv.key.startswith(entries):
            group.entries[entry_name(entries, kv.key)] = Record.parse(kv.value)
    return found


def _show(ctx: click.Context, group: _Beats, now: datetime, asked: dict[int, LeaseKeys]) -> None:
    width = terminal_width()
    ctx.obj.echo(ctx.obj.style(printable(group.name), fg="cyan", bold=True))
    candidates = [
        ("leads" if each.holds else "stands by", each.host, each.pid, ago(each.record.get("since", ""), now),
         left(each.kv.lease, asked))
        for each in group.candidates
    ]  # fmt: skip
    if candidates:
        for line in draw(ctx.obj.style, _BEATS, candidates, width=width, indent="  "):
            ctx.obj.echo(line)
    else:
        ctx.obj.echo("  no beat of this name runs: nothing is sent")
    rows = [_entry(entry, record, now) for entry, record in group.entries.items()]
    if rows:
        ctx.obj.echo("")
        for line in draw(ctx.obj.style, _ENTRIES, rows, width=width, indent="  "):
            ctx.obj.echo(line)


def _entry(entry: str, record: Record, now: datetime) -> tuple[object, ...]:
    last = "-" if record.last_run_at is None else lasting((now - record.last_run_at).total_seconds())
    if record.slot is None:
        return entry, last, "-", "-", record.total_run_count, "-"
    due = iso(record.slot.due)
    return entry, last, due, record.state or "-", record.total_run_count, record.slot.task_id
