"""`SingletonTask`, the base class, and `singleton_task`, the decorator that makes tasks of it.

The hook is ``__call__``: the worker calls it in every pool, in eager mode too, inside its own handling of results
and around autoretry. A subclass or a sibling base may have a ``__call__`` of its own. It runs inside the lock, even
where it calls ``self.run`` and never ours, as Flask's documentation has it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from celery import Task
from celery.utils import uuid

from celery_etcd_lock import events, logs
from celery_etcd_lock.exceptions import ConfigError, LockContended
from celery_etcd_lock.locks.queue import EXCLUSIVE, Mode
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks import discarded, options, publish
from celery_etcd_lock.tasks.conflict import Conflict
from celery_etcd_lock.tasks.current import TaskLock, Unlocked, enter, lock_of, set_lock
from celery_etcd_lock.tasks.keys import KeyRule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from celery import Celery
    from celery.result import AsyncResult, EagerResult

__all__ = ["SingletonTask"]

_GUARDS = "_guards_the_body"
_INSIDE = "_etcd_lock_inside"
_NOT_PLAIN = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


class SingletonTask(Task):  # type: ignore[misc,type-arg,unused-ignore]
    """A task whose body runs under an etcd lock, made from its name and arguments.

    Options, as class attributes or to ``@app.task(base=SingletonTask, …)``:

    ``unique_on``
        the parameter, or list of parameters, that make two calls the same. Default: all.
    ``lock_key``
        instead: a format string, a constant, or a callable with the task's own parameters.
    ``lock_mode``
        ``"exclusive"`` (default), or ``"shared"``: beside other shared ones, never beside an exclusive.
    ``lock_limit``
        instead: at most so many at once, of those that take the same lock.
    ``on_conflict``
        what to do when somebody else holds the lock: `Conflict` or its name.
    ``on_lost``
        when it is lost while the body runs: ``"abort"``, ``"retry"``, ``"warn"``.
    ``on_unavailable``
        when etcd does not answer: ``"retry"``, ``"fail"``, ``"run"``.
    ``unique_queued``
        also one in the queue: ``"until_start"`` of the run, or ``"until_end"``.
    ``on_duplicate``
        what `delay` does then: ``"return"`` the existing result (default), or ``"raise"``.
    ``lock_at_least_for``
        seconds for which the lock stays taken after the start, though the body has ended.
    ``lock_at_most_for``
        seconds after which a holder that hangs loses the lock.

    What is not set comes from ``etcd_lock_on_…`` on the app's configuration. `ConfigError` for anything that
    cannot be meant, when the task is made. The ``on_…`` and ``lock_at_…`` options can be given for one call, too:
    ``apply_async(…, on_conflict="skip")``, ``.set(on_conflict="skip")``.
    """

    abstract = True

    unique_on: str | Sequence[str] | None = None
    lock_key: str | Callable[..., object] | None = None
    lock_mode: str | None = None
    lock_limit: int | None = None
    on_conflict: Conflict | str | None = None
    on_lost: str | None = None
    on_unavailable: str | None = None
    unique_queued: str | None = None
    on_duplicate: str | None = None
    lock_at_least_for: float | None = None
    lock_at_most_for: float | None = None

    _key_rule: ClassVar[KeyRule | None] = None
    _mode: ClassVar[Mode] = EXCLUSIVE
    _foreign: ClassVar[frozenset[str]] = frozenset()
    """Options of another package's, which a base class translates."""

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
        dump = getattr(self, "_dump_pydantic_arguments", None)  # from Celery 5.7 on, of tasks made with pydantic=True
        if dump is not None:
            args, kwargs = dump(tuple(args), kwargs or {})  # what the worker gets
        return self._key_rule.lock_name(
            settings.namespace, tuple(args), kwargs or {}, hide_arguments=settings.hide_arguments
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        call = next(vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base))
        if not hasattr(call, _GUARDS):
            cls.__call__ = _guarding(call)  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request: Any = self.request
        if request.__dict__.pop(_INSIDE, False):  # called by a ``__call__`` that has been put inside the lock
            return self._call_body(request, args, kwargs)
        if request.called_directly or not enter(request):
            # A function call; or the body calls its own task, and inherits the request.
            return super().__call__(*args, **kwargs)
        return self._call_locked(request, lambda: self._call_body(request, args, kwargs), args, kwargs)

    setattr(__call__, _GUARDS, True)

    def _call_locked(self, request: Any, body: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        settings = Settings.from_app(self.app)
        if settings.enabled is False or (request.is_eager and not settings.eager) or self.name.startswith("celery."):
            set_lock(request, Unlocked())
            return body()
        from celery_etcd_lock.tasks.guard import run_alone  # and all that a lock takes: who publishes takes none

        return run_alone(self, request, args, kwargs, body, observes=settings.enabled == "observe")

    def _queued_ttl(self) -> float:
        """Seconds for which a mark stands that says that a message of this task is queued, from its eta on."""
        return Settings.from_app(self.app).queued_ttl

    def _call_body(self, request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Any = super().__call__
        if call.__func__ is not Task.__call__:
            return call(*args, **kwargs)
        # Task.__call__ would push a request of its own over the one that runs; the worker avoids it the same way.
        request._protected = 1
        return self.run(*args, **kwargs)

    # -- published

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
        """Send the task, as Celery does; it takes options for this call, see the class.

        `ConfigError` if they cannot be meant.
        """
        if not (producer is None and link is None and link_error is None and shadow is None):  # as `delay` leaves them
            given = {"producer": producer, "link": link, "link_error": link_error, "shadow": shadow}
            options |= {name: value for name, value in given.items() if value is not None}
        return publish.send(self, super().apply_async, args, kwargs, task_id or uuid(), options)

    def apply(  # type: ignore[override]
        self,
        args: Any = None,
        kwargs: Any = None,
        link: Any = None,
        link_error: Any = None,
        task_id: str | None = None,
        **options: Any,
    ) -> EagerResult[Any]:
        """Run the task here and now, as Celery does; it takes options for this call, see the class."""
        task_id = task_id or uuid()
        options = publish.for_this_call(self, task_id, options)
        return super().apply(args, kwargs, link=link, link_error=link_error, task_id=task_id, **options)

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
        for wrong, instead in options.near_misses(set(_options_set(cls)) - cls._foreign):
            warnings.warn(
                f"task {name}: {wrong} is no option of a singleton task and does nothing: write {instead}",
                stacklevel=2,
            )
        if any(kind(cls.run) for kind in _NOT_PLAIN):
            raise ConfigError(
                f"task {name}: its function is a coroutine or a generator, whose body Celery does not run: "
                "write a plain function"
            )
        try:
            cls._mode = options.check(cls)
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


def _guarding(call: Any) -> Any:
    """A ``__call__`` that runs `call`, which stands in front of ours, inside the lock."""

    @functools.wraps(call)
    def guarded(self: SingletonTask, *args: Any, **kwargs: Any) -> Any:
        theirs = call.__get__(self, type(self))
        request: Any = self.request
        if request.called_directly or not enter(request):
            return theirs(*args, **kwargs)

        def body() -> Any:
            request.__dict__[_INSIDE] = True
            try:
                return theirs(*args, **kwargs)
            finally:
                request.__dict__.pop(_INSIDE, None)

        return self._call_locked(request, body, args, kwargs)

    setattr(guarded, _GUARDS, True)
    return guarded


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


# What listens, for everybody who has such tasks, and for beats, which import this as well.
logs.connect()
events.connect()
discarded.connect()
