"""A command that runs for as long as something holds: signals are passed on to it, and it can be ended.

In the foreground of a terminal it shares our process group: it may read from the terminal, and Ctrl-C and the end of
the terminal reach it without us, so those are not passed on. Anywhere else it gets a session, and so a process group,
of its own: whoever signals us, or our whole group, reaches it through us, once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Child"]

_FROM_THE_TERMINAL = {signal.SIGINT, signal.SIGQUIT, signal.SIGHUP}

_LOOK_EVERY = 0.05
"""Seconds."""

_DIES_WITHIN = 1.0
"""Seconds, of SIGKILL."""

_HAS_PROC = Path("/proc/self/stat").exists()


class Child:
    """The command, running. `OSError` if it cannot be started.

    `kill_after`: seconds between SIGTERM and SIGKILL when it is to end.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, kill_after: float) -> None:
        self._kill_after = kill_after
        self._shares_our_group = _in_foreground()
        self._ending: threading.Thread | None = None
        self._starting = threading.Lock()
        self._process = subprocess.Popen(command, env=environment, start_new_session=not self._shares_our_group)
        self._everybody = _Family(self._process.pid) if self._shares_our_group else _Group(self._process.pid)

    def pass_on(self, number: int) -> None:
        """Give it a signal that we got, unless it got that itself."""
        if self._shares_our_group:
            if number not in _FROM_THE_TERMINAL or not _in_foreground():
                self._process.send_signal(number)
        else:
            self._everybody.signal(number)

    def end(self) -> None:
        """Have it end, and all that it has started, in a thread of its own: SIGTERM, and SIGKILL for what is left."""
        with self._starting:
            if self._ending is None:
                self._ending = threading.Thread(target=self._end, name="etcd-lock-end", daemon=True)
                self._ending.start()

    def wait(self) -> int:
        """Until it has ended. Its exit status as a shell has it: 128 and the signal's number for one that killed it.

        If it was to end, until all of it has.
        """
        status = self._process.wait()
        if self._ending is not None:
            self._ending.join()
        return status if status >= 0 else 128 - status

    def _end(self) -> None:
        self._everybody.signal(signal.SIGTERM)
        self._everybody.signal(signal.SIGCONT)  # one that is stopped would not hear of it
        if not self._is_gone(within=self._kill_after):
            self._everybody.signal(signal.SIGKILL)
            self._is_gone(within=_DIES_WITHIN)  # a zombie that nobody reaps stays

    def _is_gone(self, *, within: float) -> bool:
        deadline = time.monotonic() + within
        while self._everybody.lives():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_EVERY)
        return True


def _in_foreground() -> bool:
    """Whether the terminal's keys reach this process. False where there is no terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


class _Group:
    """The processes of a process group of their own."""

    def __init__(self, group: int) -> None:
        self._group = group

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._group, number)

    def lives(self) -> bool:
        if _HAS_PROC:  # where zombies, which a container may keep, can be told from the living
            return any(fields[2] == str(self._group) for fields in _all().values())
        try:
            os.killpg(self._group, 0)
        except OSError:  # PermissionError: macOS says so of a group of which nothing but zombies is left
            return False
        return True


class _Family:
    """A process and those that descend from it, where the group is not theirs alone. Where there is no /proc: it alone.

    Those that were once seen stay in it, though their parent ends; the time of their start tells who they are.
    """

    def __init__(self, pid: int) -> None:
        self._seen = {pid: _started(pid)}

    def signal(self, number: int) -> None:
        self._look()
        for pid in self._living():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def lives(self) -> bool:
        return bool(self._living())

    def _living(self) -> list[int]:
        return [pid for pid, started in self._seen.items() if _started(pid) == started and _is_there(pid)]

    def _look(self) -> None:
        parents = {pid: int(fields[1]) for pid, fields in _all().items()}
        grown = True
        while grown:
            children = [pid for pid, parent in parents.items() if parent in self._seen and pid not in self._seen]
            self._seen.update({pid: _started(pid) for pid in children})
            grown = bool(children)


def _all() -> dict[int, list[str]]:
    """What the kernel says of each process that lives."""
    pids = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdecimal()] if _HAS_PROC else []
    return {pid: fields for pid in pids if (fields := _stat(pid))}


def _stat(pid: int) -> list[str]:
    """What the kernel says of the process, from its state on; nothing if it is gone, or nothing but a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


def _started(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields else ""


def _is_there(pid: int) -> bool:
    if _HAS_PROC:
        return bool(_stat(pid))
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
