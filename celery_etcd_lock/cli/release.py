"""``release``: ask whoever holds a lock to give it back; with ``--force``, delete its key."""

from __future__ import annotations

import getpass
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import CeleryCommand, CeleryOption

from celery_etcd_lock.cli.ages import iso
from celery_etcd_lock.cli.progress import Progress
from celery_etcd_lock.cli.waiting import in_line
from celery_etcd_lock.cli.which import Meant, lock_meant
from celery_etcd_lock.etcd.api import Delete, KeyValue, Transport, Txn, created_at
from celery_etcd_lock.exceptions import EtcdLockError, EtcdRejected, NoSpace, PermissionDenied
from celery_etcd_lock.locks.asked import Answer, Asking, Owner, owner_of
from celery_etcd_lock.locks.queue import describe, is_contender, kind_of
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.task import SingletonTask

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["release"]

_LOOK_EVERY = 0.25
"""Seconds."""

_BESIDES = 5.0
"""Seconds to wait for an answer on top of the holder's TTL, and for the end of what was told."""

_WHAT_FORCE_DOES = (
    "Deleting the key gives the lock to whoever is next, though the run that holds it may still be under way: then two "
    "run at once. A holder that is alive notices within its TTL ({ttl} s), and ends its run as its on_lost says; one "
    "that is frozen or cut off goes on when it can. From then on only fencing tokens protect what both write to."
)


@click.command(cls=CeleryCommand)
@click.argument("lock")
@click.argument("args", nargs=-1)
@click.option(
    "--force",
    cls=CeleryOption,
    is_flag=True,
    help_group="Release Options",
    help="Delete the key of a holder that cannot be asked, does not answer, or goes on.",
)
@click.option(
    "--wait",
    cls=CeleryOption,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help_group="Release Options",
    help=f"For the holder's answer. Default: its etcd_lock_ttl, within which it looks, and {_BESIDES:g} more.",
)
@click.option(
    "--yes", "-y", cls=CeleryOption, is_flag=True, help_group="Release Options", help="Do not ask before --force."
)
@click.pass_context
def release(ctx: click.Context, lock: str, args: tuple[str, ...], force: bool, wait: float | None, yes: bool) -> None:
    """Ask whoever holds LOCK to give it back, and say what came of it.

    LOCK is a task's name and a key, as `ls` shows them, or its arguments as JSON; or the lock's name in etcd. The
    holder is asked by way of etcd: its process looks once per etcd_lock_ttl, and ends the run as the task's on_lost
    says: with LockLost ("abort"), putting it back ("retry"), or only with a warning ("warn"). A command under `hold`
    is ended. Of shared and limited locks every holder is asked; those who wait are not.

    \b
    celery -A proj etcd-lock release shop.sync account_id=42
    celery -A proj etcd-lock release shop.sync '[42]'
    celery -A proj etcd-lock release /celery/locks/shop.sync/account_id=42

    Holders that are not of this package (etcdctl lock, Go) cannot be asked. With --force the key of a holder that does
    not give its lock back is deleted. Its run may then go on beside the next one.

    Exit status: 0, the lock was given back or nobody held it; 1, it was not.
    """  # noqa: D301 - click's mark for lines that stay
    app = ctx.obj.app
    meant = lock_meant(app, lock, args)
    progress = Progress(quiet=ctx.obj.quiet)
    try:
        with closing(Settings.from_app(app).connect()) as transport:
            held = _holders(app, transport, meant.name)
            if not held:
                ctx.obj.echo(f"nobody holds {meant.title}")
                return
            _ask(held, wait, progress)
            for holder in held:
                ctx.obj.echo(f"{holder.who}: {holder.outcome()}")
            left = [holder for holder in held if not holder.gone]
            if left and force:
                _force(ctx, transport, left, yes=yes)
                left = [holder for holder in left if not holder.gone]
            elif left:
                ctx.obj.echo(f"{meant.title} is still held. --force deletes its key. {_what_force_does(left)}")
            if not left:
                ctx.obj.echo(_who_is_next(meant, in_line(transport, meant.name)))
    except PermissionDenied as error:
        prefix = f"/{Settings.from_app(app).namespace}/"
        raise click.ClickException(f"{error}: it takes reading and writing all below {prefix}") from error
    except EtcdLockError as error:
        raise click.ClickException(str(error)) from error
    ctx.exit(1 if left else 0)


@dataclass
class _Holder:
    """One that holds the lock: its contender, and the sibling that `lock_at_least_for` leaves behind."""

    transport: Transport
    keys: list[KeyValue]
    contender: KeyValue | None = None
    """What can be asked; None: only its sibling is left."""
    owner: Owner | None = None
    asking: Asking | None = None
    answer: Answer = "none"
    gone: bool = False
    died: bool = False
    refused: str = ""
    """Why etcd does not let us ask."""
    until: float = 0.0

    def __post_init__(self) -> None:
        said = describe(self.keys[0])
        self.who = said.holder
        self.contender = next((kv for kv in self.keys if is_contender(kv.key, kv.lease)), None)
        if self.contender is None and not (said.nonce and self.keys[0].lease):  # no sibling, but a stranger
            self.contender = self.keys[0]
        self.owner = owner_of(self.transport, self.contender.lease) if self.contender is not None else None

    def ask(self, wait: float | None) -> None:
        if self.contender is None or self.owner is None:
            return
        at = iso(datetime.now(timezone.utc))
        asking = Asking(self.transport, self.owner, self.contender, by=_us(), at=at)
        try:
            self.gone = not asking.ask()
        except (EtcdRejected, NoSpace) as error:  # it reads, and may delete, but takes no new key
            self.refused = str(error)
        else:
            self.asking = asking
            self.until = time.monotonic() + (self.owner.ttl + _BESIDES if wait is None else wait)

    def look(self) -> None:
        """See what has come of it."""
        assert self.asking is not None
        answer = self.asking.look()
        if answer == "told" and self.answer != "told":
            self.until = max(self.until, time.monotonic() + _BESIDES)
        self.answer, self.gone = answer, answer == "gone"
        if self.gone and self.contender is not None:
            self.died = self.transport.lease_time_to_live(self.contender.lease).ttl < 0

    @property
    def waits(self) -> bool:
        return self.asking is not None and not self.gone and time.monotonic() < self.until

    def outcome(self) -> str:
        if self.contender is None:
            left = self.transport.lease_time_to_live(self.keys[0].lease).ttl
            return f"has ended, and its lock_at_least_for keeps the lock taken for {max(0, left)} s more"
        if self.owner is None:
            if not self.contender.lease:
                return "is a key without a lease, which stays until somebody deletes it"
            return "cannot be asked: it is no holder of this package's. End it where it runs"
        if self.refused:
            return f"cannot be asked: {self.refused}"
        if self.gone:
            how = "no longer has it: its lease has ended" if self.died else "has given it back"
            rests = ", but its lock_at_least_for keeps the lock taken for a while" if len(self.keys) > 1 else ""
            return how + rests
        if self.answer == "told":
            return 'was told, and goes on: its on_lost is "warn", or it is in a call that nothing interrupts'
        return "has not answered: it is stopped or cut off, or of a version that cannot be asked"

    def withdraw(self) -> None:
        if self.asking is not None:
            with suppress(EtcdLockError):  # it goes with the lease
                self.asking.withdraw()


def _holders(app: Celery, transport: Transport, name: str) -> list[_Holder]:
    """Those of the queue who are in: the first, and those who are beside it."""
    queue = in_line(transport, name)
    if not queue:
        return []
    kind, first = kind_of(name, queue[0].key), queue[0].create_revision
    by_revision: dict[int, list[KeyValue]] = {}
    for kv in queue:
        if kv.create_revision != first and (kind == "write" or kind_of(name, kv.key) != kind):
            break
        by_revision.setdefault(kv.create_revision, []).append(kv)
    groups = list(by_revision.values())
    return [_Holder(transport, keys) for keys in (groups[: _limit(app, queue[0])] if kind == "slot" else groups)]


def _limit(app: Celery, holder: KeyValue) -> int:
    """How many may be in beside each other: what the holder's task says. Unknown here: of one it is sure."""
    with suppress(Exception):  # whatever keeps the project's tasks from being imported
        app.loader.import_default_modules()
    task: Any = app.tasks.get(describe(holder).task)
    return task._mode.limit if isinstance(task, SingletonTask) and task._mode.limit else 1


def _ask(holders: Sequence[_Holder], wait: float | None, progress: Progress) -> None:
    """Ask them, and wait for their answers. Ctrl-C takes the question back."""
    try:
        for holder in holders:
            holder.ask(wait)
        while waiting := [holder for holder in holders if holder.waits]:
            progress.show(_progress_of(waiting))
            time.sleep(_LOOK_EVERY)
            for holder in waiting:
                holder.look()
    finally:
        progress.clear()
        for holder in holders:
            holder.withdraw()


def _progress_of(waiting: Sequence[_Holder]) -> str:
    who = waiting[0].who + (f" and {len(waiting) - 1} more" if waiting[1:] else "")
    if waiting[0].answer == "told":
        return f"told, and about to end: {who}"
    owner = waiting[0].owner
    return f"asked, and looks within {owner.ttl if owner else '?'} s: {who}"


def _force(ctx: click.Context, transport: Transport, holders: Sequence[_Holder], *, yes: bool) -> None:
    ctx.obj.echo(_what_force_does(holders))
    if not yes and sys.stdin.isatty() and not click.confirm(f"Delete {' and '.join(h.who for h in holders)}?"):
        return
    for holder in holders:
        for kv in holder.keys:
            transport.txn(Txn([created_at(kv.key, kv.create_revision)], [Delete(kv.key)]))
        holder.gone = True
        ctx.obj.echo(f"{holder.who}: its key was deleted")


def _what_force_does(holders: Sequence[_Holder]) -> str:
    if all(holder.contender is None for holder in holders):
        return "That ends this time early, and does nothing else."
    ttl = max((holder.owner.ttl for holder in holders if holder.owner is not None), default=0)
    return _WHAT_FORCE_DOES.format(ttl=ttl) if ttl else _WHAT_FORCE_DOES.replace(" ({ttl} s)", "")


def _who_is_next(meant: Meant, queue: Sequence[KeyValue]) -> str:
    if not queue:
        return f"{meant.title} is free"
    return f"{meant.title} is now held by {describe(queue[0]).holder}"


def _us() -> str:
    with suppress(Exception):  # no user of that number, in a container
        return f"{getpass.getuser()}@{socket.gethostname()}"
    return socket.gethostname()
