"""One client and one session for each (app, process): opened when the first lock is wanted, closed at the end.

The parent of a prefork pool forks children as long as it lives, and a web server may be preloaded: so nothing
is opened at import or in the parent, and whatever a forked child finds here is dropped, untouched, and made anew.
A session that was lost is replaced by the next one who wants a lock.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from celery import signals as celery_signals

from celery_etcd_lock import signals
from celery_etcd_lock.etcd import Transport
from celery_etcd_lock.exceptions import EtcdUnavailable, LockLost
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.queue import Mode
from celery_etcd_lock.locks.rider import Rider
from celery_etcd_lock.locks.session import Session
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.instance import instance
from celery_etcd_lock.tasks.interrupts import deferred
from celery_etcd_lock.tasks.leases import Leases
from celery_etcd_lock.tasks.outage import Outage
from celery_etcd_lock.tasks.putback import countdown_ceiling
from celery_etcd_lock.tasks.respite import Respite

if TYPE_CHECKING:
    from celery import Celery

    from celery_etcd_lock.locks.held import HeldLock

__all__ = ["Runtime", "close_all"]

_WHEN_OBSERVING = 1.0
"""Seconds for one request, at most, where tasks do not depend on the answer."""


class Runtime:
    """What a process needs to lock for one app. Get it by `of`."""

    def __init__(self, app: Celery) -> None:
        self._app = ref(app)
        self.settings = Settings.from_app(app)
        self.countdown_ceiling = countdown_ceiling(app)
        """Kept: to look it up for each message takes longer than most else that is done for one."""
        self.outage = Outage(self.settings)
        self.leases = Leases()
        self.respite = Respite()
        self._session: Session | None = None
        self._transport: Transport | None = None
        self._opening = threading.Lock()
        self._failed: tuple[float, EtcdUnavailable] | None = None
        """When and why the latest session could not be opened that could not."""

    @classmethod
    def of(cls, app: Celery) -> Runtime:
        """The runtime of `app` in this process. `ConfigError` if the settings of `app` do not do."""
        runtime = _runtimes.get(app)
        if runtime is None:
            with _making:
                runtime = _runtimes.get(app)
                if runtime is None:
                    runtime = _runtimes[app] = cls(app)
        return runtime

    @property
    def opened(self) -> Session | None:
        """The session that this process has, if it has one; it may be lost."""
        return self._session

    def session(self) -> Session:
        """The session of this process, opened if there is none or it was lost. `EtcdUnavailable`, `AuthRejected`."""
        session = self._session
        if session is not None and not session.lost:
            return session
        called = time.monotonic()
        with self._opening:
            if self._session is not None:
                if not self._session.lost:
                    return self._session
                self.close()
            if self._failed is not None and self._failed[0] >= called:
                # While we stood in line: a whole pool must not wait for the same etcd one after the other.
                raise _copy(self._failed[1])
            try:
                session = self._session = self._open()
            except EtcdUnavailable as error:
                self._failed = time.monotonic(), _copy(error)
                raise
        record = signals.SessionOpenedRecord(session.key, session.lease, session.ttl)
        signals.session_opened.send(self._app(), record=record)
        return session

    def _open(self) -> Session:
        # Where no session comes of it the transport stays for the next task: it knows of a log-in refused.
        transport, settings = self._connected(), self.settings

        def say_lost(reason: str) -> None:
            signals.session_lost.send(self._app(), record=signals.SessionLostRecord(session.key, session.lease, reason))

        session = Session(
            transport, ttl=settings.ttl, namespace=settings.namespace, instance=instance(), on_lost=say_lost
        )
        return session

    def transport(self) -> Transport:
        """A transport of this process to the app's etcd, without a session: for those who only publish."""
        transport = self._transport
        if transport is not None:
            return transport
        with self._opening:
            return self._connected()

    def _connected(self) -> Transport:
        if self._transport is None:
            settings = self.settings
            if settings.enabled == "observe":
                settings = replace(settings, timeout=min(settings.timeout, _WHEN_OBSERVING))
            self._transport = settings.connect()
        return self._transport

    def acquire(
        self, name: str, mode: Mode, *, rider: Callable[[Session], Rider | None] | None = None, **options: Any
    ) -> HeldLock:
        """As `locks.acquire`, with its options; a session that turns out to be lost is replaced once.

        `rider` makes it for the session whose lock it is going to be.
        """
        session = self.session()
        try:
            return acquire(session, name, mode, rider=rider and rider(session), **options)
        except LockLost:
            if not session.lost:
                raise
        session = self.session()
        return acquire(session, name, mode, rider=rider and rider(session), **options)

    def close(self) -> None:
        """End the session, and give back all that hangs on it. The next `session` opens another."""
        session, self._session = self._session, None
        transport, self._transport = self._transport, None
        if session is not None:
            session.close()
        if transport is not None:
            transport.close()


def _copy(error: EtcdUnavailable) -> EtcdUnavailable:
    """Without its traceback, and all that hangs on that."""
    return type(error)(*error.args)


_runtimes: WeakKeyDictionary[Celery, Runtime] = WeakKeyDictionary()
_making = threading.Lock()


def _forget_after_fork() -> None:
    global _runtimes, _making  # the parent's may be locked for ever, and its sessions are not ours
    _runtimes, _making = WeakKeyDictionary(), threading.Lock()


def close_all(**_kwargs: Any) -> None:
    """Close the sessions of this process: its locks are free at once, not after the TTL."""
    with deferred():  # one more signal, of who cannot wait any longer, must not leave a session half closed
        for runtime in list(_runtimes.values()):
            runtime.close()


os.register_at_fork(after_in_child=_forget_after_fork)
# A prefork child ends by os._exit, without atexit; other processes do not get the signal.
celery_signals.worker_process_shutdown.connect(close_all, weak=False)
celery_signals.worker_shutdown.connect(close_all, weak=False)
atexit.register(close_all)
