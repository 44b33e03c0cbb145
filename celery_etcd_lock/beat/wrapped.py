"""Which scheduler is wrapped, and whether the settings do for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.beat import PersistentScheduler, Scheduler
from celery.utils.imports import load_extension_class_names
from kombu.utils.imports import symbol_by_name

from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["OURS", "is_ours", "settings_for_beat", "wrapped_scheduler"]

OURS = "etcd_lock"
"""Our scheduler's name among the entry points ``celery.beat_schedulers``."""


def is_ours(scheduler: Any) -> bool:
    """Whether `scheduler`, as somebody has named it, is the one that wraps others."""
    if isinstance(scheduler, str):
        return scheduler == OURS or scheduler.replace(":", ".") == "celery_etcd_lock.beat.EtcdScheduler"
    return getattr(scheduler, "__module__", "") == "celery_etcd_lock.beat.scheduler"


def settings_for_beat(app: Celery) -> Settings:
    """The settings of `app`. `ConfigError`, also where they do only for tasks."""
    settings = Settings.from_app(app)
    settings.check_here()
    if settings.on_unavailable == "run" and settings.enabled is True:
        raise ConfigError(
            'etcd_lock_on_unavailable is "run", which beat cannot do: without etcd each of several beats would send '
            'every tick. Write "retry", and on_unavailable="run" on the tasks that are to run without their lock'
        )
    return settings


def wrapped_scheduler(app: Celery, settings: Settings) -> type[Scheduler]:
    """What ``etcd_lock_beat_scheduler`` names, else ``beat_scheduler``, else Celery's own. `ConfigError`."""
    setting, named = "etcd_lock_beat_scheduler", settings.beat_scheduler
    if named is None:
        setting, named = "beat_scheduler", app.conf.beat_scheduler
        if is_ours(named):
            return PersistentScheduler
    elif is_ours(named):
        raise ConfigError(f"{setting} names the scheduler that wraps others: name the one it is to wrap")
    names: Any = load_extension_class_names("celery.beat_schedulers")
    try:
        found: Any = symbol_by_name(named, aliases=dict(names)) if isinstance(named, str) else named
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting} is {named!r}, which cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Scheduler)):
        raise ConfigError(f"{setting} is {named!r}: write a subclass of celery.beat.Scheduler, or its dotted path")
    return found
