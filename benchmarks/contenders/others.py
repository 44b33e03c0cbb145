"""Other people's locks, used as their own documentation shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

__all__ = ["etcd3", "etcd3gw", "redis"]


def etcd3(url: str, ttl: int) -> Callable[[str], Callable[[], object]]:
    """python-etcd3's Lock. (Its generated protobuf code asks for PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python.)"""
    import etcd3 as package

    parts = urlsplit(url)
    client: Any = package.client(host=parts.hostname, port=parts.port)

    def take(name: str) -> Any:
        lock = client.lock(name, ttl=ttl)
        assert lock.acquire(timeout=None)
        return lock.release

    return take


def etcd3gw(url: str, ttl: int) -> Callable[[str], Callable[[], object]]:
    """etcd3gw's Lock, over the gateway. It cannot wait: who does not get it has to come again."""
    from etcd3gw.client import Etcd3Client

    parts = urlsplit(url)
    client: Any = Etcd3Client(host=parts.hostname, port=parts.port, api_path="/v3/")

    def take(name: str) -> Any:
        lock = client.lock(name, ttl=ttl)
        assert lock.acquire()
        return lock.release

    return take


def redis(url: str, ttl: int) -> Callable[[str], Callable[[], object]]:
    """redis-py's Lock. Who waits looks again every 0.1 s, its default."""
    from redis import Redis

    client = Redis.from_url(url)

    def take(name: str) -> Any:
        lock = client.lock(name, timeout=ttl)
        assert lock.acquire()
        return lock.release

    return take
