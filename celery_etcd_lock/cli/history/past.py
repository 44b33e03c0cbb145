"""Reading what etcd still keeps of the past: how far back that goes, and what changed since. Reads only.

A watch from an old revision replays what happened, a thousand revisions at a time. Two things about it are etcd's:

* for each of those thousands it walks *all* revisions from there to now, of all keys, and keeps writers waiting
  meanwhile (``syncWatchers``; its issue 13156 is of somebody whose leases ran out so). So one looks back over a
  bounded number of revisions;
* it does not say when there is no more to come. A reply with fewer than a thousand revisions is the last, but if
  nothing was to be told there is none at all. So after a pause what was replayed is compared with what is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from celery_etcd_lock.etcd.api import Event, KeyValue, Range, Transport, Watch, WatchStream, prefix_end
from celery_etcd_lock.exceptions import Compacted, EtcdUnavailable

__all__ = ["Listener", "Reach", "keys_at", "oldest_revision", "replay"]

_PAGE = 500
_PAUSE = 1.0
"""Seconds without a word, after which it is looked whether there is more to come."""

_BATCH = 1000
"""etcd's watchBatchMaxRevs: revisions in a reply that others follow."""

_TRIES = 4
"""How often reading is begun anew when etcd is compacted meanwhile."""


class Listener(Protocol):
    """Who is told what was there at first, and what changed then; each time it is begun anew, from the start."""

    def begin(self, revision: int, kvs: list[KeyValue]) -> None: ...

    def see(self, event: Event) -> None: ...

    def complete(self, there: dict[str, int]) -> bool:
        """Whether all is told, if `there` are the keys that are there at the end, with their mod revisions."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far the history goes that was read."""

    start: int
    head: int
    """The newest revision when the reading began, and the last of which is told."""
    compacted: bool
    """It begins where it does because what was before is compacted; else because more was not asked for."""
    complete: bool = True
    """Nothing is missing between `start` and `head`, as far as can be told."""


def oldest_revision(transport: Transport, key: str, head: int, *, start: int = 1, timeout: float) -> int:
    """The oldest revision, from `start` on, at which etcd can still be read: 1 if it was never compacted.

    Found by halves, with some 25 reads of one `key`, there or not. What reads raise, `EtcdUnavailable` among that.
    """
    deadline = time.monotonic() + timeout

    def readable(revision: int) -> bool:
        left = deadline - time.monotonic()
        if left <= 0:
            raise EtcdUnavailable(f"etcd did not say within {timeout:g} s how far its history goes")
        try:
            transport.range(Range(key, limit=1, keys_only=True, revision=revision), timeout=left)
        except Compacted:
            return False
        return True

    low, high = max(1, start), head
    if readable(low):
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if readable(middle) else (middle, high)
    return high


def keys_at(
    transport: Transport, prefix: str, revision: int, *, keys_only: bool = False, most: int = 0, timeout: float
) -> Iterator[KeyValue]:
    """The keys below `prefix` as they were at `revision`: `most` of them, or all. `timeout`: of each page."""
    key, end, told = prefix, prefix_end(prefix), 0
    while True:
        page = Range(key, end, limit=_PAGE, revision=revision, keys_only=keys_only)
        reply = transport.range(page, timeout=timeout)
        yield from reply.kvs
        told += len(reply.kvs)
        if not reply.more or not reply.kvs or 0 < most <= told:
            return
        key = reply.kvs[-1].key + "\0"


def replay(
    transport: Transport,
    listener: Listener,
    *,
    prefix: str,
    beside: tuple[str, ...] = (),
    watched: str,
    look_back: int,
    timeout: float,
) -> Reach:
    """Tell `listener` of the keys below `prefix` and `beside` as they were `look_back` revisions ago, and of each
    change below `watched` since then. Reading never stops for longer than about `timeout` seconds.

    What reads and watches raise: `EtcdUnavailable`, `EtcdRejected`; `Compacted` if it always is while one reads.
    """
    head = transport.range(Range(prefix, prefix_end(prefix), limit=1, keys_only=True), timeout=timeout).header.revision
    asked = start = max(1, head - look_back)
    for attempt in range(_TRIES):
        try:
            start = oldest_revision(transport, prefix, head, start=start, timeout=timeout)
            kvs = [
                kv
                for each in (prefix, *beside)
                for kv in keys_at(transport, each, start, most=0 if each == prefix else _PAGE, timeout=timeout)
            ]
            listener.begin(start, kvs)
            complete = start == head or _follow(transport, listener, prefix, watched, start + 1, head, timeout)
        except Compacted:
            if attempt == _TRIES - 1:
                raise
            continue
        return Reach(start, head, compacted=start > asked, complete=complete)
    raise AssertionError


def _follow(
    transport: Transport, listener: Listener, prefix: str, watched: str, start: int, head: int, timeout: float
) -> bool:
    """Tell `listener` what happened from `start` to `head`. Whether that was all."""
    stream = transport.watch(Watch(watched, prefix_end(watched), start))

    def all_told() -> bool:
        there = keys_at(transport, prefix, head, keys_only=True, timeout=timeout)
        return listener.complete({kv.key: kv.mod_revision for kv in there})

    with _Impatience(stream, _PAUSE) as impatience:
        while True:
            next_start = start
            for reply in stream:
                impatience.heard()
                for event in reply.events:
                    if event.kv.mod_revision > head:
                        return True
                    listener.see(event)
                    next_start = event.kv.mod_revision + 1
                several = {event.kv.mod_revision for event in reply.events}
                if head in several or (several and len(several) < _BATCH and reply.header.revision >= head):
                    return True
            # Nothing came for a while, and the stream was closed for that.
            if all_told():
                return True
            if impatience.pause >= timeout:
                return False
            stream = transport.watch(Watch(watched, prefix_end(watched), next_start))
            start = next_start
            impatience.again(stream, timeout)


class _Impatience:
    """Closes a stream that was silent for `pause` seconds."""

    def __init__(self, stream: WatchStream, pause: float) -> None:
        self.pause = pause
        self._stream = stream
        self._changed = threading.Condition()
        self._due = time.monotonic() + pause
        self._over = False

    def __enter__(self) -> _Impatience:
        threading.Thread(target=self._run, name="etcd-lock-impatience", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()
        self._stream.close()

    def heard(self) -> None:
        with self._changed:
            self._due = time.monotonic() + self.pause

    def again(self, stream: WatchStream, pause: float) -> None:
        with self._changed:
            self._stream, self.pause = stream, pause
            self._due = time.monotonic() + pause
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._over:
                left = self._due - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                self._stream.close()
                self._due = float("inf")
                self._changed.wait()
