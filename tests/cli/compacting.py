"""Having an etcd forget its past."""

from __future__ import annotations

import urllib.request

from celery_etcd_lock.testing import EtcdServer

__all__ = ["compact"]


def compact(server: EtcdServer, upto: int) -> None:
    body = f'{{"revision": {upto}}}'.encode()
    with urllib.request.urlopen(f"{server.url}/v3/kv/compaction", body) as answer:
        assert answer.status == 200
