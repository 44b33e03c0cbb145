"""Signals whose handler raises in the main thread: kept out while a lock is taken or given back.

Such a handler (billiard's for the soft time limit, SIGUSR1; its SystemExit for SIGTERM, SIGQUIT and SIGHUP in a prefork
child; a project's own for SIGALRM) runs between any two instructions of the main thread. Between a request and
the line that takes note of its answer that would leave a lock behind. Blocking the signal does not help once there is
another thread, so a handler of ours, a `Front`, goes in front of each::

                 deferred()                allowed()
    strikes ───────▶ noted ───────────────▶ strikes ───────────┐
       ▲               ▲ │ a signal is noted                   │ the body, or a long wait
       │               │ └─┘                                   │
       └── delivered ──┴───────────────────────────────────────┘

Delivered means that the handler that was there is called, with its number and frame: when the outermost section ends,
or when `allowed` begins. As in the kernel, a signal that comes twice meanwhile is delivered once.

**No instant is left out.** A signal may also strike in the few instructions that change from one to the other. `Front`
therefore looks at where it strikes: in those functions it is always noted, never raised, and each of them delivers
what is noted after its last call (CPython runs handlers after calls, at the start of functions and at jumps back).

- `deferred` begins: before the flag is set nothing has begun; after it nothing raises, so that ``__exit__`` is reached.
- `allowed` begins: noted, then delivered from within ``__enter__``, which defers again before it lets that out; the
  body has not begun, and the caller's ``finally`` runs deferred.
- `allowed` runs: strikes as usual, inside the caller's ``with``. CPython runs no handler at the seams of a ``with``
  whose ``__enter__`` is written in Python. Should one strike there all the same, the flag stays down: so give back
  under a `deferred` of its own, which sets it again. It would take two strikes within a microsecond to get past that.
- `allowed` ends: noted until the flag is up.
- `deferred` ends: the flag goes down first, then what is noted is delivered, whatever each handler raises. All that
  was to be done is done: what strikes from then on is raised at once, and has `Front` deliver the rest.

An exception on its way out is not replaced by a weaker one. A run that has ended by Retry, Ignore or Reject has said
where its message goes, and one that is ended by SystemExit must end: what comes of a soft limit then is logged. Once
a handler has raised SystemExit, what else is noted is dropped: a second one would have billiard leave by ``os._exit``.

Left alone: SIG_DFL, SIG_IGN, handlers in C, and Python's own for SIGINT, which asyncio looks for. In other threads and
in greenlets, where no handler runs, nothing is done.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Any, TypeAlias

from celery.exceptions import TaskPredicate

__all__ = ["Front", "allowed", "deferred", "getsignal"]

logger = logging.getLogger("celery_etcd_lock")

Handler: TypeAlias = Callable[[int, FrameType | None], Any]

_NAMES = ("SIGALRM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]

# The module's own makes an enum of each answer first, which takes longer than all the rest here.
getsignal: Callable[[int], Any] = getattr(signal, "_signal", signal).getsignal

_NOTHING = nullcontext()


class _State:
    """Of the main thread of this process. No locks: a handler that waited for one would wait for itself."""

    deferring = False
    noted: dict[int, tuple[Handler, FrameType | None]]
    """By number."""

    def __init__(self) -> None:
        self.noted = {}


_state = _State()


def deferred() -> AbstractContextManager[None]:
    """A section in which no handler raises: signals are noted, and delivered at its end. Sections nest.

    What a handler raises comes out of the section's end, when all that the section did is done.
    """
    return _Deferred() if _in_main() else _NOTHING


def allowed() -> AbstractContextManager[None]:
    """Inside a `deferred` section: signals are delivered at its beginning, strike within, and are deferred again after.

    Around a body or a long wait. What a handler raises at its beginning keeps the block from being entered.
    """
    return _Allowed() if _in_main() else _NOTHING


def _in_main() -> bool:
    return threading.get_ident() == threading.main_thread().ident


class Front:
    """A signal's handler, in front of the one `before`."""

    __slots__ = ("before",)

    def __init__(self, before: Handler) -> None:
        self.before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _state.deferring or (frame is not None and frame.f_code in _OURS):
            _state.noted[number] = (self.before, frame)
            return
        try:
            self.before(number, frame)
        finally:
            while _state.noted:
                _deliver()


class _Deferred:
    __slots__ = ("_outer",)

    def __enter__(self) -> None:
        _look()
        self._outer = _state.deferring
        _state.deferring = True

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        _state.deferring = self._outer
        if self._outer:
            return
        try:
            while _state.noted:
                _deliver()
        except Exception as late:
            if exc is None or (isinstance(exc, Exception) and not isinstance(exc, TaskPredicate)):
                raise
            logger.warning("etcd_lock.signal_too_late: %r came when the run had ended by %r", late, exc)


class _Allowed:
    __slots__ = ("_outer",)

    def __enter__(self) -> None:
        self._outer = _state.deferring
        _state.deferring = False
        try:
            while _state.noted:
                _deliver()
        except BaseException:
            _state.deferring = self._outer
            raise

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        _state.deferring = self._outer
        while _state.noted and not self._outer:
            _deliver()


def _deliver() -> None:
    """Call the handlers of all that is noted. Of what they raise the strongest comes out, or the last."""
    while _state.noted:
        number = min(_state.noted)  # as Python does
        handler, frame = _state.noted.pop(number)
        try:
            handler(number, frame)
        except Exception:
            while _state.noted:
                _deliver()
            raise
        except BaseException:
            _state.noted.clear()
            raise


_OURS = frozenset(
    function.__code__
    for function in (
        Front.__call__,
        _Allowed.__enter__,
        _Allowed.__exit__,
        _deliver,
    )
)
"""Where a signal is noted even though it may strike."""


def _look() -> None:
    """Put a `Front` before each handler that has none: the first time, or because another was installed since."""
    for number in _SIGNALS:
        there = getsignal(number)
        if type(there) is not Front and callable(there) and there is not signal.default_int_handler:
            signal.signal(number, Front(there))


def _forget_after_fork() -> None:
    _state.deferring = False
    _state.noted = {}


os.register_at_fork(after_in_child=_forget_after_fork)
