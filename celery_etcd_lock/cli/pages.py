"""Reading many keys, a page at a time, all as they were at one moment."""

from __future__ import annotations

from collections.abc import Iterator

from celery_etcd_lock.etcd.api import KeyValue, Range, Transport, prefix_end

__all__ = ["PAGE", "keys_below"]

PAGE = 500
"""Keys in one reply: some 150 kB."""


def keys_below(transport: Transport, prefix: str, *, keys_only: bool = False, page: int = PAGE) -> Iterator[KeyValue]:
    """The keys that begin with `prefix`, in their order, as of the moment at which the first page was read.

    `Compacted` if etcd forgets that moment before the last page; each page is one request.
    """
    start, end, revision = prefix, prefix_end(prefix), 0
    while True:
        reply = transport.range(Range(start, end, limit=page, revision=revision, keys_only=keys_only))
        yield from reply.kvs
        if not reply.more:
            return
        # Of the first page: keys that come or go meanwhile must not make a lock look as it never was.
        revision = revision or reply.header.revision
        start = reply.kvs[-1].key + "\0"
