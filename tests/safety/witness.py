"""An independent witness: which keys lived when, from a watch of everything under a prefix since its first revision.

It runs along from before the first contender, because compaction takes history away. Its stream may break with the
member that it is on; then it goes on, with another, from the revision after the last one it was told of. A key of its
own that it puts twice a second keeps that revision young, and shows when the stream no longer tells. Whoever compacts
meanwhile compacts up to `Witness.told` at most; where history was lost all the same, the testimony says that it has a
gap, and proves nothing.

In the end it compares its replay with what etcd itself says is there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType

from celery_etcd_lock.etcd.api import Event, Put, Range, Transport, Txn, Watch, WatchStream, prefix_end
from celery_etcd_lock.exceptions import Compacted, EtcdLockError
from tests.safety.history import now

__all__ = ["Account", "Change", "Lifetime", "Witness", "replay"]

logger = logging.getLogger(__name__)

_BEAT = 0.5
"""Seconds between two puts of the witness's own key."""
_SILENT = 3.0
"""Seconds without the last of them after which the stream is given up."""


@dataclass(frozen=True, slots=True)
class Change:
    """A put or delete, and when the witness was told of it: some time after it happened."""

    kind: str
    key: str
    revision: int
    created: int
    """Of a put: the key's create revision."""
    lease: int
    at: float


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A key from its creation to its deletion, in revisions, and when the witness was told of each.

    It exists at a revision r if ``created <= r < deleted``.
    """

    key: str
    created: int
    created_at: float = 0.0
    lease: int = 0
    deleted: float = float("inf")
    """A revision; infinite: it still lives."""
    deleted_at: float = float("inf")


@dataclass(frozen=True)
class Account:
    """What the witness saw, all of it up to `revision`, unless there are `gaps`."""

    lifetimes: tuple[Lifetime, ...]
    revision: int
    gaps: tuple[str, ...] = ()

    @cached_property
    def by_key(self) -> Mapping[tuple[str, int], Lifetime]:
        """By key and create revision."""
        return {(each.key, each.created): each for each in self.lifetimes}

    def of(self, key: str, created: int) -> Lifetime | None:
        return self.by_key.get((key, created))


def replay(changes: Iterable[Change], *, revision: int = 0, gaps: Iterable[str] = ()) -> Account:
    """Puts and deletes, in the order of their revisions, as lifetimes."""
    ended: list[Lifetime] = []
    alive: dict[str, Lifetime] = {}
    found = list(gaps)
    for change in changes:
        if change.revision < revision:
            found.append(f"revision {change.revision} was told after {revision}")
        revision = max(revision, change.revision)
        there = alive.get(change.key)
        if change.kind == "delete":
            if there is None:
                found.append(f"{change.key} was deleted at {change.revision}, and nobody has seen it come")
                continue
            ended.append(replace(alive.pop(change.key), deleted=change.revision, deleted_at=change.at))
        elif there is None:
            if change.created != change.revision:
                found.append(f"{change.key} was put again at {change.revision}, and nobody has seen it come")
            alive[change.key] = Lifetime(change.key, change.created, change.at, change.lease)
        elif there.created != change.created:
            found.append(f"{change.key} came anew at {change.revision}, and nobody has seen it go")
    lifetimes = sorted((*ended, *alive.values()), key=lambda each: each.created)
    return Account(tuple(lifetimes), revision, tuple(found))


class Witness:
    """The watch, in two threads of this process; a context manager. `prefix` ends in ``/``, and must be empty yet.

    `transport` is its own, with all members, and is closed by it.
    """

    def __init__(self, transport: Transport, prefix: str) -> None:
        self._transport = transport
        self._prefix = prefix
        self._own_key = f"{prefix}.witness"
        self._changes: list[Change] = []
        self._gaps: list[str] = []
        self._news = threading.Condition()
        self._ended = threading.Event()
        self._stream: WatchStream | None = None
        self._threads = [
            threading.Thread(target=work, name=f"witness{work.__name__}", daemon=True)
            for work in (self._listen, self._beat)
        ]
        first = transport.range(Range(prefix, prefix_end(prefix)))
        if first.kvs:
            raise ValueError(f"the witness comes too late: {first.kvs[0].key} is there already")
        self.told = first.header.revision
        """Every change up to this revision has been told."""

    def __enter__(self) -> Witness:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._ended.set()
        if self._stream is not None:
            self._stream.close()
        self._transport.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(10)

    def so_far(self) -> Account:
        """What it was told up to now."""
        with self._news:
            return replay(self._changes, gaps=self._gaps)

    def testify(self, *, timeout: float = 60.0) -> Account:
        """Everything up to now, compared with what etcd says is there. A difference is a gap."""
        revision = self._put_own_key(timeout)
        with self._news:
            told = self._news.wait_for(lambda: self.told >= revision or self._gaps, timeout)
        testimony = self.so_far()
        if not told:
            testimony = replace(testimony, gaps=(*testimony.gaps, f"revision {revision} was never told"))
        if testimony.gaps:
            return testimony
        reply = self._transport.range(
            Range(self._prefix, prefix_end(self._prefix), revision=revision, keys_only=True), timeout=timeout
        )
        there = {(kv.key, kv.create_revision) for kv in reply.kvs}
        replayed = {(each.key, each.created) for each in testimony.lifetimes if each.created <= revision < each.deleted}
        differences = [f"{key} of {created} is in one of replay and etcd" for key, created in there ^ replayed]
        return replace(testimony, gaps=tuple(differences))

    def wait_for(self, key: str, *, gone: bool = False, timeout: float = 60.0) -> Lifetime:
        """Wait until a key that begins with `key` has come, or has come and `gone`; `TimeoutError`."""

        def found() -> Lifetime | None:
            lifetimes = replay(self._changes).lifetimes
            return next(
                (e for e in lifetimes if e.key.startswith(key) and (e.deleted < float("inf") or not gone)), None
            )

        with self._news:
            lifetime = self._news.wait_for(found, timeout)
        if lifetime is None:
            raise TimeoutError(f"{key} has not {'gone' if gone else 'come'} within {timeout} s")
        return lifetime

    # -- the stream

    def _listen(self) -> None:
        while not self._ended.is_set():
            watch = Watch(self._prefix, prefix_end(self._prefix), start_revision=self.told + 1)
            self._stream = stream = self._transport.watch(watch)
            try:
                for reply in stream:
                    self._tell(reply.events)
            except Compacted:
                with self._news:
                    self._gaps.append(f"what came after revision {self.told} was compacted before it was told")
                    self._news.notify_all()
                return
            except EtcdLockError as error:
                logger.info("the witness's watch broke after revision %d: %s", self.told, error)
            finally:
                stream.close()
            self._ended.wait(0.05)

    def _tell(self, events: Iterable[Event]) -> None:
        at = now()
        with self._news:
            told = self.told
            for event in events:
                kv = event.kv
                if kv.mod_revision > told:  # a new stream begins after what the last one told
                    self._changes.append(Change(event.kind, kv.key, kv.mod_revision, kv.create_revision, kv.lease, at))
                    self.told = max(self.told, kv.mod_revision)
            self._news.notify_all()

    def _beat(self) -> None:
        overdue = float("inf")
        expected = 0
        while not self._ended.wait(_BEAT):
            try:
                revision = self._put_own_key(2.0)
            except EtcdLockError as error:
                logger.info("the witness's own key was not put: %s", error)
                continue
            if self.told >= expected:
                expected, overdue = revision, now() + _SILENT
            elif now() > overdue and (stream := self._stream) is not None:
                logger.info("the witness's watch is silent after revision %d", self.told)
                overdue = now() + _SILENT
                stream.close()

    def _put_own_key(self, timeout: float) -> int:
        return self._transport.txn(Txn([], [Put(self._own_key, b"")]), timeout=timeout).header.revision
