"""The project's etcd, for a command; and what is wrong with it, as one clear line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import click

from celery_etcd_lock.etcd import Transport
from celery_etcd_lock.exceptions import Compacted, ConfigError, EtcdLockError, EtcdUnavailable, PermissionDenied
from celery_etcd_lock.settings import Settings

__all__ = ["Etcd", "connected"]


@dataclass(frozen=True)
class Etcd:
    """The etcd that the settings name."""

    settings: Settings
    transport: Transport

    def below(self, part: str) -> str:
        """What all keys of that part of the namespace begin with: ``/celery/locks/`` for ``"locks"``."""
        return f"/{self.settings.namespace}/{part}/"


@contextmanager
def connected(ctx: click.Context) -> Iterator[Etcd]:
    """The etcd of the app of `ctx`, for a ``with`` block. What goes wrong in there is a `click.ClickException`.

    Each request takes ``etcd_lock_timeout`` seconds at most.
    """
    settings = None
    try:
        settings = Settings.from_app(ctx.obj.app)
        settings.check_here()
        with closing(settings.connect()) as transport:
            yield Etcd(settings, transport)
    except EtcdLockError as error:
        raise click.ClickException(_said(error, settings)) from error


def _said(error: EtcdLockError, settings: Settings | None) -> str:
    if isinstance(error, ConfigError) or settings is None:
        return str(error)
    if isinstance(error, Compacted):
        return "etcd has forgotten the moment as of which its keys were being read (it was compacted): try again"
    if isinstance(error, PermissionDenied):
        prefix = f"/{settings.namespace}/"
        grant = f"etcdctl role grant-permission ROLE read --prefix {prefix}"
        return f"{error}: it takes reading all below {prefix}: {grant}"
    if isinstance(error, EtcdUnavailable) and settings.default_endpoints and not settings.client:
        return f"{error} (that is only the default: set etcd_lock_endpoints to where etcd is)"
    return str(error)
