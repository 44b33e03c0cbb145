"""Saying that etcd is away, or refuses: once when it begins, once a minute, and once when it is over."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from celery_etcd_lock.exceptions import EtcdLockError, EtcdRejected, NoSpace
from celery_etcd_lock.tasks.spell import Spell

if TYPE_CHECKING:
    from celery_etcd_lock.settings import Settings

__all__ = ["Outage"]

logger = logging.getLogger("celery_etcd_lock")

_RESPITE = 1.0
"""Seconds between two questions to an etcd that does not answer."""


class Outage:
    """Of one beat; the thread in which it ticks and that in which it stands for election share it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._spell = Spell(_RESPITE)
        self.lasts = False
        """Whether etcd failed when it was last asked."""
        self.full = False
        """Whether it was because it has no room: then it answers what is asked, and refuses what is to be written."""

    def fails(self, error: EtcdLockError) -> None:
        """etcd did not do what was asked, because of `error`."""
        self.lasts, self.full = True, isinstance(error, NoSpace)
        word = self._spell.fails()
        if word is None:
            return
        where = ", ".join(self._settings.endpoints)
        default = " (the default: etcd_lock_endpoints is not set)" if self._settings.default_endpoints else ""
        refused = isinstance(error, (EtcdRejected, NoSpace))
        what = f"the etcd at {where} refuses" if refused else f"no etcd at {where}{default}"
        if not word.first:
            logger.error("etcd_lock.beat_unavailable: still %s, for %.0f s: %s", what, word.lasted, error)
            return
        hint = "Until it lets us, it" if refused else "Until one answers, it"
        logger.error(
            "etcd_lock.beat_unavailable: %s: %s\n"
            "  This beat (%s) sends nothing now. %s asks once a second, and then goes on by itself.%s",
            what, error, self._settings.beat_name, hint, "" if refused else _SET,
        )  # fmt: skip

    def may_try(self) -> bool:
        """Whether it is time to ask again."""
        return self._spell.may_try()

    def over(self) -> None:
        """etcd has done what was asked."""
        self.lasts = self.full = False
        if word := self._spell.over():
            logger.warning("etcd_lock.beat_available: etcd is back after %.0f s", word.lasted)


_SET = "\n  Set etcd_lock_endpoints, or the environment variable CELERY_ETCD_LOCK_ENDPOINTS, to where your etcd is."
