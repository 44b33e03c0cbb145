"""etcd in memory: `MemoryEtcd`, the store, and `MemoryTransport`, the whole protocol on it. For tests.

A verified fake: it is held to the replies of a real etcd 3.5, revision by revision and error by error, by the
contract suite and by random histories run on both. What it is not:

* shared between processes. A forked child goes on with a copy of the store as it was at the fork; neither
  sees what the other does from there on, and so locks in it exclude nobody in another process. A prefork
  worker needs a real etcd;
* late. A lease ends at the moment its time is over (etcd takes up to a second more), and without a thread:
  every request, and every watch that waits, looks at the clock first.
"""
# ruff: noqa: ARG002  (memory answers at once: there is no use for a timeout)

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias, TypeVar
from weakref import WeakSet

from celery_etcd_lock.etcd.api import (
    Delete,
    DeleteReply,
    Event,
    Header,
    LeaseKeys,
    LeaseReply,
    Range,
    RangeReply,
    Status,
    Txn,
    TxnReply,
    Watch,
    WatchReply,
)
from celery_etcd_lock.etcd.keyspace import Keyspace, compacted, no_lease, wanted
from celery_etcd_lock.exceptions import EtcdLockError, EtcdRejected, EtcdUnavailable

__all__ = ["MemoryEtcd", "MemoryTransport", "MemoryWatch"]

_MAX_TTL = 9_000_000_000

Q = TypeVar("Q")
R = TypeVar("R")
Hook: TypeAlias = Callable[[str, Any], None]

# One lock for all stores, so that a fork can wait until none of them is in the middle of a change.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class MemoryEtcd:
    """The store: one etcd cluster, as its clients see it. Thread-safe.

    `clock` gives seconds. With a clock of a test's own, call `wake` after moving it. `min_ttl` is the shortest
    lease in seconds that the server grants. `url` is what its clients say they are connected to.
    """

    _stores: ClassVar[dict[str, MemoryEtcd]] = {}

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, min_ttl: int = 1, url: str = "memory://"
    ) -> None:
        self.url = url
        self.min_ttl = min_ttl
        self._clock = clock
        self._changed = threading.Condition(_lock)
        self._keys = Keyspace()
        self._leases: dict[int, _Lease] = {}
        self._watches: WeakSet[MemoryWatch] = WeakSet()

    @classmethod
    def shared(cls, url: str) -> MemoryEtcd:
        """The process's store of that name: the same URL, the same store."""
        with _lock:
            return cls._stores.setdefault(url, cls(url=url))

    @property
    def revision(self) -> int:
        return self._keys.revision

    @property
    def raft_term(self) -> int:
        """What the replies show; set it to stage a change of leader."""
        return self._keys.raft_term

    @raft_term.setter
    def raft_term(self, term: int) -> None:
        self._keys.raft_term = term

    def wake(self) -> None:
        """Look at the clock, end what has expired, and make every waiting watch look too."""
        with self._now():
            self._changed.notify_all()

    def compact(self, revision: int) -> None:
        """Forget what was before `revision`. `Compacted` if that is done already."""
        with self._now():
            self._keys.compact(revision)

    def range(self, request: Range) -> RangeReply:
        with self._now():
            return self._keys.range(request)

    def txn(self, request: Txn) -> TxnReply:
        with self._now(), self._told():
            return self._keys.txn(request, self._leases)

    def delete(self, request: Delete) -> DeleteReply:
        with self._now(), self._told():
            return self._keys.delete(request)

    def lease_grant(self, ttl: int) -> LeaseReply:
        with self._now():
            if ttl > _MAX_TTL:
                raise EtcdRejected("etcdserver: too large lease TTL", 11)
            lease, ttl = random.randrange(1, 2**63), max(ttl, self.min_ttl)
            self._leases[lease] = _Lease(ttl, self._clock() + ttl)
            self._changed.notify_all()  # the next expiry may be nearer now than those who wait for it know
            return LeaseReply(self._keys.header(), lease, ttl)

    def lease_renew(self, lease: int) -> LeaseReply:
        with self._now():
            if lease not in self._leases:
                return LeaseReply(self._keys.header(), lease, 0)
            ttl = self._leases[lease].ttl
            self._leases[lease].expires = self._clock() + ttl
            return LeaseReply(self._keys.header(), lease, ttl)

    def lease_revoke(self, lease: int) -> None:
        with self._now():
            if lease not in self._leases:
                raise no_lease()
            self._end(lease)

    def lease_time_to_live(self, lease: int, *, keys: bool = False) -> LeaseKeys:
        with self._now():
            found = self._leases.get(lease)
            if found is None:
                return LeaseKeys(self._keys.header(), lease, -1, 0)
            attached = tuple(self._keys.attached(lease)) if keys else ()
            return LeaseKeys(self._keys.header(), lease, int(found.expires - self._clock()), found.ttl, attached)

    def status(self) -> Status:
        with self._now():
            return Status(self.url, "memory", 0, 0, 1, self.raft_term, 1, self.revision)

    def start_watch(self, watch: MemoryWatch) -> None:
        """From here on `watch` is told of every change; what it asks for of the past, it is told at once."""
        with self._now():
            header, start = self._keys.header(), watch.request.start_revision
            watch.replies.append(WatchReply(header, wanted(watch.request, ())))
            if 0 < start < self._keys.compacted:
                watch.failure = compacted()
            elif start > 0:
                watch.offer(header, self._keys.history)
            self._watches.add(watch)

    def next_reply(self, watch: MemoryWatch) -> WatchReply:
        """Wait for it. `StopIteration` when the watch was closed."""
        with self._changed:
            while not watch.closed:
                self._expire()
                if watch.replies:
                    return watch.replies.popleft()
                if watch.failure:
                    raise watch.failure
                self._changed.wait(self._until_next_expiry())
            raise StopIteration

    def end_watch(self, watch: MemoryWatch, failure: EtcdLockError | None = None) -> None:
        """Make its reader end at once, quietly, or with `failure` when it has read what there is."""
        with self._changed:
            watch.failure = failure
            watch.closed = watch.closed or failure is None
            self._watches.discard(watch)
            self._changed.notify_all()

    @contextmanager
    def _now(self) -> Iterator[None]:
        with self._changed:
            self._expire()
            yield

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell the watches what has changed inside."""
        past = len(self._keys.history)
        yield
        changes = self._keys.history[past:]
        if changes:
            for watch in tuple(self._watches):
                watch.offer(self._keys.header(), changes)
            self._changed.notify_all()

    def _expire(self) -> None:
        now = self._clock()
        over = [(found.expires, lease) for lease, found in self._leases.items() if found.expires <= now]
        for _, lease in sorted(over):
            self._end(lease)

    def _until_next_expiry(self) -> float | None:
        nearest = min((found.expires for found in self._leases.values()), default=None)
        if nearest is None:
            return None
        return min(max(nearest - self._clock(), 0.01), threading.TIMEOUT_MAX)

    def _end(self, lease: int) -> None:
        with self._told():
            del self._leases[lease]
            self._keys.delete_all(self._keys.attached(lease))


class MemoryWatch:
    """A watch under way: see `api.WatchStream`."""

    def __init__(self, store: MemoryEtcd, request: Watch, connect: Callable[[], None]) -> None:
        self.request = request
        self.closed = False
        self.failure: EtcdLockError | None = None
        self.replies: deque[WatchReply] = deque()
        self._store = store
        self._connect: Callable[[], None] | None = connect

    def __iter__(self) -> Iterator[WatchReply]:
        return self

    def __next__(self) -> WatchReply:
        try:
            connect, self._connect = self._connect, None
            if connect and not self.closed:
                connect()
                self._store.start_watch(self)
            return self._store.next_reply(self)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._store.end_watch(self)

    def offer(self, header: Header, changes: Sequence[Event]) -> None:
        """Keep those that were asked for, as one reply."""
        events = wanted(self.request, changes)
        if events:
            self.replies.append(WatchReply(header, events))


class MemoryTransport:
    """A client of `store`: see `api.Transport`. Used after `close`, it raises `EtcdUnavailable`.

    For tests that stage faults: `before` and `after`, where set, are called with the verb (the method's name) and
    its request (its first argument; None for `status`) on either side of carrying it out. What they raise, the
    caller gets: with an `EtcdUnavailable` from `before` nothing was carried out; with one from `after` it was,
    and the answer is lost. A watch is carried out at the first step of its iteration; `break_watches` ends those
    under way.
    """

    def __init__(self, store: MemoryEtcd) -> None:
        self.store = store
        self.requests = 0
        """Calls so far."""
        self.before: Hook | None = None
        self.after: Hook | None = None
        self._closed = False
        self._watches: WeakSet[MemoryWatch] = WeakSet()

    @property
    def endpoints(self) -> tuple[str, ...]:
        return (self.store.url,)

    @property
    def closed(self) -> bool:
        return self._closed

    def range(self, request: Range, *, timeout: float | None = None) -> RangeReply:
        return self._call("range", request, self.store.range)

    def txn(self, request: Txn, *, timeout: float | None = None) -> TxnReply:
        return self._call("txn", request, self.store.txn)

    def delete(self, request: Delete, *, timeout: float | None = None) -> DeleteReply:
        return self._call("delete", request, self.store.delete)

    def lease_grant(self, ttl: int, *, timeout: float | None = None) -> LeaseReply:
        return self._call("lease_grant", ttl, self.store.lease_grant)

    def lease_renew(self, lease: int, *, timeout: float | None = None) -> LeaseReply:
        return self._call("lease_renew", lease, self.store.lease_renew)

    def lease_revoke(self, lease: int, *, timeout: float | None = None) -> None:
        self._call("lease_revoke", lease, self.store.lease_revoke)

    def lease_time_to_live(self, lease: int, *, keys: bool = False, timeout: float | None = None) -> LeaseKeys:
        return self._call("lease_time_to_live", lease, partial(self.store.lease_time_to_live, keys=keys))

    def watch(self, request: Watch) -> MemoryWatch:
        watch = MemoryWatch(self.store, request, partial(self._call, "watch", request, lambda _: None))
        with _lock:
            self._watches.add(watch)
        return watch

    def status(self, *, timeout: float | None = None) -> tuple[Status, ...]:
        return self._call("status", None, lambda _: (self.store.status(),))

    def close(self) -> None:
        self._closed = True
        for watch in self._open_watches():
            watch.close()

    def break_watches(self) -> None:
        """Break every watch off, as a lost connection does: each raises `EtcdUnavailable` in its reader."""
        for watch in self._open_watches():
            self.store.end_watch(watch, EtcdUnavailable("the watch broke off"))

    def _open_watches(self) -> list[MemoryWatch]:
        with _lock:
            return list(self._watches)

    def _call(self, verb: str, request: Q, carry_out: Callable[[Q], R]) -> R:
        if self._closed:
            raise EtcdUnavailable("the connection to etcd was closed")
        with _lock:
            self.requests += 1
        if self.before:
            self.before(verb, request)
        reply = carry_out(request)
        if self.after:
            self.after(verb, request)
        return reply


@dataclass(slots=True)
class _Lease:
    ttl: int
    expires: float
