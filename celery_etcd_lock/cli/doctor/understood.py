"""The settings as they are understood, without their secrets; and what about them is worth a word. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

from celery_etcd_lock.cli.doctor.findings import Finding
from celery_etcd_lock.etcd.api import TLS
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.conflict import Conflict

__all__ = ["about_settings", "understood"]

_SECRET = {"password"}
_MASK = "********"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def understood(settings: Settings) -> dict[str, Any]:
    """By their names on ``app.conf``, plain JSON."""
    names = [each.name for each in fields(Settings) if each.init]
    return {f"etcd_lock_{name}": _plain(name, getattr(settings, name)) for name in names}


def _plain(name: str, value: object) -> Any:
    if name in _SECRET:
        return None if value is None else _MASK
    if isinstance(value, TLS):
        return value._asdict()
    if isinstance(value, Conflict):
        return value.to_json()
    if isinstance(value, tuple):
        return list(value)
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    return value


def about_settings(settings: Settings) -> Iterator[Finding]:
    if not settings.enabled:
        yield Finding("warning", "settings", "etcd_lock_enabled is False: nothing is locked", "leave it out, to lock")
    elif settings.enabled == "observe":
        what = 'etcd_lock_enabled is "observe": what is taken is counted, and runs all the same'
        yield Finding("note", "settings", what, "leave it out, to lock")
    if settings.endpoints[0].startswith("memory://"):
        what = f"etcd_lock_endpoints is {settings.endpoints[0]}: locks in memory exclude nobody in another process"
        yield Finding("wrong", "settings", what, "name an etcd, unless this is a test")
        return
    if settings.default_endpoints and not settings.client:
        what = f"nobody has said where etcd is: {settings.endpoints[0]} is only the default"
        yield Finding(
            "note", "settings", what, "set etcd_lock_endpoints, or CELERY_ETCD_LOCK_ENDPOINTS in the environment"
        )
    elif len(settings.endpoints) == 2:
        what = "two endpoints: a cluster of two members stands still when either is away"
        yield Finding("note", "settings", what, "name all three members, or more")
    plain = [url for url in settings.endpoints if url.startswith("http://") and urlsplit(url).hostname not in _LOOPBACK]
    if settings.password and plain and not settings.client:
        what = f"the password goes to {plain[0]} without TLS, for everybody on the way to read"
        yield Finding("warning", "settings", what, "write https://, and start etcd with --cert-file and --key-file")
    if settings.use_ssl and settings.use_ssl.cert_reqs == "none":
        what = 'cert_reqs is "none": whoever stands between can take etcd\'s place'
        yield Finding("warning", "settings", what, "name etcd's CA as ca_certs in etcd_lock_use_ssl")
