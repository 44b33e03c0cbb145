"""What a role lacks when etcd says "permission denied", which names neither key nor permission."""

from __future__ import annotations

import shlex

from celery_etcd_lock.etcd.api import Txn
from celery_etcd_lock.exceptions import PermissionDenied
from celery_etcd_lock.locks.queue import is_contender

__all__ = ["denied"]


def denied(error: PermissionDenied, txn: Txn, namespace: str, lease: int) -> PermissionDenied:
    """`error`, which is etcd's answer to `txn`, with the prefix that was wanted and what to grant.

    Below the namespace that is the namespace, once and for all locks; elsewhere, the lock.
    """
    own = f"/{namespace}/"
    keys = [named.key for named in (*txn.compare, *txn.success, *txn.failure)]
    key = next((key for key in keys if not key.startswith(own)), "")
    prefix = own
    if key:
        prefix = key.rsplit("/", 2)[0] + "/" if is_contender(key, lease) else key
    grant = f"etcdctl role grant-permission ROLE readwrite --prefix {shlex.quote(prefix)}"
    return PermissionDenied(f"{error}: it takes reading and writing all below {prefix}: {grant}", error.code)
