"""Saying that etcd is away to those who wait for their tasks: what becomes of these, and what to set."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from celery_etcd_lock.exceptions import EtcdRejected, NoSpace
from celery_etcd_lock.tasks.spell import Spell

if TYPE_CHECKING:
    from celery_etcd_lock.settings import Settings

__all__ = ["Outage"]

logger = logging.getLogger("celery_etcd_lock")

_CONSEQUENCE = {
    "retry": "put back and not run",
    "fail": "failed and not run",
    "run": "run without a lock",
    "observe": 'run, as every task is under etcd_lock_enabled="observe"',
}
_FROM_NOW_ON = "until etcd {answers} each fares as its on_unavailable says"
_OBSERVED = "with etcd_lock_enabled=True each would fare as its on_unavailable says"

_RESPITE = 30.0
"""Seconds, for those that only observe."""


class Outage:
    """Counts the tasks that could not get a lock because etcd did not answer, and speaks of it now and then."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._spell = Spell(_RESPITE, clock)

    def may_try(self) -> bool:
        """Whether one whose locks only observe is to ask etcd."""
        return self._spell.may_try()

    def affects(self, task: str, error: BaseException, consequence: str) -> None:
        """`task` could not be locked because of `error`; `consequence` is its ``on_unavailable``."""
        word = self._spell.fails()
        if word is None:
            return
        where = ", ".join(self._settings.endpoints)
        refused = isinstance(error, EtcdRejected | NoSpace)
        if not word.first:
            what = f"etcd still refuses ({error})" if refused else f"still no etcd at {where}"
            logger.error(
                "etcd_lock.unavailable: %s, for %.0f s; %d singleton tasks met with it so far",
                what, word.lasted, word.met,
            )  # fmt: skip
            return
        observed = consequence == "observe"
        if refused:
            but = "" if observed or isinstance(error, NoSpace) else ", but none runs without its lock"
            logger.error(
                "etcd_lock.unavailable: the etcd at %s refuses: %s\n"
                "  1 singleton task (%s) is %s; %s%s.",
                where, error, task, _CONSEQUENCE[consequence],
                _OBSERVED if observed else _FROM_NOW_ON.format(answers="serves,"), but,
            )  # fmt: skip
            return
        default = " (the default: etcd_lock_endpoints is not set)" if self._settings.default_endpoints else ""
        logger.error(
            "etcd_lock.unavailable: no etcd at %s%s: %s\n"
            "  1 singleton task (%s) is %s; %s.\n"
            "  Set etcd_lock_endpoints, or the environment variable CELERY_ETCD_LOCK_ENDPOINTS, to where your etcd is.",
            where, default, error, task, _CONSEQUENCE[consequence],
            _OBSERVED if observed else _FROM_NOW_ON.format(answers="answers"),
        )  # fmt: skip

    def over(self) -> None:
        """A lock was taken, or refused by its holder: etcd answers."""
        if word := self._spell.over():
            what = "etcd_lock.available: etcd is back after %.0f s; %d singleton tasks met with it"
            logger.warning(what, word.lasted, word.met)
