"""``ls``: the locks that are held, by task, with who holds them and how many wait."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from itertools import groupby, islice

import click
from celery.bin.base import CeleryCommand, CeleryOption

from celery_etcd_lock.cli.ages import age, ago, left
from celery_etcd_lock.cli.connected import Etcd, connected
from celery_etcd_lock.cli.leases import left_of
from celery_etcd_lock.cli.pages import keys_below
from celery_etcd_lock.cli.queues import Contender, Queue, limits_of, queues
from celery_etcd_lock.cli.tables import Column, draw, printable, terminal_width
from celery_etcd_lock.etcd.api import LeaseKeys
from celery_etcd_lock.tasks.keys import lock_name

__all__ = ["ls"]

_TASK = Column("TASK")
_COLUMNS = (
    Column("KEY", 12),
    Column("HOST", 8),
    Column("PID", right=True),
    Column("TASK ID", 9),
    Column("AGE", right=True),
    Column("TTL", right=True),
    Column("WAIT", right=True),
)


@click.command(cls=CeleryCommand)
@click.option(
    "-t",
    "--task",
    cls=CeleryOption,
    metavar="PATTERN",
    help_group="Filters",
    help="Of the tasks of this name; * and ? stand for any text: 'shop.*'.",
)
@click.option("-k", "--key", cls=CeleryOption, metavar="PATTERN", help_group="Filters", help="With such a key.")
@click.option("--host", cls=CeleryOption, metavar="PATTERN", help_group="Filters", help="With a holder on such a host.")
@click.option("--waiting", cls=CeleryOption, is_flag=True, help_group="Filters", help="That somebody waits for.")
@click.option(
    "--older",
    cls=CeleryOption,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help_group="Filters",
    help="With a holder that came so long ago.",
)
@click.option(
    "-n",
    "--limit",
    cls=CeleryOption,
    type=click.IntRange(min=1),
    metavar="N",
    help_group="Filters",
    help="No more than N locks.",
)
@click.option("--json", "as_json", cls=CeleryOption, is_flag=True, help_group="Ls Options", help="As JSON.")
@click.pass_context
def ls(
    ctx: click.Context,
    task: str | None,
    key: str | None,
    host: str | None,
    waiting: bool,
    older: float | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Locks that are held, by whom, and how many wait.

    \b
    AGE   since the holder came, be it that it had to wait
    TTL   how long the lock outlives its holder's process
    WAIT  how many stand in line in etcd; tasks that were put back into their queue do not: see `why`

    --json is a list of {"lock", "task", "key", "mode", "holders", "waiting"}. A holder is what it says of itself, and
    "token": its fencing token; of one that waited in line, a number below that and above its predecessors'.
    """  # noqa: D301 - click's mark for lines that stay
    wanted = _Wanted(task, key, host, waiting, older, datetime.now(timezone.utc))
    with connected(ctx) as etcd:
        matching = wanted.of(queues(keys_below(etcd.transport, wanted.prefix(etcd)), limits_of(ctx.obj.app)))
        found = list(islice(matching, limit and limit + 1))
        shown = found[:limit]
        leases = set() if as_json else {each.kv.lease for queue in shown for each in queue.holders if each.kv.lease}
        asked = left_of(etcd.transport, leases)
    if as_json:
        ctx.obj.echo(_json(shown))
        return
    for line in _lines(ctx, shown, wanted.now, asked) if shown else ():
        ctx.obj.echo(line)
    if not found:
        click.echo("no lock that is held is of that kind" if wanted.narrows else "no lock is held", err=True)
    if len(asked) < len(leases):
        click.echo(
            f"{len(leases) - len(asked)} leases were not asked for their time to live: see fewer locks", err=True
        )
    _remarks(found, shown)


@dataclass(frozen=True)
class _Wanted:
    task: str | None
    key: str | None
    host: str | None
    waiting: bool
    older: float | None
    now: datetime

    @property
    def narrows(self) -> bool:
        return bool(self.task or self.key or self.host or self.waiting or self.older is not None)

    def prefix(self, etcd: Etcd) -> str:
        """What the keys of all that can match begin with: etcd is not asked for the others."""
        begins = re.split(r"[*?\[]", self.task or "")[0]
        if not begins:
            return etcd.below("locks")
        whole = lock_name(etcd.settings.namespace, begins, "-").removesuffix("-")
        return whole if begins == self.task else whole.removesuffix("/")

    def of(self, found: Iterator[Queue]) -> Iterator[Queue]:
        return (queue for queue in found if self._matches(queue))

    def _matches(self, queue: Queue) -> bool:
        return (
            (self.task is None or fnmatchcase(queue.lock.task, self.task))
            and (self.key is None or fnmatchcase(queue.lock.key, self.key))
            and (self.host is None or any(fnmatchcase(each.host, self.host) for each in queue.holders))
            and (not self.waiting or bool(queue.waiting))
            and (self.older is None or any(self._is_old(each, self.older) for each in queue.holders))
        )

    def _is_old(self, holder: Contender, older: float) -> bool:
        seconds = age(holder.record.get("since", ""), self.now)
        return seconds is not None and seconds >= older


def _json(shown: Sequence[Queue]) -> str:
    """A lock to a line, as ``grep`` would have it, and a list all the same."""
    lines = [json.dumps(queue.to_json(), ensure_ascii=False) for queue in shown]
    return "[" + ",\n ".join(lines) + "]"


def _lines(ctx: click.Context, shown: Sequence[Queue], now: datetime, asked: dict[int, LeaseKeys]) -> Iterator[str]:
    """In a terminal a table for each task, below its name. Elsewhere one, whose lines begin with the task."""
    width = terminal_width()
    if width is None:
        every = [(_task_of(queue, each), *row) for queue in shown for each, row in _rows(queue, now, asked)]
        yield from draw(ctx.obj.style, (_TASK, *_COLUMNS), every, width=None)
        return
    for number, (task, of_task) in enumerate(groupby(shown, lambda queue: queue.lock.task)):
        if number:
            yield ""
        yield ctx.obj.style(printable(task) or "Shared by tasks, or of none", fg="cyan", bold=True)
        rows = [row for queue in of_task for _, row in _rows(queue, now, asked)]
        yield from draw(ctx.obj.style, _COLUMNS, rows, width=width, indent="  ")


def _rows(queue: Queue, now: datetime, asked: dict[int, LeaseKeys]) -> Iterator[tuple[Contender, tuple[str, ...]]]:
    at_most = "" if queue.sure else "<="
    for number, each in enumerate(queue.holders):
        run = "(has ended)" if each.leftover else each.run
        said = ago(each.record.get("since", ""), now)
        wait = "" if number and terminal_width() else f"{at_most}{len(queue.waiting)}"
        yield each, (queue.lock.key, each.host, each.pid, run, said, left(each.kv.lease, asked), wait)


def _task_of(queue: Queue, holder: Contender) -> str:
    return queue.lock.task or str(holder.record.get("task", "-"))


def _remarks(found: Sequence[Queue], shown: Sequence[Queue]) -> None:
    """What is to be said beside the list, and not in a pipe."""
    if len(found) > len(shown):
        click.echo("… and more: raise --limit, or narrow it down", err=True)
    if unsure := next((queue for queue in shown if not queue.sure), None):
        click.echo(
            f"how many may hold {printable(unsure.lock.title)} at once is not known here, as its task is not in this "
            "app: of those that wait some may be in",
            err=True,
        )
