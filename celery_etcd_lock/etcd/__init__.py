"""The wire: etcd v3 as a handful of verbs. Knows nothing of locks or Celery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from celery_etcd_lock.etcd.api import TLS, Transport
from celery_etcd_lock.exceptions import ConfigError

__all__ = ["TLS", "Transport", "connect"]


def connect(
    endpoints: str | Sequence[str] = (),
    *,
    timeout: float = 5.0,
    username: str | None = None,
    password: str | None = None,
    tls: TLS | None = None,
    transport: Literal["gateway", "grpc"] = "gateway",
    client: str | Callable[[], Any] | None = None,
) -> Transport:
    """A transport to the cluster at `endpoints`: URLs, in a list or separated by commas. Opens no socket yet.

    `client`, a callable or its dotted path, gives an ``etcd3.Etcd3Client``, whose channel and token gRPC then uses in
    place of `endpoints`, `username`, `password` and `tls`; see `grpc_client`. `ConfigError` for what cannot be meant,
    or is not installed.

    ``memory://`` or ``memory://NAME`` is a store inside this process, for tests: the same name, the same store.
    """
    urls = tuple(endpoints.split(",") if isinstance(endpoints, str) else endpoints)
    urls = tuple(url.strip() for url in urls if url.strip())
    if urls and all(url.startswith("memory://") for url in urls):
        from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport

        return MemoryTransport(MemoryEtcd.shared(urls[0]))
    if client is not None:
        if urls or username or password or tls:
            raise ConfigError("a client brings its own endpoint, user and TLS: leave out either it or them")
        from celery_etcd_lock.etcd.grpc_client import ClientTransport

        return ClientTransport(client, timeout=timeout)
    if transport == "grpc":
        from celery_etcd_lock.etcd.grpc import GrpcTransport

        return GrpcTransport(urls, timeout=timeout, username=username, password=password, tls=tls)
    from celery_etcd_lock.etcd.gateway import GatewayTransport

    return GatewayTransport(urls, timeout=timeout, username=username, password=password, tls=tls)
