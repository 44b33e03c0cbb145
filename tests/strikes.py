"""Signals at any instant: from the kernel, with no thread or process of ours that would have to get its turn first."""

from __future__ import annotations

import ctypes
import signal

__all__ = ["Striker"]

_CLOCK_MONOTONIC = 1
_SIGEV_SIGNAL = 0
_SIGEVENT_INTS = 16
"""The C struct ``sigevent`` is a value of 8 bytes, the signal's number, how to notify, and padding to 64 bytes."""
_NANO = 1_000_000_000


class Striker:
    """A timer of the kernel's that sends this process the signal `number`, once each time it is set."""

    def __init__(self, number: signal.Signals) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = ctypes.c_void_p()
        event = (ctypes.c_int * _SIGEVENT_INTS)()
        event[2], event[3] = number, _SIGEV_SIGNAL
        assert self._libc.timer_create(_CLOCK_MONOTONIC, event, ctypes.byref(self._timer)) == 0, ctypes.get_errno()

    def set(self, seconds: float) -> None:
        """Strike in `seconds`. 0: not at all."""
        times = (ctypes.c_long * 4)(0, 0, int(seconds), int(seconds % 1 * _NANO))
        assert self._libc.timer_settime(self._timer, 0, times, None) == 0, ctypes.get_errno()

    def close(self) -> None:
        self._libc.timer_delete(self._timer)
