"""What the two bases share: foreign options become ours when the task is made, and the task says so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from celery_etcd_lock.compat.translation import Translation
from celery_etcd_lock.etcd.api import Delete
from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.marks import Mark
from celery_etcd_lock.tasks.runtime import Runtime
from celery_etcd_lock.tasks.task import SingletonTask

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["CompatWarning", "ForeignTask", "delete_marks"]


class CompatWarning(FutureWarning):
    """A task is written for celery-singleton or celery-once, and the message says how to write it for this package.

    A `FutureWarning`, for who must read it is who wrote the project: Python hides a `DeprecationWarning` from them,
    unless it comes from ``__main__``, where no project's tasks are. A class of its own, so that it can be filtered.
    """


class ForeignTask(SingletonTask):
    """A task whose options are another package's."""

    abstract = True

    _translated: ClassVar[frozenset[str]] = frozenset()
    """Options of ours that were set on this very class by what it says in the other package's words."""
    _calls: ClassVar[Mapping[str, str]] = {}
    """Methods that the other package calls and we do not, each with what to write instead."""
    _unused: ClassVar[Mapping[str, str]] = {}
    """Settings on the app that mean nothing here, each with why."""

    @classmethod
    def _translation(cls, app: Celery) -> Translation:
        """What the options of this task mean. `ConfigError` if they cannot be meant."""
        raise NotImplementedError

    @classmethod
    def _effective(cls, native: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the base sets, of what the native line would say."""
        return native

    @classmethod
    def _settings_given(cls, app: Celery) -> Iterator[str]:
        """Those of `_unused` that are set on `app`."""
        return (name for name in cls._unused if app.conf.get(name) is not None)

    @classmethod
    def _check(cls, name: str) -> None:
        # Called for each time that Celery binds the task, which is more than once.
        if "_translated" not in vars(cls):
            app: Any = vars(cls)["_app"]
            cls._refuse_overrides(name)
            try:
                translation = cls._translation(app)
            except ConfigError as error:
                raise ConfigError(f"task {name}: {error}") from None
            native = {option: value for option, value in translation.native.items() if not cls._gives(option)}
            translation = Translation(native, translation.instead, translation.notes)
            for option, value in cls._effective(native).items():
                setattr(cls, option, value)
            if cls.on_conflict is None:
                cls.on_conflict = "retry"
            cls._translated = frozenset(native) | {"on_conflict"}
            cls._say(name, translation)
            cls._say_unused(app)
        super()._check(name)

    @classmethod
    def _own(cls) -> Iterator[type[Any]]:
        """This class and its bases, as far as they are the project's."""
        for each in cls.__mro__:
            if each in (ForeignTask, SingletonTask) or each.__module__.startswith("celery_etcd_lock.compat."):
                return
            yield each

    @classmethod
    def _gives(cls, option: str) -> bool:
        """Whether the task's author has set this option of ours, and not this module."""
        if option in cls._foreign:
            return False
        return any(
            option in vars(each) and option not in vars(each).get("_translated", ()) and vars(each)[option] is not None
            for each in cls._own()
        )

    @classmethod
    def _refuse_overrides(cls, name: str) -> None:
        for each in cls._own():
            for method, instead in cls._calls.items():
                if callable(vars(each).get(method)) or isinstance(vars(each).get(method), property):
                    raise ConfigError(
                        f"task {name}: {each.__name__}.{method} overrides what is not called here: {instead} instead"
                    )

    @classmethod
    def _say(cls, name: str, translation: Translation) -> None:
        parent = cls.__bases__[0]
        base = None if parent.__module__.startswith("celery_etcd_lock.compat.") else parent.__name__
        is_class = "__header__" not in vars(cls)
        line = translation.line(str(cls.__name__), is_class=is_class, base=base)
        foreign, *options = translation.instead
        known = foreign.partition("=")[2]
        if base:
            foreign = f"base={base}"
            line += f", where {base} has SingletonTask in place of {known},"
        if is_class:
            foreign = f"{base or known} as its base"
        text = f"task {name}: write {line} instead of {', '.join([foreign, *options])}; other options stay as they are"
        warnings.warn(". ".join([text, *translation.notes]) + ".", CompatWarning, stacklevel=2)

    @classmethod
    def _say_unused(cls, app: Celery) -> None:
        said = _said.setdefault(app, set())
        given = [name for name in cls._settings_given(app) if name not in said]
        said.update(given)
        if given:
            whys = dict.fromkeys(cls._unused[name] for name in given)
            names = ", ".join(given)
            app_name = app.main or "without a name"
            warnings.warn(
                f"app {app_name}: not used, and to be left out: {names}. {'. '.join(whys)}.",
                CompatWarning,
                stacklevel=2,
            )

    def _mark_key(self, args: Any, kwargs: Any) -> str:
        """Where in etcd it says that a message with these arguments is queued."""
        return Mark.queued(self.lock_name(tuple(args or ()), dict(kwargs or {})), self.name, "").key


_said: WeakKeyDictionary[Celery, set[str]] = WeakKeyDictionary()


def delete_marks(app: Celery, key: str, range_end: str | None = None) -> None:
    """Let others into the queue, whoever's the marks are: no run depends on one.

    `EtcdLockError` where etcd refuses or does not answer.
    """
    if Settings.from_app(app).enabled is not False:
        Runtime.of(app).transport().delete(Delete(key, range_end))
