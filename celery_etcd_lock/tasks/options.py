"""The options of a singleton task: which there are, what they may be, and what holds for one call. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from celery import Task

from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.locks.queue import EXCLUSIVE, SHARED, Mode, slot_of
from celery_etcd_lock.settings import ON_LOST, ON_UNAVAILABLE, Settings
from celery_etcd_lock.tasks.conflict import Conflict, nearest

if TYPE_CHECKING:
    from celery_etcd_lock.tasks.task import SingletonTask

__all__ = [
    "FOR_ONE_CALL",
    "OPTIONS",
    "Behaviour",
    "behaviour",
    "check",
    "for_one_call",
    "instead_for_one_call",
    "mode_name",
    "near_misses",
]

OPTIONS: Final = (
    "unique_on", "lock_key", "lock_mode", "lock_limit", "unique_queued", "on_duplicate", "on_conflict", "on_lost",
    "on_unavailable", "lock_at_least_for", "lock_at_most_for",
)  # fmt: skip
_MODES: Final = {"exclusive": EXCLUSIVE, "shared": SHARED}
_CELERYS: Final = frozenset(dir(Task)) | {name for name, _ in Task.from_config}  # these it sets on each task
_INSTEAD: Final = {
    "once": "unique_queued and on_duplicate, or base=celery_etcd_lock.compat.QueueOnce",
    "raise_on_duplicate": 'unique_queued="until_end", on_duplicate="raise", or base=celery_etcd_lock.compat.Singleton',
    "lock_expiry": "etcd_lock_ttl on the app: one lease serves the whole process, and is renewed while the body runs",
    "lock_ttl": "etcd_lock_ttl on the app: one lease serves the whole process, and is renewed while the body runs",
}


class Behaviour(NamedTuple):
    """What holds for one call: by its message, else by its task, else by the settings."""

    on_conflict: Conflict
    on_lost: str
    on_unavailable: str
    at_least_for: float
    """Seconds."""
    at_most_for: float | None
    """Seconds."""


def behaviour(task: SingletonTask, settings: Settings, for_call: Mapping[str, Any]) -> Behaviour:
    """What holds for a call whose message carries the options `for_call`. `ConfigError` if those cannot be meant."""
    on_conflict: Any = task.on_conflict
    on_lost, on_unavailable = task.on_lost, task.on_unavailable
    least, most = task.lock_at_least_for, task.lock_at_most_for
    if for_call:
        given = for_one_call(task, for_call)
        on_conflict = given.get("on_conflict", on_conflict)
        on_lost, on_unavailable = given.get("on_lost", on_lost), given.get("on_unavailable", on_unavailable)
        least, most = given.get("lock_at_least_for", least), given.get("lock_at_most_for", most)
    return Behaviour(
        settings.on_conflict if on_conflict is None else Conflict.parse(on_conflict),
        settings.on_lost if on_lost is None else on_lost,
        settings.on_unavailable if on_unavailable is None else on_unavailable,
        0 if least is None else least,
        most,
    )


def for_one_call(task: SingletonTask, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` for one call of `task`, as they travel: plain JSON. `ConfigError` if they cannot be meant."""
    checked: dict[str, Any] = {}
    for option, value in options.items():
        if option not in FOR_ONE_CALL:
            near = nearest(str(option), FOR_ONE_CALL)
            hint = f"did you mean {near!r}?" if near else f"they are {', '.join(FOR_ONE_CALL)}"
            if option in OPTIONS:
                hint = "it goes to the task itself"
            raise ConfigError(f"task {task.name}: {option!r} is no option for one call: {hint}")
        if value is not None:
            try:
                value = FOR_ONE_CALL[option](option, value)  # noqa: PLW2901
            except ConfigError as error:
                raise ConfigError(f"task {task.name}: {error} (for this call)") from None
        checked[option] = value.to_json() if isinstance(value, Conflict) else value
    if not {"lock_at_least_for", "lock_at_most_for"}.isdisjoint(checked):
        least, most = (checked.get(name, getattr(task, name)) for name in ("lock_at_least_for", "lock_at_most_for"))
        try:
            _check_times(least, most)
        except ConfigError as error:
            raise ConfigError(f"task {task.name}: {error} (for this call)") from None
    return checked


@lru_cache(maxsize=256)
def instead_for_one_call(name: str) -> str | None:
    """What to write instead of `name`, which Celery would pass on in silence; None: it does not look like ours."""
    if name in OPTIONS:
        return "it among the options of the task"
    return nearest(name, FOR_ONE_CALL, cutoff=0.8)


# -- of a task, when it is made


def check(cls: type[SingletonTask]) -> Mode:
    """The mode of the task `cls`. `ConfigError` if its options cannot be meant; policies by name become policies."""
    for option, checked in {**_OF_A_TASK, **FOR_ONE_CALL}.items():
        value = getattr(cls, option)
        if value is not None:
            setattr(cls, option, checked(option, value))
    _check_times(cls.lock_at_least_for, cls.lock_at_most_for)
    if cls.lock_limit is None:
        return _MODES[cls.lock_mode or "exclusive"]
    if cls.lock_mode is not None:
        raise ConfigError("lock_mode and lock_limit exclude each other: a limit is a mode of its own, write only one")
    return slot_of(cls.lock_limit)


def _check_times(least: float | None, most: float | None) -> None:
    if most is not None and (least or 0) > most:
        raise ConfigError(
            f"lock_at_least_for={least!r} is longer than lock_at_most_for={most!r}: they contradict each other"
        )


def mode_name(mode: Mode) -> str:
    """As a user writes it."""
    if mode.limit:
        return f"limit={mode.limit}"
    return next(name for name, each in _MODES.items() if each == mode)


def near_misses(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Those of a task's attributes that look like a misspelt option, each with what to write instead."""
    for name in names:
        if name not in OPTIONS and name not in _CELERYS:
            instead = _INSTEAD.get(name) or nearest(name, OPTIONS, cutoff=0.8)
            if instead:
                yield name, instead


# -- one option by itself: each takes its name, for messages, and its value; returns what it means


def _one_of(*choices: str) -> Callable[[str, Any], Any]:
    def checked(option: str, value: Any) -> Any:
        if value in choices:
            return value
        near = nearest(str(value), choices)
        hint = f" (perhaps {near!r}?)" if near else ""
        raise ConfigError(f"{option}={value!r}: write one of {', '.join(map(repr, choices))}{hint}")

    return checked


def _seconds(option: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{option}={value!r}: write seconds, as a number")
    return value


def _more_than_none(option: str, value: Any) -> Any:
    if not _seconds(option, value):
        raise ConfigError(f"{option}={value!r}: write more than 0 seconds, or leave it out for no limit")
    return value


def _conflict(option: str, value: Any) -> Conflict:
    return Conflict.parse(value, option)


def _limit(option: str, value: Any) -> Any:
    try:
        slot_of(value)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None
    return value


_Checks = Mapping[str, Callable[[str, Any], Any]]
FOR_ONE_CALL: Final[_Checks] = {
    "on_conflict": _conflict,
    "on_lost": _one_of(*ON_LOST),
    "on_unavailable": _one_of(*ON_UNAVAILABLE),
    "lock_at_least_for": _seconds,
    "lock_at_most_for": _more_than_none,
    "on_duplicate": _one_of("return", "raise"),
}
"""What ``apply_async`` and ``.set`` take too, and how each is checked."""

_OF_A_TASK: Final[_Checks] = {
    "lock_mode": _one_of(*_MODES),
    "lock_limit": _limit,
    "unique_queued": _one_of("until_start", "until_end"),
}
