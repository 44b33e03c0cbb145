"""Locks of children that have died: the worker's main process, which saw them die, ends their sessions at once.

A child killed by SIGKILL, by the OOM killer, by a hard time limit or by itself gives nothing back, and its locks would
stay taken for the TTL. Its sessions stand in etcd under the worker's instance and the child's pid, so its parent finds
them. Nobody else may do that: who sees a host name and a pid in etcd does not know whose they are.

Celery tells of a death only where a task was running, and not in each of these cases, billiard only from within
Celery's event loop, which stands still for as long as a shutdown or the broker makes it wait. So the pool's process
objects are looked at, a few times a second. A child is dead when the system says so of it, not when the pool's list
is without it.
"""

from __future__ import annotations

import calendar
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from celery_etcd_lock.etcd import Transport
from celery_etcd_lock.etcd.api import KeyValue, Range, prefix_end
from celery_etcd_lock.exceptions import LeaseNotFound
from celery_etcd_lock.tasks.errands import Errands

__all__ = ["LOOK_EVERY", "Orphans", "pid_of"]

logger = logging.getLogger("celery_etcd_lock")

LOOK_EVERY = 0.25
"""Seconds."""

_DIES_WITHIN = 1.0
"""Seconds."""

_MARGIN = 3
"""Seconds: a session says its start in whole ones."""


@dataclass
class _Child:
    process: Any
    """billiard's object. It is kept, so that no other can be taken for it."""
    pid: int
    alive: float
    """When it was last seen so, by the clock that dates sessions too."""
    gone: bool = False
    ended: int = 0
    """Sessions of it that were ended."""


class Orphans:
    """Watches the processes that `processes` lists, and has the sessions under `prefix` of the dead ones ended."""

    def __init__(self, errands: Errands, prefix: str, processes: Callable[[], Iterable[Any]]) -> None:
        self._errands = errands
        self._prefix = prefix
        self._processes = processes
        self._children: dict[int, _Child] = {}

    def look(self) -> bool:
        """See who has died since the last look; it waits for nothing. True: look again soon, somebody is being born."""
        listed, unborn = list(self._processes()), False
        for process in listed:
            if id(process) not in self._children:
                if pid := _pid(process):
                    self._children[id(process)] = _Child(process, pid, time.time())
                else:
                    unborn = True
        gone = []
        for child in self._children.values():
            if child.gone:
                continue
            now = time.time()
            if _is_dead(child):
                child.gone = True
                gone.append(child)
            else:
                child.alive = now
        present = {id(process) for process in listed}
        self._children = {key: child for key, child in self._children.items() if key in present or not child.gone}
        if gone:
            self._errands.later(lambda transport: self._end_sessions(transport, gone))
        return unborn

    def end_with_parent(self) -> None:
        """This process ends: kill the children that it could not end. The kernel would, later, where nobody sees it.

        Celery has its children killed so where there is such a thing, on Linux. Elsewhere they live on, and hold on to
        what they hold.
        """
        if sys.platform != "linux":
            return
        living = [child for child in list(self._children.values()) if not _is_dead(child)]
        for child in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        deadline = time.monotonic() + _DIES_WITHIN
        while time.monotonic() < deadline and not all(map(_is_dead, living)):
            time.sleep(0.01)

    def _end_sessions(self, transport: Transport, gone: list[_Child]) -> None:
        sessions = transport.range(Range(self._prefix, prefix_end(self._prefix))).kvs
        for child in gone:
            # Asked after the range: where nobody has the pid now, all that it found under this pid was the dead's.
            reused = _is_reused(child)
            for session in sessions:
                if pid_of(session.key) != child.pid or not session.lease:
                    continue
                if reused and not _began_before(session, child.alive - _MARGIN):
                    continue
                try:
                    transport.lease_revoke(session.lease)
                except LeaseNotFound:
                    continue
                child.ended += 1
        for child in gone:
            if child.ended:
                logger.warning(
                    "etcd_lock.orphans_freed: process %d has died; %d of its sessions ended, its locks are free",
                    child.pid, child.ended,
                )  # fmt: skip


def pid_of(session: str) -> int:
    """The pid in the key of a session, ``…/<pid>-<lease>``; 0 where there is none."""
    pid = session.rpartition("/")[2].partition("-")[0]
    return int(pid) if pid.isdecimal() else 0


def _pid(process: Any) -> int:
    """0: it is not started yet, or was closed."""
    return getattr(process._popen, "pid", 0) or 0


def _is_dead(child: _Child) -> bool:
    popen = child.process._popen
    if popen is None or popen.returncode is not None:
        return True
    return _waits_to_be_reaped(child.pid)


def _waits_to_be_reaped(pid: int) -> bool:
    """Whether this child of ours has ended. It is left for billiard to reap: until then nobody else gets its pid."""
    if not hasattr(os, "waitid"):
        return False  # macOS before Python 3.13: dead when billiard says so
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _is_reused(child: _Child) -> bool:
    popen = child.process._popen
    if popen is not None and popen.returncode is None and _waits_to_be_reaped(child.pid):
        return False
    try:
        os.kill(child.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _began_before(session: KeyValue, limit: float) -> bool:
    try:
        start = calendar.timegm(time.strptime(json.loads(session.value)["start"], "%Y-%m-%dT%H:%M:%SZ"))
    except (ValueError, TypeError, KeyError):
        return False
    return start < limit
