"""``celery etcd-lock``: what holds, what waits, and what to do about it.

`celery` imports this at every start, whatever it is asked to do. So a command is imported when it is called for: each
is a module of its name here, with a command of that name in it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click
from celery.bin.base import handle_preload_options
from click_didyoumean import DYMGroup

__all__ = ["etcd_lock"]

_COMMANDS = (
    "ls",
    "show",
    "why",
    "sessions",
    "beat",
    "history",
    "doctor",
)


class _Commands(DYMGroup):  # type: ignore[misc,unused-ignore]
    """A command is imported when it is called for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"{__name__}.{cmd_name}"), cmd_name)
        return command


@click.group("etcd-lock", cls=_Commands)
@click.pass_context
@handle_preload_options
def etcd_lock(ctx: click.Context, **_options: Any) -> None:
    """Locks on etcd: who holds them, and who waits."""
