"""``sessions``: the processes that hold locks, or could."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import click
from celery.bin.base import CeleryCommand, CeleryOption

from celery_etcd_lock.cli.ages import ago, left
from celery_etcd_lock.cli.connected import connected
from celery_etcd_lock.cli.leases import left_of
from celery_etcd_lock.cli.pages import keys_below
from celery_etcd_lock.cli.queues import lock_name_in
from celery_etcd_lock.cli.tables import Column, draw, terminal_width
from celery_etcd_lock.etcd.api import KeyValue, LeaseKeys

__all__ = ["sessions"]

_COLUMNS = (
    Column("HOST", 8),
    Column("PID", right=True),
    Column("WORKER"),
    Column("LEASE", 9),
    Column("AGE", right=True),
    Column("TTL", right=True),
    Column("LOCKS", right=True),
)


@click.command(cls=CeleryCommand)
@click.option("--json", "as_json", cls=CeleryOption, is_flag=True, help_group="Sessions Options", help="As JSON.")
@click.pass_context
def sessions(ctx: click.Context, as_json: bool) -> None:
    """Processes that have taken locks.

    Each has one session, on which all its locks hang.

    \b
    WORKER  the same for all processes of one worker; another each time it starts
    TTL     how long its locks outlive it, unless its worker lives to see its end
    LOCKS   how many it holds or waits for
    """  # noqa: D301 - click's mark for lines that stay
    now = datetime.now(timezone.utc)
    with connected(ctx) as etcd:
        prefix, locks = etcd.below("sessions"), etcd.below("locks")
        parsed = (_Session.of(kv, prefix) for kv in keys_below(etcd.transport, prefix))
        found = sorted((each for each in parsed if each is not None), key=lambda each: (each.host, each.worker))
        asked = left_of(etcd.transport, (each.lease for each in found), keys=True)
    if as_json:
        ctx.obj.echo(json.dumps([each.to_json(asked, locks) for each in found], ensure_ascii=False, indent=1))
        return
    rows = [
        (each.host, each.pid, each.worker, f"{each.lease:x}", ago(each.start, now), left(each.lease, asked),
         _shown(_locks_on(asked, each.lease, locks)))
        for each in found
    ]  # fmt: skip
    if rows:
        for line in draw(ctx.obj.style, _COLUMNS, rows, width=terminal_width()):
            ctx.obj.echo(line)
    else:
        click.echo("no process has a session: none has taken a lock, or all have ended", err=True)


@dataclass(frozen=True)
class _Session:
    """One process, as it says itself."""

    key: str
    worker: str
    host: str
    pid: str
    start: str
    lease: int

    @classmethod
    def of(cls, kv: KeyValue, prefix: str) -> _Session | None:
        """None: the key is no session's."""
        worker, slash, process = kv.key.removeprefix(prefix).partition("/")
        if not slash or "/" in process:
            return None
        try:
            said = json.loads(kv.value)
            host, start = str(said["host"]), str(said["start"])
        except (ValueError, TypeError, KeyError):
            return None
        return cls(kv.key, worker, host, process.partition("-")[0], start, kv.lease)

    def to_json(self, asked: dict[int, LeaseKeys], locks: str) -> dict[str, Any]:
        return {
            "session": self.key,
            "instance": self.worker,
            "host": self.host,
            "pid": int(self.pid) if self.pid.isdecimal() else None,
            "start": self.start,
            "lease": f"{self.lease:x}",
            "ttl": asked[self.lease].ttl if self.lease in asked else None,
            "locks": _locks_on(asked, self.lease, locks),
        }


def _locks_on(asked: dict[int, LeaseKeys], lease: int, locks: str) -> list[str] | None:
    """The names of the locks that hang on `lease`; None: it was not asked for."""
    if lease not in asked:
        return None
    return sorted({lock_name_in(key) for key in asked[lease].keys if key.startswith(locks)})


def _shown(locks: Sequence[str] | None) -> str:
    return "?" if locks is None else str(len(locks))
