"""In place of the schedule file of Celery's `PersistentScheduler`: what is in there, etcd has for all beats.

The file takes one beat: several in one directory lock each other out of it, and then delete it as damaged. So none is
opened for writing. When etcd knows nothing yet of the schedule, what the beat that was there before left in the file is
read, so that a daily job keeps its time.
"""

from __future__ import annotations

import logging
import shelve
from contextlib import closing
from typing import Any

__all__ = ["InMemory"]

logger = logging.getLogger("celery_etcd_lock")


class _Store(dict[str, Any]):
    def sync(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class InMemory:
    """Stands where `PersistentScheduler` has the module `shelve`. `adopt`: begin with what is in the file."""

    def __init__(self, *, adopt: bool) -> None:
        self._adopt = adopt

    def open(self, filename: str, *, writeback: bool = False) -> _Store:
        """A store that begins empty, or with what `filename` holds. Never raises."""
        store = _Store()
        if not self._adopt:
            return store
        try:
            with closing(shelve.open(filename, flag="r")) as file:  # noqa: S301 Celery's own, in its own place
                store.update(file)
        except Exception as error:  # noqa: BLE001 there is none, it is damaged, or a beat has it open
            logger.debug("etcd_lock.no_schedule_file: %s: %s", filename, error)
            return _Store()
        if store:
            logger.info("etcd_lock.schedule_file_read: beat goes on from %s, for the first and last time", filename)
        return store
