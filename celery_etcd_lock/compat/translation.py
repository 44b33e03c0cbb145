"""From the options of celery-singleton and celery-once to ours, and to the line to write instead. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.conflict import Conflict, nearest

__all__ = ["ONCE_OPTIONS", "ONCE_TIMEOUT", "Translation", "from_once", "from_singleton", "once_settings", "seconds"]

ONCE_TIMEOUT: Final = 3600.0
"""Seconds: celery-once's own, where neither the task nor ``ONCE`` says anything."""

ONCE_OPTIONS: Final = ("graceful", "keys", "timeout", "unlock_before_run")


@dataclass(frozen=True)
class Translation:
    """What a foreign task means."""

    native: Mapping[str, Any]
    """Our options, all that have to be set; None where a default is meant."""
    instead: tuple[str, ...]
    """The foreign options, as they were written."""
    notes: tuple[str, ...] = ()
    """What is not the same, a sentence each."""

    def line(self, name: str, *, is_class: bool, base: str | None) -> str:
        """What to write for the task `name`; `base`: a base class of the project's own, to be kept."""
        options = [(option, _written(value)) for option, value in self.native.items() if value is not None]
        if is_class:
            return f"class {name}({base or 'SingletonTask'}) with {'; '.join(' = '.join(each) for each in options)}"
        if base:
            options.insert(0, ("base", base))
        return f"@singleton_task({', '.join('='.join(each) for each in options)})"


def from_singleton(options: Mapping[str, Any], conf: Mapping[str, Any]) -> Translation:
    """`options`: ``unique_on``, ``raise_on_duplicate`` and ``lock_expiry`` of a task; None where it has none."""
    unique_on, raises, expiry = (options.get(name) for name in ("unique_on", "raise_on_duplicate", "lock_expiry"))
    instead = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    notes = []
    which = _which(unique_on)
    if which["lock_key"]:
        notes.append(
            f"unique_on={unique_on!r} is taken as one for the whole task, as celery-singleton's documentation says; "
            "its releases up to 0.3.1 took it as all arguments: for that leave out unique_on, and lock_key too"
        )
    if raises is None:
        raises = conf.get("singleton_raise_on_duplicate")
        if raises is not None:
            instead.append(f"singleton_raise_on_duplicate={raises!r} on the app")
    if raises:
        notes.append("What it raises then is celery_etcd_lock.DuplicateTaskError")
    option = "lock_expiry"
    if expiry is None:
        option, expiry = "singleton_lock_expiry", conf.get("singleton_lock_expiry")
        if expiry is not None:
            instead.append(f"{option}={expiry!r} on the app")
    if expiry is not None:
        notes.append(_about_ttl(f"{option}={seconds(option, expiry):g}"))
    return Translation(
        {**which, **_queued("until_end", raises=bool(raises), conf=conf)}, ("base=Singleton", *instead), tuple(notes)
    )


def from_once(once: Mapping[str, Any], conf: Mapping[str, Any]) -> Translation:
    """`once`: that of a task."""
    notes = []
    for name in once:
        if name not in ONCE_OPTIONS:
            near = nearest(str(name), ONCE_OPTIONS)
            hint = f" (did you mean {near!r}?)" if near else ""
            notes.append(f"once has no key {name!r}{hint}: it does nothing")
    early = bool(once.get("unlock_before_run"))
    if early:
        notes.append("The next one may be queued when this one starts, and runs after it, not beside it")
    if once.get("graceful"):
        notes.append("delay() then returns the AsyncResult of the one that is queued, not one that is REJECTED")
    else:
        notes.append("What it raises then is celery_etcd_lock.DuplicateTaskError, without a countdown")
    if "timeout" in once:
        timeout = once["timeout"]
        ttl = "None" if timeout is None else f"{seconds('once: timeout', timeout):g}"
        notes.append(_about_ttl(f"timeout={ttl}"))
    else:
        default = once_settings(conf).get("default_timeout", ONCE_TIMEOUT)
        if default is not None:
            seconds('ONCE["settings"]["default_timeout"]', default)
    until = "until_start" if early else "until_end"
    said = {name: value for name, value in once.items() if name not in ("graceful", "unlock_before_run") or value}
    return Translation(
        {**_which(once.get("keys")), **_queued(until, raises=not once.get("graceful"), conf=conf)},
        ("base=QueueOnce", *([f"once={said!r}"] if said else [])),
        tuple(notes),
    )


def once_settings(conf: Mapping[str, Any]) -> Mapping[str, Any]:
    """What ``ONCE`` on the app's configuration says of its backend. `ConfigError` if it is no dict with dicts."""
    once = conf.get("ONCE") or {}
    settings = (once.get("settings") or {}) if isinstance(once, Mapping) else None
    if not isinstance(settings, Mapping):
        raise ConfigError('ONCE on the app\'s configuration: write {"settings": {"default_timeout": 3600}}, or nothing')
    return settings


def seconds(option: str, value: Any) -> float:
    """`value` as a number of seconds. `ConfigError` if it is none, or not more than 0."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"{option}={value!r}: write seconds, as a number above 0")
    return float(value)


def _which(names: Any) -> dict[str, Any]:
    """Which calls are the same: an empty list of names is said in another way with us."""
    some = [names] if isinstance(names, str) else names
    if isinstance(some, (list, tuple, set, frozenset)) and not any(some):
        return {"unique_on": None, "lock_key": "all"}
    return {"unique_on": names, "lock_key": None}


def _queued(until: str, *, raises: bool, conf: Mapping[str, Any]) -> dict[str, Any]:
    # Neither package ever dropped a message that had been published: whatever the app says for its other tasks.
    default = conf.get("etcd_lock_on_conflict") in (None, "retry", Conflict.retry())
    return {
        "unique_queued": until,
        "on_duplicate": "raise" if raises else None,
        "on_conflict": None if default else "retry",
    }


def _about_ttl(option: str) -> str:
    return (
        f"{option} bounds how long a lost message keeps others out of the queue; with our line "
        f"etcd_lock_queued_ttl does, for the whole app ({Settings.queued_ttl} s unless set). While one runs its lock "
        "is renewed: no second one is queued, or starts, however long it takes"
    )


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        names = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
        return _written(names[0]) if len(names) == 1 else f"[{', '.join(map(_written, names))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
