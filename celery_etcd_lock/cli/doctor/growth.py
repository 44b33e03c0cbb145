"""How etcd's history grows, whether anything compacts it, and how long there is room. And whose clocks differ."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from celery_etcd_lock.cli.doctor.findings import Finding
from celery_etcd_lock.cli.doctor.members import MAKE_ROOM
from celery_etcd_lock.cli.history.instants import Dated, dated
from celery_etcd_lock.cli.history.past import keys_at, oldest_revision
from celery_etcd_lock.etcd.api import Range, Status, Transport, Watch, prefix_end
from celery_etcd_lock.exceptions import Compacted, EtcdLockError, PermissionDenied
from celery_etcd_lock.settings import Settings

__all__ = ["Sample", "about_clocks", "about_history", "about_quota", "about_watches", "sample"]

DEFAULT_QUOTA = 2 * 1024**3
"""etcd's own, where --quota-backend-bytes is not given."""

_COMPACT = "start etcd with --auto-compaction-mode=periodic --auto-compaction-retention=5m"
_FEW = 10_000
"""Revisions: so few say nothing about whether compaction is on."""

_RECENT = 2 * 86400.0
"""Seconds: compacted less long ago, it will be again."""

_CLOCKS = 5.0
"""Seconds by which clocks may differ before it is told: as beats do."""

_KEYS = 500
"""Of each kind, as many as are looked at for their times."""


@dataclass(frozen=True)
class Sample:
    """What was seen in some seconds."""

    head: int
    oldest: int
    """The oldest revision that can be read."""
    moved: bool
    """That changed meanwhile: somebody compacted."""
    rate: float
    """Revisions per second."""
    seconds: float
    begins: Dated | None
    """The newest time that was known at `oldest`, which is not earlier than that."""
    offsets: dict[str, float] = field(default_factory=dict)
    """By how many seconds the clock of a host was ahead of ours, as seen by what it put meanwhile."""
    ahead: dict[str, float] = field(default_factory=dict)
    """The same by what was there already: at least."""
    unwatched: str = ""
    """Why nothing could be watched; empty: it could."""


def sample(transport: Transport, settings: Settings, key: str, seconds: float, timeout: float) -> Sample:
    """Look for `seconds`. `EtcdLockError`, of etcd's, if that does not work out."""
    head = transport.range(Range(key, limit=1), timeout=timeout).header.revision
    oldest = oldest_revision(transport, key, head, timeout=timeout)
    began = time.monotonic()
    counted_from = transport.range(Range(key, limit=1), timeout=timeout).header.revision
    offsets, unwatched = _put_meanwhile(transport, settings, seconds)
    took = time.monotonic() - began
    newest = transport.range(Range(key, limit=1), timeout=timeout).header.revision
    still = oldest_revision(transport, key, newest, start=oldest, timeout=timeout)
    return Sample(
        newest,
        still,
        still > oldest,
        (newest - counted_from) / max(took, 0.001),
        took,
        _newest_date(transport, settings, still, timeout) if still > 1 else None,
        offsets,
        _of_the_future(transport, settings, newest, timeout),
        unwatched,
    )


def _put_meanwhile(transport: Transport, settings: Settings, seconds: float) -> tuple[dict[str, float], str]:
    """For so long watch who comes for a lock, and compare their times with ours. And why that did not go, if so."""
    offsets: dict[str, float] = {}
    unwatched = f"etcd confirmed no watch within {seconds:g} s"
    prefix = f"/{settings.namespace}/locks/"
    stream = transport.watch(Watch(prefix, prefix_end(prefix)))
    until = time.monotonic() + seconds
    timer = threading.Timer(seconds, stream.close)
    timer.daemon = True
    timer.start()
    try:
        for reply in stream:
            now, unwatched = time.time(), ""
            for event in reply.events:
                said = dated(event.kv) if event.kind == "put" and event.kv.version == 1 else None
                if said and said.host:
                    offset = said.time - now
                    offsets[said.host] = min(offset, offsets.get(said.host, offset), key=abs)
    except EtcdLockError as error:  # what needs no watch is told all the same
        unwatched = str(error)
    timer.cancel()
    stream.close()
    time.sleep(max(0.0, until - time.monotonic()))
    return offsets, unwatched


def _dates(transport: Transport, settings: Settings, revision: int, timeout: float) -> Iterator[Dated]:
    for kind in ("locks", "sessions", "beat"):
        with suppress(PermissionDenied):  # that is told elsewhere
            for kv in keys_at(transport, f"/{settings.namespace}/{kind}/", revision, most=_KEYS, timeout=timeout):
                if said := dated(kv):
                    yield said


def _newest_date(transport: Transport, settings: Settings, revision: int, timeout: float) -> Dated | None:
    try:
        return max(_dates(transport, settings, revision, timeout), key=lambda each: each.time, default=None)
    except Compacted:
        return None


def _of_the_future(transport: Transport, settings: Settings, revision: int, timeout: float) -> dict[str, float]:
    ahead: dict[str, float] = {}
    for said in _dates(transport, settings, 0, timeout):
        if said.host and said.revision <= revision and said.time > time.time():
            ahead[said.host] = max(said.time - time.time(), ahead.get(said.host, 0.0))
    return ahead


def about_watches(seen: Sample) -> Iterator[Finding]:
    """Who waits for a lock is woken by a watch; without one a waiter looks again once per TTL only."""
    if seen.unwatched:
        do = (
            "if a proxy stands before etcd, have it pass on streams unbuffered; locks work, but who waits is woken late"
        )
        yield Finding("warning", "watches", seen.unwatched, do)
    else:
        yield Finding("ok", "watches", "etcd confirms them")


def about_clocks(seen: Sample) -> Iterator[Finding]:
    """etcd tells no time; whoever puts a key does."""
    off = {host: offset for host, offset in {**seen.ahead, **seen.offsets}.items() if abs(offset) > _CLOCKS}
    for host, offset in off.items():
        how = f"about {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'}"
        what = f"{host}'s clock is {how} this host's"
        do = "set one of the two right: locks do not need it, beats and countdowns do"
        yield Finding("warning", "clocks", what, do)
    if not off and seen.offsets:
        hosts = ", ".join(sorted(seen.offsets))
        yield Finding("ok", "clocks", f"what {hosts} put meanwhile has times within {_CLOCKS:g} s of this host's")
    elif not off:
        what = f"nobody put anything in {seen.seconds:.0f} s, and etcd itself tells no time: nothing to compare with"
        yield Finding("note", "clocks", what)


def about_history(seen: Sample, statuses: Sequence[Status], quota: int | None) -> Iterator[Finding]:
    """Is anything compacting it; and if not, how long that can go on."""
    kept = seen.head - seen.oldest
    pace = f"{seen.rate:.1f} revisions/s over {seen.seconds:.0f} s"
    room = _room(seen, statuses, quota)
    if seen.oldest == 1:
        what = f"it was never compacted: etcd keeps all {seen.head} revisions ({pace}{room})"
        yield Finding("note" if seen.head < _FEW else "warning", "history", what, _COMPACT)
        return
    what = f"etcd keeps {kept} revisions, from {seen.oldest} on ({pace})"
    age = None if seen.begins is None else max(0.0, time.time() - seen.begins.time)
    if seen.moved:
        yield Finding("ok", "history", f"{what}; it was compacted just now")
    elif age is not None and age < _RECENT:
        yield Finding("ok", "history", f"{what}, which is {_spoken(age)} at most; something compacts it")
    elif seen.rate and kept / seen.rate < _RECENT:
        yield Finding(
            "ok", "history", f"{what}, which at this pace is {_spoken(kept / seen.rate)}; something compacts it"
        )
    elif kept < _FEW:
        yield Finding("ok", "history", f"{what}; it was compacted, when cannot be told")
    else:
        yield Finding("warning", "history", f"{what}{room}; it was compacted, but not lately", _COMPACT)


def _room(seen: Sample, statuses: Sequence[Status], quota: int | None) -> str:
    """In words, when the quota is reached if nothing compacts."""
    if not seen.rate or not statuses:
        return ""
    fullest = max(statuses, key=lambda status: status.db_size)
    left = (fullest.db_size_quota or quota or DEFAULT_QUOTA) - fullest.db_size
    each = fullest.db_size_in_use / max(1, seen.head - seen.oldest)
    return f"; at this pace its quota is reached in about {_spoken(max(0.0, left / each / seen.rate))}"


def _spoken(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def about_quota(statuses: Sequence[Status], quota: int | None) -> Iterator[Finding]:
    """How full each member is. `quota`: what somebody says it is, where etcd does not."""
    for status in statuses:
        limit = status.db_size_quota or quota or DEFAULT_QUOTA
        assumed = "" if status.db_size_quota or quota else ", taking its quota for etcd's own of 2 GiB: say --quota"
        share = status.db_size / limit
        what = (
            f"{_size(status.db_size)} of {_size(limit)} ({share:.0%}), {_size(status.db_size_in_use)} in use{assumed}"
        )
        about = f"room {status.endpoint}"
        if share < 0.8:
            yield Finding("ok", about, what)
        elif status.db_size_in_use < 0.5 * status.db_size:
            do = "`etcdctl defrag --cluster` gives back what is not in use"
            yield Finding("wrong" if share >= 0.95 else "warning", about, what, do)
        else:
            do = f"make room: {MAKE_ROOM}; have it compacted: {_COMPACT}; or raise --quota-backend-bytes"
            yield Finding("wrong" if share >= 0.95 else "warning", about, what, do)


def _size(number: int) -> str:
    for size, unit in ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
