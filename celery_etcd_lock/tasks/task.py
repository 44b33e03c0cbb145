"""`SingletonTask`, the base class, and `singleton_task`, the decorator that makes tasks of it.

The hook is ``__call__``: the worker calls it in every pool, in eager mode too, inside its own handling of results
and around autoretry. A subclass or a sibling base may have a ``__call__`` of its own; it runs inside the lock.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from celery import Task

from celery_etcd_lock.exceptions import ConfigError, LockContended
from celery_etcd_lock.locks.queue import EXCLUSIVE, SHARED, Mode, slot_of
from celery_etcd_lock.settings import ON_LOST, ON_UNAVAILABLE, Settings
from celery_etcd_lock.tasks.conflict import Coalesce, Conflict, nearest
from celery_etcd_lock.tasks.current import TaskLock, Unlocked, enter, lock_of, set_lock
from celery_etcd_lock.tasks.guard import run_alone
from celery_etcd_lock.tasks.keys import KeyRule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from celery import Celery

__all__ = ["SingletonTask"]

logger = logging.getLogger("celery_etcd_lock")

OPTIONS = ("unique_on", "lock_key", "lock_mode", "lock_limit", "on_conflict", "on_lost", "on_unavailable")
_LATER = frozenset({"unique_queued", "on_duplicate", "lock_at_least_for", "lock_at_most_for"})
_MODES = {"exclusive": EXCLUSIVE, "shared": SHARED}
_CELERYS = frozenset(dir(Task))
_NOT_PLAIN = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
_INSTEAD = {
    "lock_expiry": "etcd_lock_ttl on the app: one lease serves the whole process, and is renewed while the body runs",
    "lock_ttl": "etcd_lock_ttl on the app: one lease serves the whole process, and is renewed while the body runs",
}


class SingletonTask(Task):  # type: ignore[misc,type-arg,unused-ignore]
    """A task whose body runs under an etcd lock, made from its name and arguments.

    Options, as class attributes or to ``@app.task(base=SingletonTask, …)``:

    ``unique_on``       the parameter, or list of parameters, that make two calls the same. Default: all.
    ``lock_key``        instead: a format string, a constant, or a callable with the task's own parameters.
    ``lock_mode``       ``"exclusive"`` (default), or ``"shared"``: beside other shared ones, never beside an exclusive.
    ``lock_limit``      instead: at most so many at once, of those that take the same lock.
    ``on_conflict``     what to do when somebody else holds the lock: `Conflict` or its name.
    ``on_lost``         when it is lost while the body runs: ``"abort"``, ``"retry"``, ``"warn"``.
    ``on_unavailable``  when etcd does not answer: ``"retry"``, ``"fail"``, ``"run"``.

    What is not set comes from ``etcd_lock_on_…`` on the app's configuration. `ConfigError` for anything that
    cannot be meant, when the task is made.
    """

    abstract = True

    unique_on: str | Sequence[str] | None = None
    lock_key: str | Callable[..., object] | None = None
    lock_mode: str | None = None
    lock_limit: int | None = None
    on_conflict: Conflict | str | None = None
    on_lost: str | None = None
    on_unavailable: str | None = None

    _key_rule: ClassVar[KeyRule | None] = None
    _mode: ClassVar[Mode] = EXCLUSIVE

    @property
    def lock(self) -> TaskLock:
        """The lock of the running request: never None, see `TaskLock`."""
        return lock_of(self.request)

    def lock_name(self, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> str:
        """The name in etcd of the lock that a call with these arguments takes: what ``etcdctl lock`` wants.

        `UnstableKeyError` if it cannot be made from them.
        """
        settings = Settings.from_app(self.app)
        assert self._key_rule is not None
        return self._key_rule.lock_name(
            settings.namespace, tuple(args), kwargs or {}, hide_arguments=settings.hide_arguments
        )

    def conflict_policy(self) -> Conflict:
        """What this task does when its lock is held."""
        return Conflict.parse(self.on_conflict or Settings.from_app(self.app).on_conflict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        if request.called_directly or not enter(request):
            # A function call; or the body calls its own task, and inherits the request.
            return super().__call__(*args, **kwargs)
        settings = Settings.from_app(self.app)
        if settings.enabled is False or (request.is_eager and not settings.eager) or self.name.startswith("celery."):
            set_lock(request, Unlocked())
            return self._call_body(args, kwargs)
        return run_alone(self, request, args, kwargs, lambda: self._call_body(args, kwargs))

    def _call_body(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Any = super().__call__
        if call.__func__ is not Task.__call__:
            return call(*args, **kwargs)
        # Task.__call__ would push a request of its own over the one that runs; the worker avoids it the same way.
        request: Any = self.request
        request._protected = 1
        return self.run(*args, **kwargs)

    # -- made

    @classmethod
    def bind(cls, app: Celery) -> Any:
        """Celery makes the task ready for `app`: the moment to check its options."""
        _adopt_task_class(cls, app)
        bound = super().bind(app)
        if cls.run is not Task.run:  # no base class
            name = cls.name or app.gen_task_name(str(cls.__name__), cls.__module__)
            if not name.startswith("celery."):
                cls._check(name)
        return bound

    @classmethod
    def _check(cls, name: str) -> None:
        """Make the rule for the keys and the mode, or say what is wrong."""
        for option in _LATER & set(_options_set(cls)):
            raise ConfigError(f"task {name}: {option} is not in this version of celery-etcd-lock")
        _warn_of_near_misses(cls, name)
        if any(kind(cls.run) for kind in _NOT_PLAIN):
            raise ConfigError(
                f"task {name}: its function is a coroutine or a generator, whose body Celery does not run: "
                "write a plain function"
            )
        try:
            _check_choices(cls)
            cls._mode = _mode_of(cls)
            if cls.on_conflict is not None:
                cls.on_conflict = Conflict.parse(cls.on_conflict)
                if isinstance(cls.on_conflict, Coalesce):
                    raise ConfigError("on_conflict='coalesce' is not in this version of celery-etcd-lock")  # noqa: TRY301
        except ConfigError as error:
            raise ConfigError(f"task {name}: {error}") from None
        bound = not isinstance(inspect.getattr_static(cls, "run"), staticmethod)
        cls._key_rule = KeyRule.make(
            name, inspect.signature(cls.run), unique_on=cls.unique_on, lock_key=cls.lock_key, bound=bound
        )
        own: Any = cls.throws  # Celery takes a bare class, too
        throws = own if isinstance(own, (tuple, list)) else (own,)
        if LockContended not in throws:
            cls.throws = (*throws, LockContended)

    # -- not with these

    def map(self, it: Any) -> NoReturn:
        self._not_alone("map")

    def starmap(self, it: Any) -> NoReturn:
        self._not_alone("starmap")

    def chunks(self, it: Any, n: int) -> NoReturn:
        self._not_alone("chunks")

    def _not_alone(self, method: str) -> NoReturn:
        raise TypeError(
            f"{self.name}.{method}() would call the function directly in one other task, without its lock: "
            f"write group({self.name.rpartition('.')[2]}.s(…) for … in …) instead"
        )


def _check_choices(cls: type[SingletonTask]) -> None:
    choices = {"on_lost": ON_LOST, "on_unavailable": ON_UNAVAILABLE, "lock_mode": tuple(_MODES)}
    for option, allowed in choices.items():
        value = getattr(cls, option)
        if value is not None and value not in allowed:
            near = nearest(str(value), allowed)
            hint = f" (perhaps {near!r}?)" if near else ""
            raise ConfigError(f"{option}={value!r}: write one of {', '.join(map(repr, allowed))}{hint}")


def _mode_of(cls: type[SingletonTask]) -> Mode:
    if cls.lock_limit is None:
        return _MODES[cls.lock_mode or "exclusive"]
    if cls.lock_mode is not None:
        raise ConfigError("lock_mode and lock_limit exclude each other: a limit is a mode of its own, write only one")
    try:
        return slot_of(cls.lock_limit)
    except ConfigError as error:
        raise ConfigError(f"lock_limit: {error}") from None


def _adopt_task_class(cls: type[SingletonTask], app: Celery) -> None:
    """Let ``@app.task(base=SingletonTask)`` keep what the app's own task class gives, Django's for one.

    Celery makes such a task's class from the function with SingletonTask as its only base. For a class that
    somebody wrote, its bases are what they wrote.
    """
    own = app.Task
    if cls.__bases__ == (SingletonTask,) and "__header__" in cls.__dict__ and not issubclass(SingletonTask, own):
        if issubclass(own, SingletonTask):
            cls.__bases__ = (own,)
        else:
            cls.__bases__ = (SingletonTask, own)


def _options_set(cls: type[SingletonTask]) -> list[str]:
    """The attributes that the task's author gave, as options or in classes of their own."""
    names: list[str] = []
    for base in cls.__mro__:
        if base in (SingletonTask, Task):
            break
        names += [name for name in vars(base) if not name.startswith("_")]
    return names


def _warn_of_near_misses(cls: type[SingletonTask], task: str) -> None:
    for name in _options_set(cls):
        if name in OPTIONS or name in _CELERYS:
            continue
        instead = _INSTEAD.get(name) or nearest(name, OPTIONS, cutoff=0.8)
        if instead:
            warnings.warn(
                f"task {task}: {name} is no option of a singleton task and does nothing: write {instead}",
                stacklevel=2,
            )
