"""The scheduler that is wrapped, with a fence before each publish: a subclass of it, made on the spot.

Celery's own tick takes the entry that is due, moves its ``last_run_at`` on, and publishes the entry as it was; RedBeat
publishes first. Both by `apply_async`, so the fence is there. What may not be sent, or could not be, is put back: the
entry says again when it ran last, and comes up again, before anything is written to the scheduler's own store.
"""

from __future__ import annotations

import heapq
import logging
import shelve
import time
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from celery.beat import PersistentScheduler, Scheduler, event_t
from celery.utils.time import maybe_make_aware
from kombu import Connection

from celery_etcd_lock import signals
from celery_etcd_lock.beat.broker import Broker
from celery_etcd_lock.beat.entries import Entry, bring, copy_with, has_own_store, in_utc, last_run, put_off, runs
from celery_etcd_lock.beat.failures import is_broker, is_permanent
from celery_etcd_lock.beat.ledger import Ledger
from celery_etcd_lock.beat.outage import Outage
from celery_etcd_lock.beat.record import Record
from celery_etcd_lock.beat.schedule_file import InMemory
from celery_etcd_lock.beat.slots import Slot, due_time, options_for, slot_of
from celery_etcd_lock.exceptions import EtcdLockError, LockLost
from celery_etcd_lock.tasks.interrupts import deferred
from celery_etcd_lock.tasks.task import SingletonTask

__all__ = ["Fenced", "fenced"]

celerys_logger = logging.getLogger("celery.beat")

_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0
"""Seconds between two tries to publish an entry while the broker fails."""

_PRIORITY: Final = 5
"""Celery's, in the heap."""

_KEPT: Final = timedelta(days=1)
"""For how long the record of an entry is of use whose scheduler has a store of its own, which may lag behind."""


def fenced(scheduler: type[Scheduler], *, adopt: bool = False) -> type[Fenced]:
    """`scheduler` with the fence, under its own name; call `Fenced.begin` before the first tick.

    `adopt`: nothing is known of the schedule in etcd, so what a schedule file says counts.
    """
    extra: dict[str, Any] = {"own_store": has_own_store(scheduler), "__module__": scheduler.__module__}
    if issubclass(scheduler, PersistentScheduler) and getattr(scheduler, "persistence", None) is shelve:
        extra |= {"persistence": InMemory(adopt=adopt), "info": ""}
    return type(scheduler.__name__, (Fenced, scheduler), extra)


class Fenced(Scheduler):
    """One term of leadership. Abstract: see `fenced`."""

    own_store = False
    _ledger: Ledger | None = None
    _publishing = False
    _taken: Entry | None = None
    """What has moved on in its place in the schedule, and has not come to the fence."""

    def begin(
        self, ledger: Ledger, outage: Outage, broker: Broker, *, beat: str, scope: str, done_ttl: float
    ) -> None:  # fmt: skip
        """Send what is due, as far as `ledger` lets it through, for the `beat` of this name.

        `done_ttl`: for how many seconds a task's id is remembered where it has run.
        """
        self._id_ttl = timedelta(seconds=done_ttl)
        self._ledger = ledger
        self._outage = outage
        self._broker = broker
        self._beat = beat
        self._scope = scope
        self._reserved: Entry | None = None
        self._failed: dict[str, tuple[int, float]] = {}
        """Of entries that could not be published: how often in a row, and when to try again (monotonic)."""
        self._put_back: list[tuple[Entry, float]] = []
        self.lock_key = None  # RedBeat's own lock, in whose place all this is
        self._tidied = time.monotonic()
        self._tidy()

    def retire(self) -> None:
        """The term is over. Nothing goes into the scheduler's own store any more: see `sync`."""
        with suppress(Exception):
            self.close()

    # -- what Celery calls

    def populate_heap(self, *args: Any, **kwargs: Any) -> None:
        try:
            self._bring_up_to_date()
        except BaseException:
            self._heap = None  # or Celery would go on with the heap of the schedule before
            raise
        super().populate_heap(*args, **kwargs)

    def tick(self, *args: Any, **kwargs: Any) -> float:
        if time.monotonic() - self._tidied > _KEPT.total_seconds():
            self._tidied = time.monotonic()
            self._tidy()
        self._put_back.clear()
        interval: float = super().tick(*args, **kwargs)
        for entry, pause in self._put_back:
            self._push(entry, pause)
            interval = min(interval, pause)
        return interval

    def _ensure_connected(self) -> Connection:
        """As Celery's, which may take three quarters of an hour; `LockLost` as soon as this does not lead any more."""
        assert self._ledger is not None
        retries, leads = self.app.conf.broker_connection_max_retries, self._ledger.assert_leads
        with self._broker.trying(self._is_out_of_reach):
            return self.connection.ensure_connection(_say_not_connected, retries, callback=leads)

    def reserve(self, entry: Entry) -> Entry:
        self._taken = entry
        self._reserved = super().reserve(entry)
        return self._reserved

    def should_sync(self) -> bool:
        return not self._publishing and bool(super().should_sync())

    def sync(self) -> None:
        if self._ledger is None or self._ledger.leads:  # or another beat writes there now
            if self._taken is not None:  # no broker, or the end, before the fence: it was not sent
                bring(self._taken, last_run(self._taken), runs(self._taken))
            super().sync()

    def apply_async(self, entry: Entry, producer: Any = None, advance: bool = True, **kwargs: Any) -> Any:
        reserved, self._reserved = self._reserved, None
        # A signal that ends this beat does so before the fence, or when the tick is written down.
        with deferred():
            self._taken = None
            result = self._pass(entry, None if advance else reserved, producer, kwargs)
        if self.should_sync():
            self._do_sync()  # type: ignore[attr-defined]
        return result

    # -- the tick. `reserved` is what takes the entry's place when it is sent; None: it has still to be made.

    def _pass(self, entry: Entry, reserved: Entry | None, producer: Any, options: Any) -> Any:
        """Through the fence, and out. Raises what publishing does."""
        assert self._ledger is not None
        if not self._comes_up(entry, reserved):
            return None
        known = self._ledger.of(entry.name) or Record()
        slot, again = self._slot(entry, known)
        sending = Record(last_run(entry), runs(entry)).sending(slot)
        try:
            free = self._ledger.claim(entry.name, sending)
        except LockLost as lost:
            return self._fence(entry, reserved, str(lost))
        except EtcdLockError as error:
            self._outage.fails(error)
            return self._put(entry, reserved, _PAUSE)
        self._outage.over()
        if not free:
            return self._fence(entry, reserved, "etcd knows more of it than this beat did")
        if not self._ledger.leads:  # the answer was long under way
            return self._fence(entry, reserved, "this beat may not lead any more")
        try:
            result = self._publish(entry, slot, producer, options, again=again)
        except Exception as error:
            if is_permanent(error):
                self._write_down(entry, reserved, sending._replace(state="failed"))
            else:
                self._put(entry, reserved, self._next_pause(entry))
            raise
        self._write_down(entry, reserved, sending._replace(state="sent"))
        self._say_sent(entry, slot, again=again)
        return result

    def _comes_up(self, entry: Entry, reserved: Entry | None) -> bool:
        """Whether `entry` is due by what etcd knows, too, and not to be left alone for a while."""
        assert self._ledger is not None
        record = self._ledger.of(entry.name)
        if record is not None and self._is_behind(entry, record):
            bring(entry, record.last_run_at, record.total_run_count)
            due, again_in = self.is_due(entry) if reserved is None else (False, 0.0)
            if not due:
                if reserved is None:
                    put_off(entry)
                self._fence(entry, reserved, f"it was sent already, at {record.last_run_at}", again_in)
                return False
        _, until = self._failed.get(entry.name, (0, 0.0))
        if (pause := until - time.monotonic()) > 0:
            self._put(entry, reserved, pause)
            return False
        return True

    def _is_behind(self, entry: Entry, record: Record) -> bool:
        """Whether it is etcd that counts: see `entries`."""
        last = last_run(entry)
        if record.last_run_at is None or (self.own_store and last is not None and last > record.last_run_at):
            return False
        return (last, runs(entry)) != (record.last_run_at, record.total_run_count)

    def _slot(self, entry: Entry, known: Record) -> tuple[Slot, bool]:
        """For the tick that is due now; and whether it may have been sent before, under the same id.

        Later than the one before, whatever clocks and schedules say.
        """
        now = maybe_make_aware(getattr(entry.schedule, "now", entry.default_now)())
        last, before = last_run(entry), known.slot
        due = now if last is None else due_time(entry.schedule, last.astimezone(now.tzinfo), now)
        # An id that nobody remembers does not tell a repeat any more, but could take a later tick for one.
        if before is not None and known.state == "sending" and (due <= before.due or now - before.due < self._id_ttl):
            return before, True
        if before is not None and due <= before.due:
            due = max(now, before.due + timedelta(microseconds=1))
        return slot_of(self._scope, entry.name, due), False

    def _publish(self, entry: Entry, slot: Slot, producer: Any, kwargs: dict[str, Any], *, again: bool) -> Any:
        task = self.app.tasks.get(entry.task)
        singleton = task is None or isinstance(task, SingletonTask)
        options = options_for(entry.options, slot, beat=self._beat, entry=entry.name, singleton=singleton, again=again)
        self._publishing = True  # no sync now: the entry has moved on already, and may have to go back
        try:
            with self._broker.trying(self._is_out_of_reach):
                result = super().apply_async(copy_with(entry, options), producer=producer, advance=False, **kwargs)
        finally:
            self._publishing = False
        if getattr(result, "id", None) == options["task_id"]:  # else it is queued already, and was not published
            self._broker.reached()
        return result

    def _is_out_of_reach(self, error: BaseException) -> bool:
        return is_broker(error, self.connection)

    def _write_down(self, entry: Entry, reserved: Entry | None, record: Record) -> None:
        """That the slot is over, in etcd and in the scheduler."""
        assert self._ledger is not None
        last, count = in_utc(entry.default_now()), runs(entry) + 1
        if reserved is not None:
            last, count = last_run(reserved) or last, runs(reserved)
        try:
            self._ledger.confirm(entry.name, record._replace(last_run_at=last, total_run_count=count))
        except LockLost:
            pass  # whoever leads finds it sending, and sends it again under this id
        except EtcdLockError as error:
            self._outage.fails(error)
        if reserved is None:
            self.reserve(entry)
            self._reserved = self._taken = None
        self._failed.pop(entry.name, None)

    def _fence(self, entry: Entry, reserved: Entry | None, reason: str, pause: float = 0.0) -> None:
        record = signals.TickFencedRecord(self._beat, entry.name, entry.task, reason)
        signals.tick_fenced.send(self.app, record=record)
        self._put(entry, reserved, pause)

    def _say_sent(self, entry: Entry, slot: Slot, *, again: bool) -> None:
        late = (datetime.now(timezone.utc) - slot.due).total_seconds()
        record = signals.TickSentRecord(self._beat, entry.name, entry.task, slot.task_id, slot.due, late, again)
        signals.tick_sent.send(self.app, record=record)

    # -- putting back

    def _put(self, entry: Entry, reserved: Entry | None, pause: float) -> None:
        """`entry` comes up again in `pause` seconds, as it was."""
        if reserved is not None:
            bring(entry, last_run(entry), runs(entry))  # its model, which it shares with `reserved`
            if not self.own_store:
                self.schedule[entry.name] = entry
        self._put_back.append((entry, pause))

    def _push(self, entry: Entry, pause: float) -> None:
        if self._heap is not None:
            self._heap = [event for event in self._heap if event.entry.name != entry.name]
            self._heap.append(event_t(self._when(entry, pause), _PRIORITY, entry))
            heapq.heapify(self._heap)

    def _next_pause(self, entry: Entry) -> float:
        times, _ = self._failed.get(entry.name, (0, 0.0))
        pause: float = min(_PAUSE * 2.0**times, _LONGEST_PAUSE)
        self._failed[entry.name] = times + 1, time.monotonic() + pause
        return pause

    # -- the schedule as a whole

    def _bring_up_to_date(self) -> None:
        """Have all entries go on where etcd says that they are, and etcd know those that are new to it."""
        assert self._ledger is not None
        entries: list[Entry] = list(self.schedule.values())
        for entry in entries:
            record = self._ledger.of(entry.name)
            if record is not None and self._is_behind(entry, record):
                bring(entry, record.last_run_at, record.total_run_count)
        if not self.own_store:
            with deferred():
                self._ledger.see({entry.name: Record(last_run(entry), runs(entry)) for entry in entries})

    def _tidy(self) -> None:
        """Drop the records that are of no use any more."""
        assert self._ledger is not None
        names = self._ledger.names()
        if self.own_store:
            old = datetime.now(timezone.utc) - _KEPT
            names = {name for name in names if _is_over(self._ledger.of(name), old)}
        else:
            names -= {str(entry.name) for entry in self.schedule.values()}
        with deferred():
            self._ledger.forget(names)


def _is_over(record: Record | None, old: datetime) -> bool:
    return record is not None and record.state != "sending" and (record.last_run_at or old) < old


def _say_not_connected(error: BaseException, interval: float) -> None:
    """As Celery does."""
    celerys_logger.error("beat: Connection error: %s. Trying again in %s seconds...", error, interval)
