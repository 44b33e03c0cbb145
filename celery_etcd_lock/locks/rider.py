"""Operations of somebody else's that go with a lock: by the transaction that takes it, or that gives it back.

A `Rider` has a condition of its own. If that does not hold it is dropped, and the lock is taken without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from celery_etcd_lock.etcd.api import Compare, Operation, Put, Range, Txn, created_at
from celery_etcd_lock.exceptions import LeaseNotFound, LockLost

if TYPE_CHECKING:
    from celery_etcd_lock.locks.contender import Contender
    from celery_etcd_lock.locks.session import Session

__all__ = ["Rider", "leases_of", "ride"]


class Rider(NamedTuple):
    """`operations`, to be carried out together with taking a lock if all of `compare` hold, and dropped if not.

    An acquire that fails may have carried them out all the same: so may any request whose answer is lost.
    """

    compare: Sequence[Compare]
    operations: Sequence[Operation]

    @property
    def leases(self) -> set[int]:
        return leases_of(self.operations)


def leases_of(operations: Iterable[Operation]) -> set[int]:
    """The leases that `operations` put keys on: a transaction is refused when one of them is gone."""
    return {each.lease for each in operations if isinstance(each, Put) and each.lease}


def ride(session: Session, contender: Contender, rider: Rider) -> bool:
    """Carry `rider` out while `contender` holds its lock. False: it was dropped.

    `LockLost` if the contender's key is gone, `EtcdUnavailable` if etcd does not answer.
    """
    key, created = contender.key, contender.create_revision
    request = Txn([created_at(key, created), *rider.compare], rider.operations, [Range(key, keys_only=True)])
    try:
        reply = session.txn(request)
    except LeaseNotFound:
        if not rider.leases - {session.lease}:
            session.lease_gone()
        session.assert_trusted()
        return False
    if not reply.succeeded:
        mine = reply.range(0).kvs
        if not mine or mine[0].create_revision != created:
            raise LockLost(f"{contender.name}: our key {key} was deleted while we went in")
    return reply.succeeded
