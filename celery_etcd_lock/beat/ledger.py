"""The records of all entries in etcd, as the beat that leads keeps them.

Only a leader writes them, and each write is one transaction with its leadership. So what it has read at the beginning
of its term, and written since, is what is there, and an idle tick asks nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from celery_etcd_lock.beat.record import Record, entry_key, entry_name
from celery_etcd_lock.etcd.api import Compare, Delete, KeyValue, Put, Range, Txn, TxnReply, created_at, prefix_end
from celery_etcd_lock.locks.election import Leadership

__all__ = ["Ledger"]

_PAGE = 500
_OPERATIONS = 100
"""In one transaction; etcd takes 128 unless it is told otherwise."""


class _Kept(NamedTuple):
    record: Record
    revision: int
    """The mod revision of what is in etcd; 0: nothing is."""


class Ledger:
    """What has become of each entry. Belongs to one term of one leader, and to one thread."""

    def __init__(self, leadership: Leadership, prefix: str, timeout: float) -> None:
        self._leadership = leadership
        self._prefix = prefix
        self._timeout = timeout
        self._kept: dict[str, _Kept] = {}
        self._unconfirmed: set[str] = set()

    @property
    def leads(self) -> bool:
        """Whether this is surely the leader still. Asks the clock, not etcd."""
        return self._leadership.is_held()

    def assert_leads(self) -> None:
        """`LockLost` unless it is."""
        self._leadership.assert_held()

    def load(self) -> None:
        """Read all records. `EtcdUnavailable`, `LockLost`."""
        start, end = self._prefix, prefix_end(self._prefix)
        while True:
            reply = self._send(Txn([], [Range(start, end, limit=_PAGE)])).range(0)
            for kv in reply.kvs:
                self._keep(kv)
            if not reply.more:
                return
            start = reply.kvs[-1].key + "\0"

    def names(self) -> set[str]:
        """The entries of which there is a record."""
        return {name for name, kept in self._kept.items() if kept.revision}

    def of(self, entry: str) -> Record | None:
        """The record of `entry`; None: there is none."""
        kept = self._kept.get(entry)
        return kept.record if kept is not None and kept.revision else None

    def latest(self, default: datetime) -> datetime:
        """The latest last run of all that there is."""
        return max((kept.record.last_run_at or default for kept in self._kept.values()), default=default)

    def doubt(self, now: datetime, most: timedelta) -> None:
        """Take last runs that are more than `most` ahead for `now`, instead of waiting for a clock that was wrong."""
        for entry, kept in self._kept.items():
            last = kept.record.last_run_at
            if last is not None and last - now > most:
                record = kept.record if kept.record.state == "sending" else Record(None, kept.record.total_run_count)
                self._kept[entry] = kept._replace(record=record._replace(last_run_at=now))

    def see(self, entries: Mapping[str, Record]) -> None:
        """Write down entries of which there is no record, as they are now: whoever leads next goes on from there."""
        while new := [name for name in entries if self.of(name) is None][:_OPERATIONS]:
            keys = [entry_key(self._prefix, name) for name in new]
            puts = [Put(key, entries[name].to_json()) for key, name in zip(keys, new, strict=True)]
            reply = self._send(Txn([created_at(key, 0) for key in keys], puts, [Range(key) for key in keys]))
            for number, name in enumerate(new):
                if reply.succeeded:
                    self._kept[name] = _Kept(entries[name], reply.header.revision)
                else:
                    self._found(name, reply.range(number).kvs)

    def claim(self, entry: str, record: Record) -> bool:
        """The fence: `record`, which says ``sending``, in place of the one that is known. False: that was not there.

        `LockLost` if this does not lead any more, `EtcdUnavailable` if etcd does not answer. Then it may be there even
        so; whoever claims it next finds it.
        """
        known = self._kept.get(entry, _Kept(Record(), 0))
        found = self._put(entry, known.revision, record)
        # What it finds already there was put by a try of its own that got no answer, or by a leader that has died.
        return found is None or found == record

    def confirm(self, entry: str, record: Record) -> None:
        """The tick was published, and this is what there is to say of it now. Tried again by `settle` if it fails."""
        known = self._kept[entry]
        self._kept[entry] = known._replace(record=record)
        self._unconfirmed.add(entry)
        self._settle(entry)

    def settle(self) -> None:
        """Write down what could not be written down before. `LockLost`, `EtcdUnavailable`."""
        for entry in list(self._unconfirmed):
            self._settle(entry)

    @property
    def unsettled(self) -> bool:
        """Whether there is something that `settle` has still to do."""
        return bool(self._unconfirmed)

    def _settle(self, entry: str) -> None:
        known = self._kept[entry]
        self._put(entry, known.revision, known.record)

    def forget(self, entries: Iterable[str]) -> None:
        """Delete the records of entries that there are no more. `LockLost`, `EtcdUnavailable`."""
        names = list(entries)
        for first in range(0, len(names), _OPERATIONS):
            some = names[first : first + _OPERATIONS]
            self._send(Txn([], [Delete(entry_key(self._prefix, name)) for name in some]))
            for name in some:
                self._kept.pop(name, None)
                self._unconfirmed.discard(name)

    def ask(self) -> None:
        """One request, to see whether etcd answers, and this still leads. `LockLost`, `EtcdUnavailable`."""
        self._send(Txn([], []))

    # -- requests

    def _put(self, entry: str, revision: int, record: Record) -> Record | None:
        """Put `record` where `revision` is. None: done; else what is there instead, of which is taken note."""
        key = entry_key(self._prefix, entry)
        there = Compare(key, "mod", "==", revision)
        reply = self._send(Txn([there], [Put(key, record.to_json())], [Range(key)]))
        self._unconfirmed.discard(entry)
        if reply.succeeded:
            self._kept[entry] = _Kept(record, reply.header.revision)
            return None
        return self._found(entry, reply.range(0).kvs)

    def _found(self, entry: str, kvs: tuple[KeyValue, ...]) -> Record:
        if kvs:
            self._keep(kvs[0])
        else:
            self._kept[entry] = _Kept(Record(), 0)
        return self._kept[entry].record

    def _keep(self, kv: KeyValue) -> None:
        self._kept[entry_name(self._prefix, kv.key)] = _Kept(Record.parse(kv.value), kv.mod_revision)

    def _send(self, txn: Txn) -> TxnReply:
        left = self._leadership.remaining()
        return self._leadership.txn(txn, timeout=min(self._timeout, max(0.1, left)))
