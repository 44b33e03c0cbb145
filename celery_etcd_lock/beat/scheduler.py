"""What Celery is given as its scheduler: it ticks while this beat leads, and stands by while it does not."""

from __future__ import annotations

import logging
from contextlib import closing, suppress
from datetime import datetime, timezone
from typing import Any

import click
from celery import Celery
from celery.beat import PersistentScheduler, Scheduler
from celery.utils.imports import qualname

from celery_etcd_lock.beat.broker import Broker
from celery_etcd_lock.beat.candidate import Candidate, who
from celery_etcd_lock.beat.clocks import BELIEVED, REPORTED
from celery_etcd_lock.beat.fenced import Fenced, fenced
from celery_etcd_lock.beat.ledger import Ledger
from celery_etcd_lock.beat.outage import Outage
from celery_etcd_lock.beat.record import beat_prefix, entry_prefix, leader_name
from celery_etcd_lock.beat.wrapped import settings_for_beat, wrapped_scheduler
from celery_etcd_lock.etcd.api import Range, prefix_end
from celery_etcd_lock.exceptions import ConfigError, EtcdLockError, LockLost
from celery_etcd_lock.locks.election import Leader, Leadership
from celery_etcd_lock.tasks.interrupts import deferred

__all__ = ["EtcdScheduler"]

logger = logging.getLogger("celery_etcd_lock")

_LOOK = 1.0
"""Seconds, at most, that a tick takes while it stands by: Celery looks between two whether it is to end."""

_ASK_AGAIN = 0.2


class EtcdScheduler(Scheduler):
    """One of any number of beats. ``celery -A proj beat -S etcd_lock``; also for ``worker -B``.

    Made by Celery, and `lazy` for its banner. A setting that does not do is one clean line, and the end.
    """

    lock_key = None
    """RedBeat asks every scheduler for the key of its own lock, in whose place all this is."""

    def __init__(
        self, app: Celery, schedule_filename: str | None = None, max_interval: int | None = None, lazy: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        try:
            self._settings = settings_for_beat(app)
            self._wrapped = wrapped_scheduler(app, self._settings)
        except ConfigError as error:
            raise click.ClickException(str(error)) from error
        self._arguments = {
            "app": app, "schedule_filename": schedule_filename, "max_interval": max_interval, **kwargs
        }  # fmt: skip
        self._inner: Scheduler | None = None
        self._leadership: Leadership | None = None
        self._outage = Outage(self._settings)
        self._broker = Broker()
        super().__init__(app, max_interval=max_interval, lazy=True)
        self._lazily = self._wrapped(**self._arguments, lazy=True)
        self.max_interval = self._lazily.max_interval
        if lazy:
            return
        if self._settings.enabled is not True:
            self._say_alone(f"etcd_lock_enabled is {self._settings.enabled!r}")
            self._inner = self._wrapped(**self._arguments, lazy=False)
        elif self._settings.endpoints[0].startswith("memory://"):
            self._say_alone("etcd_lock_endpoints is memory://, which no other process shares")
        self._candidate = Candidate(
            self._settings,
            self._outage,
            self._broker,
            app.main or "",
            lambda signal, record: signal.send(app, record=record),
        )

    def _say_alone(self, why: str) -> None:
        logger.warning("etcd_lock.beat_alone: %s: this beat sends every tick, whatever others do", why)

    # -- what Celery calls

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """As Celery's: does what is due, and returns the seconds until it wants to be called again."""
        if self._settings.enabled is not True:
            assert self._inner is not None
            return self._inner.tick(*args, **kwargs)
        leadership = self._candidate.leadership
        if leadership is None:
            self._retire()
            self._candidate.wait(min(_LOOK, self.max_interval or _LOOK))
            return 0.0
        if not self._outage.may_try():
            return _ASK_AGAIN
        try:
            return self._lead(leadership)
        except LockLost:
            return 0.0  # the candidate has noticed, or is about to
        except EtcdLockError as error:
            self._outage.fails(error)
            return _ASK_AGAIN

    def should_sync(self) -> bool:
        return self._inner is not None and bool(self._inner.should_sync())

    def _do_sync(self) -> None:
        if self._inner is not None:
            self._inner._do_sync()  # type: ignore[attr-defined]

    def sync(self) -> None:
        if self._inner is not None:
            self._inner.sync()

    def close(self) -> None:
        """Called twice, the first time perhaps by a signal in the middle of a tick: never in that of a publish."""
        try:
            if self._inner is not None:
                self._inner.close()
        finally:
            self._candidate.close()

    def get_schedule(self) -> Any:
        return self._inner.schedule if self._inner is not None else self.data

    def set_schedule(self, schedule: Any) -> None:
        self.data = schedule

    schedule = property(get_schedule, set_schedule)

    @property
    def info(self) -> str:
        """For the banner."""
        settings = self._settings
        lines = [f"    . wrapped -> {qualname(self._wrapped)}"]
        if settings.enabled is True:
            lines += [
                f"    . etcd -> {', '.join(settings.endpoints)}",
                f"    . beat -> {settings.beat_name} (ttl {settings.beat_ttl}s), {self._who_leads()}",
            ]
        if (inner := self._lazily.info) and not issubclass(self._wrapped, PersistentScheduler):
            lines.append(inner)
        return "\n".join(lines)

    # -- leading

    def _lead(self, leadership: Leadership) -> float:
        if leadership is not self._leadership:
            self._take_over(leadership)
        inner, ledger = self._inner, self._ledger
        assert isinstance(inner, Fenced)
        with deferred():
            if ledger.unsettled:
                ledger.settle()
                self._outage.over()
            elif self._outage.lasts and not self._outage.full:
                ledger.ask()
                self._outage.over()
        interval = inner.tick()
        return min(interval, _LOOK) if ledger.unsettled or self._outage.lasts else interval

    def _take_over(self, leadership: Leadership) -> None:
        """A scheduler as if this process had just begun, which goes on from what etcd knows."""
        self._retire()
        settings = self._settings
        prefix = entry_prefix(settings.namespace, settings.beat_name)
        ledger = Ledger(leadership, prefix, settings.timeout)
        with deferred():
            ledger.load()
        self._outage.over()
        self._broker.forget()
        self._look_at_clock(ledger)
        scheduler = fenced(self._wrapped, adopt=not ledger.names())
        inner = scheduler(**self._arguments, lazy=False)
        inner.begin(
            ledger,
            self._outage,
            self._broker,
            beat=settings.beat_name,
            scope=beat_prefix(settings.namespace, settings.beat_name),
            done_ttl=settings.done_ttl,
        )
        self._inner, self._ledger, self._leadership = inner, ledger, leadership

    def _retire(self) -> None:
        inner, self._inner, self._leadership = self._inner, None, None
        if isinstance(inner, Fenced):
            inner.retire()

    def _look_at_clock(self, ledger: Ledger) -> None:
        now = datetime.now(timezone.utc)
        ahead = ledger.latest(now) - now
        if ahead <= REPORTED:
            return
        logger.warning(
            "etcd_lock.clock_skew: the beat that led before wrote down a time that is %.0f s from now by the clock of "
            "this host: one of the two is wrong. What was sent is not sent again%s",
            ahead.total_seconds(), ", except what was due by that clock alone" if ahead > BELIEVED else "",
        )  # fmt: skip
        ledger.doubt(now, BELIEVED)

    def _who_leads(self) -> str:
        """As a beat that only just begins can tell."""
        settings = self._settings
        with suppress(EtcdLockError), closing(settings.connect()) as transport:
            start = leader_name(settings.namespace, settings.beat_name) + "/"
            kvs = transport.range(
                Range(start, prefix_end(start), limit=1, sort="create"), timeout=min(_LOOK, settings.timeout)
            ).kvs
            if not kvs:
                return "no leader yet"
            (kv,) = kvs
            leader = Leader(kv.key, kv.value.decode(errors="replace"), kv.create_revision, kv.mod_revision, kv.lease)
            return f"leader {who(leader)}"
        return "etcd does not answer"
