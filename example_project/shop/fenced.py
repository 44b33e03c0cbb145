"""Writes that only the latest holder of a lock can make. Copy this file: it needs Django, and nothing of this shop.

A lock with a lease keeps two tasks apart, but not a process that was frozen in the middle of its work and goes on after
its lease has ended. The row can: it keeps the largest fencing token that has written it, and refuses a smaller one.
"""

from __future__ import annotations

from typing import Any

from django.db import models, transaction

from celery_etcd_lock import LockLost


class FencedQuerySet(models.QuerySet):
    """`fenced(lock)` is the same rows, as the holder of `lock` (``self.lock`` in a task) may `update` them.

    It writes all of them, or, if a later holder has written one, none, and raises `LockLost`; and it returns how many
    it has written, as ever. ``update()`` without values only claims the rows: do that *before* you read what the new
    values are worked out from. `save`, `create` and `delete` are not fenced.
    """

    _lock: Any = None

    def fenced(self, lock: Any) -> FencedQuerySet:
        rows: FencedQuerySet = self._chain()
        rows._lock = lock
        return rows

    def update(self, **values: Any) -> int:
        self._for_write = True
        if self._lock is None:
            return super().update(**values)  # type: ignore[no-any-return]
        self._lock.assert_held()
        token, rows = self._lock.fencing_token, self.using(self.db).fenced(None)
        with transaction.atomic(using=self.db):
            written: int = rows.filter(fencing_token__lte=token).update(**values, fencing_token=token)
            if rows.filter(fencing_token__gt=token).exists():
                raise LockLost(f"{self._lock.name}: a later holder has written there, so nothing is changed")
        return written

    update.alters_data = True  # type: ignore[attr-defined]  # for templates, as Django's own says

    def _clone(self) -> FencedQuerySet:
        clone: FencedQuerySet = super()._clone()
        clone._lock = self._lock
        return clone


class Fenced(models.Model):
    """A model whose rows remember the token of whoever wrote them last: 64 bits."""

    fencing_token = models.BigIntegerField(default=0, editable=False)

    objects = FencedQuerySet.as_manager()

    class Meta:
        abstract = True
