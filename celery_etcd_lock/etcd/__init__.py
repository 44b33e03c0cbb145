"""The wire: etcd v3 as a handful of verbs. Knows nothing of locks or Celery."""

from __future__ import annotations

from collections.abc import Sequence

from celery_etcd_lock.etcd.api import TLS, Transport

__all__ = ["TLS", "Transport", "connect"]


def connect(
    endpoints: str | Sequence[str],
    *,
    timeout: float = 5.0,
    username: str | None = None,
    password: str | None = None,
    tls: TLS | None = None,
) -> Transport:
    """A transport to the cluster at `endpoints`: URLs, in a list or separated by commas. Opens no socket yet.

    ``memory://`` or ``memory://NAME`` is a store inside this process, for tests: the same name, the same store.
    """
    urls = tuple(endpoints.split(",") if isinstance(endpoints, str) else endpoints)
    urls = tuple(url.strip() for url in urls if url.strip())
    if urls and all(url.startswith("memory://") for url in urls):
        from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport

        return MemoryTransport(MemoryEtcd.shared(urls[0]))
    from celery_etcd_lock.etcd.gateway import GatewayTransport

    return GatewayTransport(urls, timeout=timeout, username=username, password=password, tls=tls)
