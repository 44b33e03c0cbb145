"""``hold``: run a command under a task's lock."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import CeleryCommand, CeleryOption

from celery_etcd_lock.cli.child import Child
from celery_etcd_lock.cli.progress import Progress
from celery_etcd_lock.cli.waiting import shown_while_waiting
from celery_etcd_lock.cli.which import Meant, lock_meant
from celery_etcd_lock.exceptions import EtcdLockError, LockLost, LockTimeout
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.queue import EXCLUSIVE, SHARED, Mode
from celery_etcd_lock.locks.session import Session
from celery_etcd_lock.locks.waiting import Bell
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.interrupts import allowed, deferred

if TYPE_CHECKING:
    from celery_etcd_lock.locks.held import HeldLock

__all__ = ["LOST", "TIMED_OUT", "hold"]

TIMED_OUT = 124
"""Exit status when ``--timeout`` has passed; ``timeout``'s own."""
LOST = 125
"""Exit status when the lock was lost."""
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127
"""As a shell has them."""

_SIGNALS = [
    getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]  # fmt: skip


class _WithCommand(CeleryCommand):  # type: ignore[misc,unused-ignore]
    """A command that takes another one, after ``--``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ours, mark, theirs = args, "", []
        if "--" in args:
            where = args.index("--")
            ours, mark, theirs = args[:where], "--", args[where + 1 :]
        if mark and not theirs:
            raise click.UsageError("after -- comes the command to run", ctx)
        ctx.meta[__name__] = tuple(theirs)
        rest: list[str] = super().parse_args(ctx, ours)
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


@click.command(cls=_WithCommand)
@click.argument("task")
@click.argument("args", nargs=-1)
@click.option(
    "--timeout",
    cls=CeleryOption,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help_group="Hold Options",
    help=f"Wait no longer than this, then exit with {TIMED_OUT}. Default: for as long as it takes.",
)
@click.option(
    "--kill-after",
    cls=CeleryOption,
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help_group="Hold Options",
    help="If the lock is lost: from SIGTERM to SIGKILL.",
)
@click.option(
    "--shared",
    cls=CeleryOption,
    is_flag=True,
    help_group="Hold Options",
    help='Hold it beside shared ones (lock_mode="shared"), and keep only exclusive ones out.',
)
@click.option(
    "--reason",
    cls=CeleryOption,
    metavar="TEXT",
    help_group="Hold Options",
    help="What others are told while it is held. Default: the command's name, without its arguments.",
)
@click.pass_context
def hold(
    ctx: click.Context,
    task: str,
    args: tuple[str, ...],
    timeout: float | None,
    kill_after: float,
    shared: bool,
    reason: str | None,
) -> None:
    """Run a command under a task's lock.

    For a deploy or a migration: no run of TASK begins before the command has ended. ARGS are the task's arguments, as
    JSON: a list of positional ones, an object of keyword ones, or both. Those that do not count for the lock may be
    left out. Or a key, as `ls` shows it: account_id=42. In place of TASK, a lock's name with its leading '/'. It waits
    its turn behind whoever holds the lock now. Without a COMMAND it holds the lock until Ctrl-C.

    \b
    celery -A proj etcd-lock hold shop.sync '[42]' -- ./migrate --fast
    celery -A proj etcd-lock hold shop.sync '{"account_id": 42}'

    The lock is held alone, also that of a task with lock_mode="shared" or lock_limit: all its runs are kept out. Tasks
    that come meanwhile do what their on_conflict says. The command finds ETCD_LOCK_KEY and ETCD_LOCK_REV, the fencing
    token, in its environment. It is ended if the lock is lost.

    \b
    Exit status: the command's own (128+n: ended by signal n), or
      1    it could not be done          124  --timeout has passed
      2    wrong usage                   125  the lock was lost
      126  COMMAND cannot be started     127  there is no such COMMAND
    """  # noqa: D301 - click's mark for lines that stay
    app = ctx.obj.app
    command = ctx.meta.get(__name__, ())
    progress = Progress(quiet=ctx.obj.quiet)
    meant = lock_meant(app, task, args)
    _warn_if_nobody_locks(app, progress)
    if command and shutil.which(command[0]) is None:
        found = Path(command[0]).exists() and os.sep in command[0]
        progress.say(f"{command[0]}: {'cannot be executed' if found else 'there is no such command'}", anyway=True)
        ctx.exit(_NOT_EXECUTABLE if found else _NOT_FOUND)
    holding = _Holding(meant, SHARED if shared else EXCLUSIVE, command, timeout, kill_after, progress)
    try:
        with holding.signals(), ExitStack() as stack:
            with deferred():
                session = stack.enter_context(Session.from_app(app))
            status = holding.run(session, _described(command, reason))
    except _Stopped as stopped:
        status = 128 + stopped.number
    except LockTimeout as error:
        held_by = f"it is held by {error.holder or 'somebody else'}" + (f" since {error.since}" if error.since else "")
        progress.say(f"{meant.title} did not come free within {timeout:g} s: {held_by}", anyway=True)
        status = TIMED_OUT
    except LockLost as error:
        progress.say(f"lost: {error}", anyway=True)
        status = LOST
    except EtcdLockError as error:
        raise click.ClickException(str(error)) from error
    ctx.exit(status)


class _Stopped(BaseException):
    """A signal that is to end us came."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass
class _Holding:
    meant: Meant
    mode: Mode
    command: tuple[str, ...]
    timeout: float | None
    kill_after: float
    progress: Progress
    child: Child | None = None
    lost: str = ""
    stopping: bool = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Signals are passed on to the command, and end us where there is none, yet or at all."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            if before[number] is not signal.SIG_IGN:  # nohup's
                signal.signal(number, self._signalled)
        try:
            yield
        finally:
            for number, handler in before.items():
                with suppress(TypeError):  # one that was not installed from Python
                    signal.signal(number, handler)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        if self.child is not None:
            self.child.pass_on(number)
        elif not self.stopping:
            self.stopping = True
            raise _Stopped(number)

    def run(self, session: Session, describe: Mapping[str, str | int]) -> int:
        """Take the lock, do what is to be done, give it back. Returns the exit status."""
        held = self.acquired(session, describe)
        self.progress.say(f"holding {self.meant.title}: fencing token {held.fencing_token}")
        try:
            status = self.run_command(held) if self.command else self.wait(held)
        finally:
            outcome = held.release()
        if outcome == "lost":
            reason = self.lost or "its key was deleted"
            self.progress.say(f"{self.meant.title} was lost: {reason}. {self._came_of_it(status)}", anyway=True)
            return LOST
        if outcome == "unanswered":
            self.progress.say(
                f"etcd does not answer: {self.meant.title} will be free within {session.ttl} s", anyway=True
            )
        return status

    def acquired(self, session: Session, describe: Mapping[str, str | int]) -> HeldLock:
        name = self.meant.name
        with shown_while_waiting(self.progress, session.transport, self.meant.title, name, session.lease), deferred():
            return acquire(session, name, self.mode, timeout=self.timeout, describe=describe, waiting=allowed)

    def run_command(self, held: HeldLock) -> int:
        environment = {**os.environ, "ETCD_LOCK_KEY": held.key, "ETCD_LOCK_REV": str(held.fencing_token)}
        with deferred():
            held.assert_held()
            try:
                child = self.child = Child(self.command, environment, kill_after=self.kill_after)
            except OSError as error:
                self.progress.say(f"{self.command[0]}: {error.strerror}", anyway=True)
                return _NOT_EXECUTABLE

        def end(reason: str) -> None:
            self.lost = reason
            child.end()
            self.progress.say(f"{self.meant.title} is lost: {reason}. Ending {self.command[0]}", anyway=True)

        held.on_lost(end)
        return child.wait()

    def wait(self, held: HeldLock) -> int:
        bell = Bell()

        def note(reason: str) -> None:
            self.lost = reason
            bell.set()

        held.on_lost(note)
        try:
            while not self.lost:
                self.progress.show(f"holding {self.meant.title}: Ctrl-C gives it back")
                bell.wait(1.0)
        except _Stopped:
            self.progress.say(f"{self.meant.title} is given back")
        return 0

    def _came_of_it(self, status: int) -> str:
        if not self.command:
            return "Others may hold it by now"
        return f"{self.command[0]} ended with status {status}, and others may have held it meanwhile"


def _described(command: tuple[str, ...], reason: str | None) -> dict[str, str | int]:
    """What others are told of us. Of the command its name only: its arguments may be secret."""
    name = Path(command[0]).name + (" …" if command[1:] else "") if command else ""
    what = reason or name
    described: dict[str, str | int] = {"for": f"etcd-lock hold: {what}" if what else "etcd-lock hold"}
    with suppress(Exception):  # no user of that number, in a container
        described["user"] = getpass.getuser()
    return described


def _warn_if_nobody_locks(app: Any, progress: Progress) -> None:
    enabled = Settings.from_app(app).enabled
    if enabled is not True:
        progress.say(f"etcd_lock_enabled is {enabled!r} in this project: its tasks run whether this is held or not")
