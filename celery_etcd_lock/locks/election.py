"""Leader election: candidates stand in one queue, whoever is first leads, and everybody can watch.

A candidate is an exclusive contender whose value is what it proclaims, as it is: ``NAME/write/<lease hex>`` here,
``NAME/<lease hex>`` for Go's ``concurrency.Election``, ``etcdctl elect NAME`` and the server's Election RPC. All of
them take every key below ``NAME/`` for a candidate and the one with the lowest create revision for the leader, so
they stand in one election with ours, and see each other's values. (A mutex of the same name would be a candidate,
too: give elections names of their own.)
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import NamedTuple

from celery_etcd_lock.etcd.api import Compare, Put, Range, Txn, TxnReply, prefix_end
from celery_etcd_lock.exceptions import EtcdUnavailable, LeaseNotFound, LockLost
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.contender import Contender, Removal
from celery_etcd_lock.locks.held import HeldLock
from celery_etcd_lock.locks.queue import checked_name
from celery_etcd_lock.locks.session import Session

__all__ = ["Election", "Leader", "Leadership", "Observation"]

_PAUSE = 0.2
"""Seconds between two looks while etcd does not answer."""


class Leader(NamedTuple):
    """Who led at the moment of one answer of etcd's."""

    key: str
    value: str
    """As proclaimed; bytes that are no UTF-8 (a stranger's) as surrogate escapes."""
    create_revision: int
    """When it joined. The same for as long as it leads, whatever it proclaims."""
    mod_revision: int
    """When it last proclaimed."""
    lease: int


class Election:
    """One leader at a time, first come first served, among all who campaign under `name`::

        election = Election(session, "/scheduler")
        with election.campaign("host-1") as leadership:
            leadership.proclaim("host-1, ready")

    `ConfigError` for a name that a lock cannot have.
    """

    def __init__(self, session: Session, name: str) -> None:
        self.session = session
        self.name = checked_name(name)

    def campaign(self, value: str = "", *, blocking: bool = True, timeout: float | None = None) -> Leadership:
        """Stand for election with `value`, and wait to be elected, for `timeout` seconds (None: as long as it takes).

        Raises what `Mutex.acquire` does, and then is no candidate any more.
        """
        if not blocking and timeout is not None:
            raise ValueError("campaign(blocking=False) does not wait: leave out timeout")
        held = acquire(self.session, self.name, blocking=blocking, timeout=timeout, value=_encoded(value))
        return Leadership(self.session, held._contender, held.fencing_token)  # noqa: SLF001 - made from it

    def leader(self) -> Leader | None:
        """Who leads now; None: nobody. `EtcdUnavailable` if no etcd answers."""
        return self.look()[0]

    def look(self) -> tuple[Leader | None, int]:
        """The leader, and the revision at which it was that."""
        start = self.name + "/"
        first = Range(start, prefix_end(start), limit=1, sort="create")
        reply = self.session.txn(Txn([], [first]))
        kvs = reply.range(0).kvs
        if not kvs:
            return None, reply.header.revision
        (kv,) = kvs
        value = kv.value.decode("utf-8", "surrogateescape")
        return Leader(kv.key, value, kv.create_revision, kv.mod_revision, kv.lease), reply.header.revision

    def observe(self) -> Observation:
        """The leaders from now on: see `Observation`."""
        return Observation(self)

    def __repr__(self) -> str:
        return f"<Election {self.name}>"


class Leadership(HeldLock):
    """What `campaign` returns: a held lock, with something to say. As a context manager it resigns at the end."""

    def __init__(self, session: Session, contender: Contender, fencing_token: int) -> None:
        super().__init__(session, contender, fencing_token)
        self._proclaiming = threading.Lock()
        self._proclaimed = contender.create_revision

    def proclaim(self, value: str) -> None:
        """Show `value` to whoever asks or observes. Lead on as before: the create revision stays.

        `LockLost` if the leadership is not ours any more. `EtcdUnavailable` if no etcd answers: then the value may
        show even so, but not later than the next one that succeeds.
        """
        with self._proclaiming:
            self.assert_held()
            put = Put(self.key, _encoded(value), self._session.lease)
            while True:
                # The mod revision, so that a request that comes late does not take back what was said since.
                unchanged = Compare(self.key, "mod", "==", self._proclaimed)
                try:
                    reply = self._session.txn(Txn([self.compare(), unchanged], [put], [Range(self.key)]))
                except LeaseNotFound:
                    self._session.lease_gone()
                    raise LockLost(f"{self.name}: {self.why_not()}") from None
                if reply.succeeded:
                    self._proclaimed = reply.header.revision
                    return
                kvs = reply.range(0).kvs
                if not kvs or kvs[0].create_revision != self._contender.create_revision:
                    self._session.contenders.lose(self._contender, f"its key {self.key} was deleted")
                    raise LockLost(f"{self.name}: {self.why_not()}")
                self._proclaimed = kvs[0].mod_revision  # an earlier one, which got no answer, was carried out

    def txn(self, txn: Txn, *, timeout: float | None = None) -> TxnReply:
        """Carry out `txn` if this leads at that moment, as etcd sees it. The reply is to `txn` alone.

        `LockLost` if it does not lead: then nothing was done. `EtcdUnavailable` if no etcd answers within `timeout`
        seconds: then it may be done even so, but not once another leads.
        """
        self.assert_held()
        guarded = Txn([self.compare(), *txn.compare], txn.success, [Range(self.key, keys_only=True), *txn.failure])
        reply = self._session.txn(guarded, timeout=timeout)
        if reply.succeeded:
            return reply
        kvs = reply.range(0).kvs
        if not kvs or kvs[0].create_revision != self._contender.create_revision:
            self._session.contenders.lose(self._contender, f"its key {self.key} was deleted")
            raise LockLost(f"{self.name}: {self.why_not()}")
        return TxnReply(reply.header, False, reply.responses[1:])

    def resign(self) -> Removal:
        """Give it up, for the next candidate to lead. As `release`, which it is."""
        return self.release()

    def __enter__(self) -> Leadership:
        return self


class Observation:
    """The leader there is, and then each new one, and each new value: iterate it in one thread, close it from any.

    Ends after `close`. `LockLost` when the session is lost or closed; while etcd does not answer it waits. Of
    changes in quick succession some may not be seen, the last always is. The time between two leaders does not show.
    """

    def __init__(self, election: Election) -> None:
        self._election = election
        self._woken = threading.Event()
        self._closed = False
        self._seen: Leader | None = None
        self._revision = 0

    def __iter__(self) -> Observation:
        return self

    def __next__(self) -> Leader:
        session = self._election.session
        while True:
            self._woken.clear()
            if self._closed:
                raise StopIteration
            session.assert_trusted()
            try:
                leader, revision = self._election.look()
            except EtcdUnavailable:
                self._woken.wait(_PAUSE)
                continue
            if revision < self._revision:
                self._woken.wait(_PAUSE)  # from a member that is behind
                continue
            self._revision = revision
            if leader is not None and leader != self._seen:
                self._seen = leader
                return leader
            watched = leader.key if leader else self._election.name + "/"
            with session.wakeups.watching(self._election.name, [watched], revision + 1, self._woken, puts=True):
                # As a watch may sit on a member that is cut off, look again once per TTL all the same.
                if not session.lost:
                    self._woken.wait(session.ttl)

    def close(self) -> None:
        """End the iteration, at once, from any thread. Never raises."""
        self._closed = True
        self._woken.set()

    def __enter__(self) -> Observation:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _encoded(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")
