"""Waiting for keys to go away, or to change: one watch for each lock name and process, however many threads wait.

A wake-up is a hint, never a proof: whoever is woken reads its place in the queue again. So an event seen twice,
a stream that broke or a compacted revision cost a look, not correctness.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from celery_etcd_lock.etcd.api import Transport, Watch, WatchStream, prefix_end
from celery_etcd_lock.exceptions import Compacted, EtcdLockError, EtcdRejected

__all__ = ["Bell", "Wakeable", "Wakeups"]

logger = logging.getLogger(__name__)

_PAUSE = 0.2
"""Seconds between two attempts to open a stream."""

_LONGEST_PAUSE = 30.0
"""Seconds between two attempts, after a number of them that etcd has refused."""

_LONGEST_DEAFNESS = 0.5
"""Seconds until the handler of a signal runs that came at the wrong moment."""


class Wakeable(Protocol):
    """What is set to wake somebody: a `Bell`, or a `threading.Event`."""

    def set(self) -> None: ...


class Bell:
    """An event for one who waits. To set it never blocks, whatever a signal's handler raises in who waits for it.

    (`threading.Event.set` may, for ever: if the exception comes when the waiting thread has just taken the event's
    own lock, nobody gives that back.)
    """

    def __init__(self) -> None:
        self._silent = threading.Lock()
        self._silent.acquire()

    def set(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has rung already
            self._silent.release()

    def clear(self) -> None:
        self._silent.acquire(blocking=False)

    def wait(self, timeout: float) -> None:
        """Until it has rung since the last `wait` or `clear`, for `timeout` seconds at most."""
        if threading.current_thread() is not threading.main_thread():
            self._silent.acquire(timeout=min(timeout, threading.TIMEOUT_MAX))
            return
        # A signal that comes right before the main thread blocks is noted, but does not end that: so look up from it.
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            if self._silent.acquire(timeout=min(left, _LONGEST_DEAFNESS)):
                return


class Wakeups:
    """The watches of one session."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.RLock()
        self._watches: dict[str, _NameWatch] = {}

    @contextmanager
    def watching(
        self, name: str, keys: Sequence[str], revision: int, event: Wakeable, *, puts: bool = False
    ) -> Iterator[None]:
        """Set `event` once one of `keys`, of the lock `name`, is deleted at `revision` or later, or may have been.

        With `puts` also when one is put. The key ``name/`` stands for all of the lock's.
        """
        if not keys:
            yield
            return
        with self._lock:
            watch = self._watches.get(name)
            if watch is None:
                watch = self._watches[name] = _NameWatch(self._transport, self._lock, name, self._watches)
            watch.add(keys, event, _Wait(revision, puts))
        try:
            yield
        finally:
            with self._lock:
                watch.remove(keys, event)

    def wake_all(self) -> None:
        """Wake everybody: something changed that no watch tells."""
        with self._lock:
            for watch in self._watches.values():
                watch.wake()


class _Wait(NamedTuple):
    revision: int
    puts: bool


class _NameWatch:
    """One stream: on the one key that is waited for, or on all of the lock's keys when there are several.

    Its thread lives as long as somebody waits.
    """

    def __init__(self, transport: Transport, lock: threading.RLock, name: str, registry: dict[str, _NameWatch]) -> None:
        self._transport = transport
        self._lock = lock
        self._name = name
        self._all = name + "/"
        self._registry = registry
        self._waiting: dict[str, dict[Wakeable, _Wait]] = {}
        self._stream: WatchStream | None = None
        self._covers: Watch | None = None
        self._told = 0
        self._changed = threading.Event()
        threading.Thread(target=self._run, name=f"etcd-lock-watch {name}", daemon=True).start()

    def add(self, keys: Sequence[str], event: Wakeable, wait: _Wait) -> None:
        for key in keys:
            self._waiting.setdefault(key, {})[event] = wait
        covers = self._covers
        if covers is None:
            return
        if (covers.key != self._all and list(keys) != [covers.key]) or (wait.puts and covers.deletes_only):
            self._restart()
        elif wait.revision < max(covers.start_revision, self._told + 1):
            event.set()  # the stream may have told of it before anybody was there to hear

    def remove(self, keys: Sequence[str], event: Wakeable) -> None:
        for key in keys:
            events = self._waiting.get(key, {})
            events.pop(event, None)
            if not events:
                self._waiting.pop(key, None)
        if not self._waiting:
            # Under the same lock in which a thread would find it: whoever waits next starts another.
            if self._registry.get(self._name) is self:
                del self._registry[self._name]
            self._restart()

    def wake(self, key: str | None = None, *, put: bool = False) -> None:
        for waited, events in self._waiting.items():
            if key is None or waited in (key, self._all):
                for event, wait in events.items():
                    if wait.puts or not put:
                        event.set()

    def _restart(self) -> None:
        self._changed.set()
        if self._stream is not None:
            self._stream.close()

    def _open(self) -> WatchStream | None:
        with self._lock:
            self._changed.clear()
            if not self._waiting:
                return None
            waits = [wait for events in self._waiting.values() for wait in events.values()]
            revision, deletes_only = min(wait.revision for wait in waits), not any(wait.puts for wait in waits)
            key = next(iter(self._waiting)) if len(self._waiting) == 1 else self._all
            end = prefix_end(key) if key == self._all else None
            self._covers = Watch(key, end, start_revision=revision, deletes_only=deletes_only)
            self._stream = self._transport.watch(self._covers)
            return self._stream

    def _run(self) -> None:
        pause = _PAUSE
        while (stream := self._open()) is not None:
            refused = False
            try:
                for reply in stream:
                    pause = _PAUSE
                    with self._lock:
                        for event in reply.events:
                            self._told = max(self._told, event.kv.mod_revision)
                            self.wake(event.kv.key, put=event.kind == "put")
                continue  # closed by us
            except Compacted:
                with self._lock:
                    self.wake()  # they read again, and come back with a newer revision
            except EtcdLockError as error:
                refused = isinstance(error, EtcdRejected)
                logger.debug("etcd_lock.watch_broken: %s: %s", self._name, error)
            except Exception:
                # The waiters look for themselves once per TTL: a broken watch may make them late, no more.
                logger.exception("etcd_lock.watch_failed: %s", self._name)
            finally:
                stream.close()
            pause = min(2 * pause, _LONGEST_PAUSE) if refused else _PAUSE
            self._changed.wait(pause)
