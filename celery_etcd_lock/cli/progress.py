"""Progress on stderr: one line that is drawn anew in a terminal, one line for each change in a pipe."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time

__all__ = ["Progress"]


class Progress:
    """What a command that waits has to say. `quiet`: nothing, but what went wrong."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._shown = ""
        self._since = time.monotonic()

    def show(self, text: str) -> None:
        """How things stand. Call it as often as you like."""
        if self._quiet:
            return
        if text != self._shown:
            self._since = time.monotonic()
        if self._terminal:
            elapsed = f" ({time.monotonic() - self._since:.0f} s)"
            room = shutil.get_terminal_size().columns - len(elapsed) - 1
            shown = text if len(text) <= room else text[: max(0, room - 1)] + "…"
            self._write(f"\r\x1b[K{shown}{elapsed}")
        elif text != self._shown:
            self._write(text + "\n")
        self._shown = text

    def say(self, text: str, *, anyway: bool = False) -> None:
        """Something that stays. `anyway`: though it is to be quiet."""
        self.clear()
        if anyway or not self._quiet:
            self._write(text + "\n")

    def clear(self) -> None:
        """Take away what is drawn anew, before something else is written."""
        if self._terminal and self._shown:
            self._write("\r\x1b[K")
        self._shown = ""

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone, a pipe that nobody reads any more
            sys.stderr.write(text)
            sys.stderr.flush()
