"""The name that the processes of one worker share: their sessions in etcd stand under it.

The worker's main process makes it before it starts children. A forked child finds it in its memory. A spawned one
imports everything anew, and finds it in its environment, with the pid of who put it there: that is for the children of
that process alone, not for what a task's body starts.
"""

from __future__ import annotations

import os

__all__ = ["begin_worker", "instance"]

_VARIABLE = "CELERY_ETCD_LOCK_INSTANCE"


def _handed_on() -> str | None:
    parent, _, name = os.environ.get(_VARIABLE, "").partition(":")
    return name if name and parent == str(os.getppid()) else None


def _new() -> str:
    return os.urandom(4).hex()


_instance = _handed_on() or _new()


def instance() -> str:
    """The name of this worker, in this process and its children; of this process, where there is no worker."""
    return _instance


def begin_worker() -> None:
    """This is a worker's main process, about to start children: a new name, for it and for them."""
    global _instance  # noqa: PLW0603 children are forked from this very module
    _instance = _new()
    os.environ[_VARIABLE] = f"{os.getpid()}:{_instance}"
