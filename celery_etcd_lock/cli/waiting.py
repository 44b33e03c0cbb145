"""Who is in line for a lock, for somebody who watches it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from celery_etcd_lock.cli.progress import Progress
from celery_etcd_lock.etcd.api import KeyValue, Range, Transport, prefix_end
from celery_etcd_lock.exceptions import EtcdLockError
from celery_etcd_lock.locks.queue import describe, kind_of

__all__ = ["in_line", "shown_while_waiting", "standing_of"]

_LOOK_EVERY = 1.0
"""Seconds."""


def in_line(transport: Transport, name: str) -> tuple[KeyValue, ...]:
    """The contenders for the lock `name`, first come first."""
    return transport.range(Range(name + "/", prefix_end(name + "/"), sort="create")).kvs


def standing_of(name: str, queue: Sequence[KeyValue], lease: int) -> str:
    """How far the contender of `lease` in `queue` has come, in words. Empty: nobody is before it."""
    mine = next((kv.create_revision for kv in queue if kv.lease == lease), 0)
    ahead = [kv for kv in queue if kv.create_revision < mine]
    if not ahead:
        return ""
    first = describe(ahead[0])
    since = f" since {first.since}" if first.since else ""
    place = len({kv.create_revision for kv in ahead})
    beside = kind_of(name, ahead[0].key) != "write" and place > 1
    held = f"held by {first.holder}{since}" + (", and perhaps others beside it" if beside else "")
    return ("next in line" if place == 1 else f"number {place} in line") + f": {held}"


@contextmanager
def shown_while_waiting(progress: Progress, transport: Transport, title: str, name: str, lease: int) -> Iterator[None]:
    """Show how far `lease` has come in the line for `name`, from another thread, for as long as the block lasts."""
    over = threading.Event()

    def show() -> None:
        while not over.wait(_LOOK_EVERY if shown else 0.1):
            try:
                standing = standing_of(name, in_line(transport, name), lease)
            except EtcdLockError as error:
                standing = f"etcd does not say how it stands: {error}"
            if standing and not over.is_set():
                progress.show(f"waiting for {title}, {standing}")
                shown.append(standing)

    shown: list[str] = []
    thread = threading.Thread(target=show, name="etcd-lock-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(1.0)
