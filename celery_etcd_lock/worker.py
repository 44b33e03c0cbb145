"""The worker's side: settings are checked before it takes its first message."""

from __future__ import annotations

from typing import Any

import click
from celery import bootsteps, signals

from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.settings import Settings

__all__ = ["CheckSettings"]


class CheckSettings(bootsteps.Step):  # type: ignore[misc,unused-ignore]
    """Stops a worker whose settings cannot be meant, with one clean line, before it runs anything."""

    label = "etcd-lock"

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        try:
            settings = Settings.from_app(parent.app)
            settings.check_here()
        except ConfigError as error:
            raise click.ClickException(str(error)) from error
        forks = getattr(parent.pool_cls, "__module__", "").endswith("prefork")
        if forks and any(url.startswith("memory://") for url in settings.endpoints):
            raise click.ClickException(
                "etcd_lock_endpoints is memory://, which the processes of a prefork pool do not share: nothing "
                "would be locked. Give it a real etcd, or start the worker with -P solo or -P threads"
            )


def _add_step(sender: Any = None, **_kwargs: Any) -> None:
    sender.app.steps["worker"].add(CheckSettings)


# The step raises, not this receiver: signals swallow exceptions.
signals.worker_init.connect(_add_step, weak=False)
