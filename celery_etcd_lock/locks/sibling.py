"""A lock that stays taken for some time, though it is given back earlier or its process dies.

The contender has a *sibling*: a second key of the same queue, made by the same transaction, so that both have one
create revision and count as one. At first it hangs on the session's lease, and goes with its contender if nothing
comes of the acquire. Once the lock is held it moves to a lease of its own, whose time is the time for which the lock
stays taken; moving it keeps its create revision. From there on nobody takes it back: its lease ends it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from celery_etcd_lock.etcd.api import Put, Txn, created_at
from celery_etcd_lock.exceptions import EtcdUnavailable, LeaseNotFound, LockLost

if TYPE_CHECKING:
    from celery_etcd_lock.locks.contender import Contender
    from celery_etcd_lock.locks.session import Session

__all__ = ["move"]


def move(session: Session, contender: Contender, value: bytes, seconds: float) -> float:
    """Put the sibling of `contender`, which holds its lock, on a lease of its own of at least `seconds`.

    Returns when that lease ends at the earliest, by the session's clock. `LockLost` if either key is gone,
    `EtcdUnavailable` if etcd does not answer: then the sibling still goes with its contender.
    """
    sibling = contender.sibling
    assert sibling is not None
    granted = session.transport.lease_grant(math.ceil(seconds))
    until = session.now() + granted.ttl
    unmoved = [created_at(each.key, contender.create_revision) for each in (contender, sibling)]
    try:
        moved = session.txn(Txn(unmoved, [Put(sibling.key, value, granted.lease)])).succeeded
    except LeaseNotFound:
        raise EtcdUnavailable(f"{contender.name}: etcd took longer than {granted.ttl} s to answer", True) from None
    if not moved:
        raise LockLost(f"{contender.name}: our key {contender.key} or {sibling.key} was deleted while we went in")
    return until
