"""What has to be done in etcd but must keep nobody waiting: by a thread of its own, again until etcd answers."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from celery_etcd_lock.etcd.api import Transport
from celery_etcd_lock.exceptions import EtcdLockError, EtcdUnavailable
from celery_etcd_lock.tasks.runtime import Runtime

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["later"]

logger = logging.getLogger("celery_etcd_lock")

_MOST = 10_000
"""Jobs that wait; what comes on top while etcd is away is not done, and a lease ends it."""

_PATIENCE = 60.0
"""Seconds for which a job is tried while etcd does not answer."""

_PAUSE = 1.0
"""Seconds between two attempts."""


def later(app: Celery, job: Callable[[Transport], object]) -> None:
    """Have `job` done soon, with a transport to the etcd of `app`; never blocks, never raises.

    It must be such that twice is as good as once.
    """
    with _changed:
        if len(_jobs) >= _MOST:
            return
        _jobs.append((app, job, time.monotonic() + _PATIENCE))
        if not _busy:
            _busy.add(os.getpid())
            threading.Thread(target=_work, name="etcd-lock-upkeep", daemon=True).start()


def _work() -> None:
    while True:
        with _changed:
            if not _jobs:
                _busy.clear()
                return
            app, job, until = _jobs[0]
        done = True
        try:
            job(Runtime.of(app).transport())
        except EtcdUnavailable as error:
            done = time.monotonic() >= until
            if done:
                logger.warning("etcd_lock.upkeep_given_up: %s", error)
        except EtcdLockError as error:
            logger.warning("etcd_lock.upkeep_failed: %s", error)
        except Exception:
            logger.exception("etcd_lock.upkeep_failed")
        if done:
            with _changed:
                _jobs.popleft()
        else:
            time.sleep(_PAUSE)


_changed = threading.Lock()
_jobs: deque[tuple[Celery, Callable[[Transport], object], float]] = deque()
_busy: set[int] = set()
"""Not empty while there is a thread."""


def _after_fork() -> None:
    global _changed, _jobs, _busy  # the parent's thread is not here, and its jobs are not ours
    _changed, _jobs, _busy = threading.Lock(), deque(), set()


os.register_at_fork(after_in_child=_after_fork)
