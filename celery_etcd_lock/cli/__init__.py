"""``celery etcd-lock``: what holds, what waits, and what to do about it."""

from __future__ import annotations

import click
from click_didyoumean import DYMGroup

from celery_etcd_lock.cli.doctor import doctor
from celery_etcd_lock.cli.history import history

__all__ = ["etcd_lock"]


@click.group("etcd-lock", cls=DYMGroup)
def etcd_lock() -> None:
    """Locks on etcd."""


for command in (doctor, history):
    etcd_lock.add_command(command)
