"""Saying that marks cannot be put, to who publishes with `unique_queued`, and sparing them an etcd that has failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from celery_etcd_lock.tasks.spell import Spell

__all__ = ["Respite"]

logger = logging.getLogger("celery_etcd_lock")

_LASTS = 5.0
"""Seconds."""


class Respite:
    """One for each process and app; its threads share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._spell = Spell(_LASTS, clock)

    def may_try(self) -> bool:
        """Whether one who publishes is to ask etcd."""
        return self._spell.may_try()

    def begins(self, error: BaseException) -> None:
        """etcd has failed somebody, by `error`."""
        word = self._spell.fails()
        if word is None:
            return
        if word.first:
            logger.warning(
                "etcd_lock.unmarked: tasks with unique_queued are published without their marks, duplicates and all, "
                "until etcd serves again: %s",
                error,
            )
        else:
            logger.warning(
                "etcd_lock.unmarked: still, for %.0f s; %d tasks with unique_queued met with it so far: %s",
                word.lasted, word.met, error,
            )  # fmt: skip

    def over(self) -> None:
        """etcd has served somebody."""
        if word := self._spell.over():
            what = "etcd_lock.marked_again: etcd is back after %.0f s; %d tasks with unique_queued met with it"
            logger.warning(what, word.lasted, word.met)
