"""``celery etcd-lock``: what holds, what waits, and what to do about it."""

from __future__ import annotations

import click

from celery_etcd_lock.cli.hold import hold
from celery_etcd_lock.cli.release import release

__all__ = ["etcd_lock"]


@click.group("etcd-lock")
def etcd_lock() -> None:
    """Locks on etcd."""


for command in (hold, release):
    etcd_lock.add_command(command)
