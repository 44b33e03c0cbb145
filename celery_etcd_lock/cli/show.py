"""``show``: one lock, and all who stand in line for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import TypeVar

import click
from celery.bin.base import CeleryCommand, CeleryOption

from celery_etcd_lock.cli.ages import ago, left
from celery_etcd_lock.cli.connected import connected
from celery_etcd_lock.cli.leases import left_of
from celery_etcd_lock.cli.named import queue_named
from celery_etcd_lock.cli.queues import Contender, Queue
from celery_etcd_lock.cli.tables import Column, draw, printable, terminal_width
from celery_etcd_lock.etcd.api import LeaseKeys

__all__ = ["show"]

T = TypeVar("T")

_COLUMNS = (
    Column("#", right=True),
    Column("STATE"),
    Column("HOST", 8),
    Column("PID", right=True),
    Column("TASK", 8),
    Column("TASK ID", 9),
    Column("AGE", right=True),
    Column("TTL", right=True),
)
_TASK = 4
"""Which of them it is."""


@click.command(cls=CeleryCommand)
@click.argument("lock")
@click.argument("key", required=False)
@click.option("--json", "as_json", cls=CeleryOption, is_flag=True, help_group="Show Options", help="As JSON.")
@click.pass_context
def show(ctx: click.Context, lock: str, key: str | None, as_json: bool) -> None:
    """The queue of a lock: who holds it, and who waits.

    \b
    LOCK is a task's name and a key, as `ls` shows them, or the lock's name in etcd:
    celery -A proj etcd-lock show shop.sync account_id=42
    celery -A proj etcd-lock show /celery/locks/shop.sync/account_id=42

    First come first served. Tasks that were put back into their queue do not stand in line: see `why`.
    """  # noqa: D301 - click's mark for lines that stay
    now = datetime.now(timezone.utc)
    with connected(ctx) as etcd:
        queue = queue_named(ctx, etcd, lock, key)
        asked = left_of(etcd.transport, (each.kv.lease for each in queue.contenders))
    if as_json:
        ctx.obj.echo(json.dumps(_json(queue, asked), ensure_ascii=False, indent=1))
        return
    ctx.obj.echo(ctx.obj.style(printable(queue.lock.title), fg="cyan", bold=True))
    ctx.obj.echo(f"{printable(queue.lock.name)}, {queue.mode}: {_counted(queue)}")
    rows = [_row(queue, number, each, now, asked) for number, each in enumerate(queue.contenders, 1)]
    columns: tuple[Column, ...] = _COLUMNS
    if queue.lock.task:  # it is the same in each line, and on the first one: leave room for the ids
        columns, rows = _without(_TASK, columns), [_without(_TASK, row) for row in rows]
    for line in draw(ctx.obj.style, columns, rows, width=terminal_width()):
        ctx.obj.echo(line)
    for remark in _remarks(queue, asked):
        ctx.obj.echo(printable(remark))


def _counted(queue: Queue) -> str:
    holders, waiting = len(queue.holders), len(queue.waiting)
    hold = f"{holders} holds it" if holders == 1 else f"{holders} hold it"
    wait = "nobody waits" if not waiting else "1 waits" if waiting == 1 else f"{waiting} wait"
    return f"{hold}, {wait}"


def _without(index: int, items: tuple[T, ...]) -> tuple[T, ...]:
    return items[:index] + items[index + 1 :]


def _row(queue: Queue, number: int, each: Contender, now: datetime, asked: dict[int, LeaseKeys]) -> tuple[object, ...]:
    state = "holds" if each.holds else "waits" if queue.sure else "waits?"
    run = "(has ended)" if each.leftover else each.run
    task = str(each.record.get("task", "-"))
    since = ago(each.record.get("since", ""), now)
    return number, state, each.host, each.pid, task, run, since, left(each.kv.lease, asked)


def _remarks(queue: Queue, asked: dict[int, LeaseKeys]) -> Iterator[str]:
    if not queue.sure:
        yield "How many may hold it at once is not known here: its task is not in this app, or has no lock_limit."
    for number, each in enumerate(queue.contenders, 1):
        if not each.kv.lease:
            yield (
                f"{number} is a key without a lease, which no end of a process takes away: it stays until somebody "
                f"deletes it: etcdctl del {each.kv.key}"
            )
        elif each.leftover:
            yield f"{number} has ended, and its lock_at_least_for keeps the lock for {left(each.kv.lease, asked)} more."


def _json(queue: Queue, asked: dict[int, LeaseKeys]) -> dict[str, object]:
    shown = queue.to_json()
    del shown["holders"], shown["waiting"]
    shown["queue"] = [
        {
            **each.to_json(),
            "holds": each.holds,
            "contender": each.kv.key,
            "ttl": asked[each.kv.lease].ttl if each.kv.lease in asked else None,
        }
        for each in queue.contenders
    ]
    return shown
