"""The base of celery-singleton: one task of its arguments is queued or runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from celery_etcd_lock import exceptions
from celery_etcd_lock.compat.duplicates import DuplicateTaskError
from celery_etcd_lock.compat.foreign import CompatWarning, ForeignTask, delete_marks
from celery_etcd_lock.compat.translation import Translation, from_singleton, seconds
from celery_etcd_lock.etcd.api import prefix_end
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.keys import lock_name
from celery_etcd_lock.tasks.marks import Mark

if TYPE_CHECKING:
    from celery import Celery
    from celery.result import AsyncResult

__all__ = ["Singleton", "clear_locks"]

_WHERE = "The locks are in etcd, at etcd_lock_endpoints, under etcd_lock_namespace"
_ENCODER = "A UUID, a date, an Enum, a dataclass have a form of their own in a lock's key, lock_key= gives any other"
_INSTEAD = "write a lock_key=, a function of the task's own parameters"
_BY_ITSELF = "the mark is put and deleted by itself"


class Singleton(ForeignTask):
    """Reads celery-singleton's options.

    ``unique_on``           the parameter or parameters that make two calls the same; ``[]``: one for the whole task.
    ``raise_on_duplicate``  `DuplicateTaskError` in place of the existing result.
    ``lock_expiry``         seconds for which a message that is lost keeps others out of the queue, at least.

    What is not set comes from ``singleton_raise_on_duplicate`` and ``singleton_lock_expiry`` on the app.
    """

    abstract = True
    raise_on_duplicate: bool | None = None
    lock_expiry: float | timedelta | None = None

    _foreign: ClassVar[frozenset[str]] = frozenset({"unique_on", "raise_on_duplicate", "lock_expiry"})
    _calls: ClassVar[Mapping[str, str]] = {
        "generate_lock": _INSTEAD,
        "aquire_lock": _BY_ITSELF,
        "get_existing_task_id": _BY_ITSELF,
        "lock_and_run": _BY_ITSELF,
        "unlock": _BY_ITSELF,
        "on_duplicate": "set raise_on_duplicate=True and catch DuplicateTaskError where you publish",
    }
    _unused: ClassVar[Mapping[str, str]] = {
        "singleton_backend_url": _WHERE,
        "singleton_backend_class": _WHERE,
        "singleton_backend_kwargs": _WHERE,
        "singleton_key_prefix": _WHERE,
        "singleton_json_encoder_class": _ENCODER,
    }

    def apply_async(self, *args: Any, **options: Any) -> AsyncResult[Any]:
        """Send the task, unless the same is queued or runs: then its result. `DuplicateTaskError` if so wished."""
        try:
            return super().apply_async(*args, **options)
        except exceptions.DuplicateTaskError as duplicate:
            if duplicate.args[0] != self.name:  # of another task, which an eager body has published
                raise
            raise DuplicateTaskError(str(duplicate), duplicate.task_id) from None

    def release_lock(self, task_args: Any = None, task_kwargs: Any = None) -> None:
        """Let the same task into the queue though one may be there. It will not run beside that one."""
        delete_marks(self.app, self._mark_key(task_args, task_kwargs))

    @classmethod
    def _translation(cls, app: Celery) -> Translation:
        options = {name: getattr(cls, name) for name in ("unique_on", "raise_on_duplicate", "lock_expiry")}
        return from_singleton(options, app.conf)

    def _queued_ttl(self) -> float:
        expiry: Any = self.lock_expiry
        if expiry is None:
            expiry = self.app.conf.get("singleton_lock_expiry")
        return super()._queued_ttl() if expiry is None else seconds("lock_expiry", expiry)


def clear_locks(app: Celery) -> None:
    """Forget of all messages of `app` that they are queued, those of other workers and of native tasks too.

    Bodies that run keep their locks: what is published again waits for them. `EtcdLockError` where etcd refuses or
    does not answer.
    """
    warnings.warn(
        "clear_locks() is not needed: a mark goes with its message, with the process that ran it, and after "
        "etcd_lock_queued_ttl with a message that was lost. Leave it out: while another worker still has messages in "
        "the queue it lets duplicates of them in.",
        CompatWarning,
        stacklevel=2,
    )
    prefix = Mark.queued(lock_name(Settings.from_app(app).namespace, "-", "-"), "-", "").key.removesuffix("-/-")
    delete_marks(app, prefix, prefix_end(prefix))
