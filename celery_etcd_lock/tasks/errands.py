"""What a worker's main process wants of etcd, done in a thread of its own: the consumer never waits for etcd.

    Errands.of(app).later(lambda transport: transport.delete(Delete(key)))

The main process of a prefork pool forks for as long as it lives. So nothing is open while there is nothing to do; a
fork waits, for a moment, until the errand under way is done (a thread that is inside TLS, the resolver or an import
leaves locks behind that nobody opens in the child); and gRPC, which bears no fork once it is in use, is used in a
process apart.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from celery_etcd_lock.etcd import Transport
from celery_etcd_lock.etcd.apart import Apart
from celery_etcd_lock.exceptions import EtcdLockError, EtcdUnavailable
from celery_etcd_lock.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["Errands"]

logger = logging.getLogger("celery_etcd_lock")

R = TypeVar("R")

_MOST = 10_000
"""Errands that wait; what comes on top while etcd is away is not done."""

_PAUSE = 1.0
"""Seconds until the next attempt, where etcd did not answer."""

_SOON = 0.01
"""Seconds until the next look, where the last one came too early."""

_FORK_WAITS = 0.2
"""Seconds, at most, for an errand under way."""


class _Errand(NamedTuple):
    job: Callable[[Transport], object]
    until: float


class Errands:
    """A queue of errands to one app's etcd, and the daemon thread that does them, in order. Get it by `of`."""

    def __init__(self, settings: Settings, *, forks: bool = False) -> None:
        self._settings = settings
        self._forks = forks
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._waiting: deque[_Errand] = deque()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._watcher: threading.Thread | None = None
        self._look: Callable[[], bool] | None = None
        self._look_now = threading.Event()
        self._watched_enough = False
        self._transport: Transport | None = None
        self._away = False
        self._again = 0.0

    @classmethod
    def of(cls, app: Celery, *, forks: bool = False) -> Errands:
        """The errands of `app` in this process. `forks`: from now on it must stay free to fork."""
        with _making:
            errands = _errands.get(app)
            if errands is None:
                errands = _errands[app] = cls(Settings.from_app(app))
            errands._forks = errands._forks or forks
            return errands

    def later(self, job: Callable[[Transport], object], *, patience: float | None = None) -> bool:
        """Have `job` done soon, in another thread; never blocks, never raises.

        Where etcd does not answer it is done again, for `patience` seconds (None: the TTL), so it must be such that
        twice is as good as once. Any other error ends it, with a word in the log. False: it will not be done, because
        locking is off, or too many wait already, or this is a forked copy.
        """
        if not self._settings.enabled or os.getpid() != self._pid:
            return False
        patience = self._settings.ttl if patience is None else patience
        with self._changed:
            if len(self._waiting) >= _MOST:
                return False
            self._waiting.append(_Errand(job, time.monotonic() + patience))
            self._changed.notify_all()
        self._begin()
        return True

    def ask(self, question: Callable[[Transport], R], *, within: float) -> R:
        """What `question` gives, or raises; `EtcdUnavailable` after `within` seconds."""
        answers: deque[Callable[[], R]] = deque()
        answered = threading.Event()

        def job(transport: Transport) -> None:
            try:
                answer = question(transport)
            except EtcdLockError as error:
                answers.append(_raising(error))
            else:
                answers.append(lambda: answer)
            answered.set()

        if not self.later(job, patience=within) or not answered.wait(within):
            raise EtcdUnavailable(f"etcd has not answered within {within:g} s")
        return answers[0]()

    def watch(self, look: Callable[[], bool], *, every: float) -> None:
        """Call `look` in a thread: every so many seconds, soon after each fork, and soon again if it says so.

        It has a thread to itself: what it looks for may come and go while an errand is under way.
        """
        self._look = look
        self._watcher = threading.Thread(target=self._watch, args=[every], name="etcd-lock-watch", daemon=True)
        self._watcher.start()

    def hurry(self) -> None:
        """Look now."""
        self._look_now.set()

    def close(self, within: float) -> None:
        """Look once more, do what waits, and end; not longer than `within` seconds. Never raises."""
        if os.getpid() != self._pid:
            return
        deadline = time.monotonic() + within
        self._watched_enough = True
        self.hurry()
        if self._watcher is not None:
            self._watcher.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(max(0.0, deadline - time.monotonic()))

    # -- the threads

    def _watch(self, every: float) -> None:
        while True:
            self._look_now.clear()
            last = self._watched_enough  # before the look: one look comes after it
            soon = self._looks()
            if last:
                return
            self._look_now.wait(_SOON if soon else every)

    def _begin(self) -> None:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="etcd-lock-errands", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                closing = self._closing
            waits = not self._work(closing)
            if closing:
                return
            with self._changed:
                if not (self._closing or (self._waiting and not waits)):
                    self._changed.wait(max(0.0, self._again - time.monotonic()) if waits else None)

    def _looks(self) -> bool:
        try:
            return self._look is not None and self._look()
        except Exception:
            logger.exception("etcd_lock.look_failed")
            return False

    def _work(self, closing: bool) -> bool:
        """Do what waits. False: etcd does not answer, and something still waits."""
        if self._waiting and time.monotonic() < self._again and not closing:
            return False
        try:
            while self._waiting:
                errand = self._waiting[0]
                with _gate:
                    done = self._do(errand)
                if not done and time.monotonic() < errand.until:
                    self._again = time.monotonic() + _PAUSE
                    return False
                self._waiting.popleft()
            return True
        finally:
            self._put_away()

    def _do(self, errand: _Errand) -> bool:
        try:
            if self._transport is None:
                self._transport = self._connect()
            errand.job(self._transport)
        except EtcdUnavailable as error:
            if not self._away:
                self._away = True
                logger.warning("etcd_lock.errand_waits: %s", error)
            return False
        except EtcdLockError as error:
            logger.warning("etcd_lock.errand_failed: %s", error)
        except Exception:
            logger.exception("etcd_lock.errand_failed")
        self._away = False
        return True

    def _connect(self) -> Transport:
        apart = self._forks and self._settings.transport == "grpc"
        return Apart(self._settings.connection) if apart else self._settings.connect()

    def _put_away(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()


def _raising(error: EtcdLockError) -> Callable[[], Any]:
    def again() -> Any:
        raise error

    return again


_errands: WeakKeyDictionary[Celery, Errands] = WeakKeyDictionary()
_making = threading.Lock()
_gate = threading.Lock()
_forking = threading.local()


def _before_fork() -> None:
    _forking.inside = _gate.acquire(timeout=_FORK_WAITS)


def _after_fork_in_parent() -> None:
    if _forking.inside:
        _gate.release()
    for errands in list(_errands.values()):
        errands.hurry()  # a child may be dead before the next look: see it while it lives


def _after_fork_in_child() -> None:
    global _errands, _making, _gate  # the parent's may be locked for ever, and its errands are not ours
    _errands, _making, _gate = WeakKeyDictionary(), threading.Lock(), threading.Lock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
