"""Ending a body whose lock was lost, wherever it is.

In the main thread (prefork, solo) a signal does it: its handler raises `LockLost` there, and interrupts a
``time.sleep(600)`` or a read as any signal does. The signal is SIGURG, as in Go's runtime and for its reasons:
ignored by default, not used by anybody else, harmless when it comes at the wrong moment. In another thread an
asynchronous exception does it; Python delivers that when the thread next runs Python code, not inside a call
that blocks. In a greenlet gevent's hub does it, when the greenlet next yields (see `greenlets`).

An abort is armed while the body runs and disarmed before anything else does, so that it never hits Celery's
code. It raises at most once. Other signals strike in the body only: see `interrupts`.
"""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from celery_etcd_lock.exceptions import LockLost
from celery_etcd_lock.tasks.greenlets import thrower
from celery_etcd_lock.tasks.interrupts import Front, allowed, deferred, getsignal

__all__ = ["Abort"]

R = TypeVar("R")

_SIGNAL = getattr(signal, "SIGURG", None)

_INSIST = 0.05
"""Seconds between two signals."""


class Abort:
    """For the thread or greenlet that makes it: `fire` from any other raises `LockLost` in it, while it is in `run`."""

    _in_main: Abort | None = None
    """The one that is armed in the main thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed = False
        self._fired = False
        self._reason = ""
        self._thread = threading.get_ident()
        self._throw = thrower()
        in_main = self._throw is None and threading.current_thread() is threading.main_thread()
        self._by_signal = in_main and _handler_is_ours()

    def run(self, body: Callable[[], R]) -> R:
        """Run `body`; `LockLost` in it, once, if `fire` is called meanwhile or was before. Bodies may nest."""
        outer = Abort._in_main
        try:
            with deferred():
                try:
                    self._arm()
                    with allowed():
                        return body()
                finally:
                    self._disarm(outer)
        except LockLost as lost:
            self._disarm(outer)  # an asynchronous exception may have come in the middle of that
            if self._fired and not lost.args:
                # An asynchronous exception comes as a class, without its reason.
                raise LockLost(self._reason) from None
            raise

    def _arm(self) -> None:
        if self._by_signal:
            Abort._in_main = self
        with self._lock:
            self._armed = not self._fired
        if self._fired:
            raise LockLost(self._reason)

    def _disarm(self, outer: Abort | None) -> None:
        with self._lock:
            self._armed = False
            if self._fired and not self._by_signal and self._throw is None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), None)
        if self._by_signal:
            Abort._in_main = outer

    def fire(self, reason: str) -> None:
        """The lock is lost, for `reason`: end the body, if it still runs."""
        with self._lock:
            if self._fired:
                return
            self._reason, self._fired = reason, True
            if not self._armed:
                return
            if self._throw is not None:
                self._throw(self._thrown)
                return
            if not self._by_signal:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(LockLost))
                return
        threading.Thread(target=self._insist, name="etcd-lock-abort", daemon=True).start()

    def _insist(self) -> None:
        # A signal that comes right before the main thread enters a blocking call is noted, but does not interrupt
        # that: so it is sent again until it was heard.
        while True:
            with self._lock:
                if not self._armed or _SIGNAL is None:
                    return
                signal.pthread_kill(self._thread, _SIGNAL)
            time.sleep(_INSIST)

    def _thrown(self) -> LockLost | None:
        # In the hub, while no greenlet runs. Like `_signalled` it must not wait for a lock.
        if not self._armed:
            return None
        self._armed = False
        return LockLost(self._reason)

    def _signalled(self) -> None:
        # In the main thread, between two of its instructions: it must not wait for a lock.
        if self._armed and self._fired:
            self._armed = False
            raise LockLost(self._reason)


def _handler_is_ours() -> bool:
    """Install the signal's handler, once, in front of the one that is there. Only the main thread can."""
    if _SIGNAL is None:
        return False
    there = getsignal(_SIGNAL)
    if not (isinstance(there, Front) and isinstance(there.before, _Handler)):
        signal.signal(_SIGNAL, Front(_Handler(there if callable(there) else None)))
    return True


class _Handler:
    def __init__(self, before: Callable[[int, FrameType | None], Any] | None) -> None:
        self._before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if Abort._in_main is not None:
            Abort._in_main._signalled()
        if self._before is not None:
            self._before(number, frame)
