"""The base of celery-once: a second one is refused while one is queued, or runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

from celery import states
from celery.result import EagerResult

from celery_etcd_lock import exceptions
from celery_etcd_lock.compat.duplicates import AlreadyQueued
from celery_etcd_lock.compat.foreign import ForeignTask, delete_marks
from celery_etcd_lock.compat.translation import ONCE_TIMEOUT, Translation, from_once, once_settings, seconds
from celery_etcd_lock.etcd.api import Range
from celery_etcd_lock.exceptions import ConfigError, EtcdLockError
from celery_etcd_lock.tasks.queued import PATIENCE
from celery_etcd_lock.tasks.runtime import Runtime

if TYPE_CHECKING:
    from celery import Celery
    from celery.result import AsyncResult

__all__ = ["QueueOnce"]

_WHERE = (
    "The locks are in etcd, at etcd_lock_endpoints. Of ONCE only default_timeout in its settings counts, for as long "
    "as a task has QueueOnce as its base"
)
_BLOCKING = "A publisher does not wait for a lock: it is refused at once"

_for_this_call: ContextVar[Mapping[str, Any]] = ContextVar("celery_etcd_lock_once", default={})  # noqa: B039 never changed


class QueueOnce(ForeignTask):
    """Reads celery-once's options, ``once={…}``.

    ``keys``               the parameters that make two calls the same; ``[]``: one for the whole task.
    ``graceful``           a result that is ``REJECTED`` and has no id, in place of `AlreadyQueued`.
    ``unlock_before_run``  the next may be queued as soon as this one runs; it runs after it.
    ``timeout``            seconds for which a message that is lost keeps others out of the queue, at least. Not set:
                           ``default_timeout`` in the ``settings`` of ``ONCE`` on the app, else an hour.

    `graceful` and `timeout` may be given for one call, too: ``apply_async(once={"graceful": True})``.
    """

    abstract = True
    once: ClassVar[Mapping[str, Any]] = {"graceful": False, "unlock_before_run": False}

    _foreign: ClassVar[frozenset[str]] = frozenset({"once"})
    _calls: ClassVar[Mapping[str, str]] = {
        "get_key": "write a lock_key=, a function of the task's own parameters",
        "unlock_before_run": 'write once={"unlock_before_run": …}',
        "default_timeout": 'write once={"timeout": …}',
        "once_config": "set ONCE on the app",
        "once_backend": "the mark is put and deleted by itself",
    }
    _unused: ClassVar[Mapping[str, str]] = {
        'ONCE["backend"]': _WHERE,
        'ONCE["settings"]["url"]': _WHERE,
        'ONCE["settings"]["location"]': _WHERE,
        'ONCE["settings"]["blocking"]': _BLOCKING,
        'ONCE["settings"]["blocking_timeout"]': _BLOCKING,
    }

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        **options: Any,
    ) -> AsyncResult[Any]:
        """Send the task. `AlreadyQueued` while the same is queued or runs; a result that is REJECTED if `graceful`."""
        once = _checked(options.pop("once", None))
        token = _for_this_call.set(once)
        try:
            return super().apply_async(args, kwargs, task_id, producer, link, link_error, shadow, **options)
        except exceptions.DuplicateTaskError as duplicate:
            if duplicate.args[0] != self.name:  # of another task, which an eager body has published
                raise
            if once.get("graceful", self.once.get("graceful")):
                refused: Any = EagerResult(None, None, states.REJECTED)  # type: ignore[arg-type,unused-ignore]
                return refused  # type: ignore[no-any-return]
            left = self._seconds_left(self._mark_key(args, kwargs))
            raise AlreadyQueued(left, self.name, duplicate.task_id) from None
        finally:
            _for_this_call.reset(token)

    def apply(self, *args: Any, **options: Any) -> EagerResult[Any]:
        """Run the task here and now, as Celery does."""
        _checked(options.pop("once", None))
        return super().apply(*args, **options)

    def get_key(self, args: Any = None, kwargs: Any = None) -> str:
        """Where in etcd it says that the task with these arguments is queued: for ``once_backend.clear_lock``."""
        return self._mark_key(args, kwargs)

    @property
    def once_backend(self) -> _Backend:
        return _Backend(self.app)

    @classmethod
    def _translation(cls, app: Celery) -> Translation:
        return from_once(_checked(cls.once), app.conf)

    @classmethod
    def _effective(cls, native: Mapping[str, Any]) -> Mapping[str, Any]:
        # Even where it is graceful: what is returned then is not what `on_duplicate="return"` returns.
        return {**native, "on_duplicate": "raise"} if "on_duplicate" in native else native

    @classmethod
    def _settings_given(cls, app: Celery) -> Iterator[str]:
        settings = once_settings(app.conf)  # which sees to it that there is a dict
        given = {f'ONCE["settings"]["{name}"]' for name, value in settings.items() if value}
        given |= {f'ONCE["{name}"]' for name, value in (app.conf.get("ONCE") or {}).items() if value}
        return (name for name in cls._unused if name in given)

    def _queued_ttl(self) -> float:
        for said in (_for_this_call.get(), self.once):
            if "timeout" in said:
                timeout = said["timeout"]
                break
        else:
            timeout = once_settings(self.app.conf).get("default_timeout", ONCE_TIMEOUT)
        return super()._queued_ttl() if timeout is None else seconds("once: timeout", timeout)

    def _seconds_left(self, key: str) -> float:
        """Until the mark at `key` goes by itself; where etcd does not say, for as long as it may have been put."""
        try:
            transport = Runtime.of(self.app).transport()
            found = transport.range(Range(key), timeout=PATIENCE / 2).kvs
            if not found:
                return 0.0
            return max(0.0, float(transport.lease_time_to_live(found[0].lease, timeout=PATIENCE / 2).ttl))
        except EtcdLockError:
            return self._queued_ttl()


class _Backend:
    """As much of celery-once's as is called by hand."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def clear_lock(self, key: str) -> None:
        """Let the same task into the queue though one may be there; `key` is from ``get_key``."""
        delete_marks(self._app, key)


def _checked(once: Any) -> Mapping[str, Any]:
    """`once` as somebody wrote it. `ConfigError` if it is no dict."""
    if once is None:
        return {}
    if not isinstance(once, Mapping):
        raise ConfigError(f'once={once!r}: write a dict, as in once={{"graceful": True}}')
    if once.get("timeout") is not None:
        seconds("once: timeout", once["timeout"])
    return once
