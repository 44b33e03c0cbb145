"""Raising an exception in a greenlet of gevent's, and in no other.

Under ``-P gevent`` all bodies run in one thread: a signal, or an asynchronous exception for that thread, would hit
whichever of them happens to run. gevent's hub can raise in a certain one, while that waits for something; so a
greenlet that computes is told when it next yields.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["Throw", "thrower"]

Throw: TypeAlias = Callable[[Callable[[], BaseException | None]], None]


def thrower() -> Throw | None:
    """How any thread or greenlet can raise in the greenlet that calls this; None where gevent does not run it.

    What it returns takes a function that is called by the hub, right before, and gives the exception; None: nothing
    is to be raised any more.
    """
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return None
    gevent: Any = sys.modules["gevent"]
    body, loop = gevent.getcurrent(), gevent.get_hub().loop

    def throw(what: Callable[[], BaseException | None]) -> None:
        def in_hub() -> None:
            error = what()
            if error is not None:
                body.throw(error)

        loop.run_callback_threadsafe(in_hub)

    return throw
