"""The worker's side: settings are checked before it takes its first message; its children's deaths are noticed.

Only workers import this: `tasks` puts the steps among theirs, by name. It brings what running a task takes, so that
children are forked with that, and share its memory, though a process that only publishes does without.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.util
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click
from celery import bootsteps

from celery_etcd_lock import events
from celery_etcd_lock.etcd import gateway  # noqa: F401 for the children, as the guard is
from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.inspection import add_commands, locks_of_children, locks_of_process, sessions_prefix
from celery_etcd_lock.orphans import LOOK_EVERY, Orphans
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks import guard, instance  # noqa: F401
from celery_etcd_lock.tasks.errands import Errands
from celery_etcd_lock.tasks.runtime import close_all

__all__ = ["CheckSettings", "Locks", "forks"]

_AT_EXIT = 2.0
"""Seconds, at most, that a worker's end waits for etcd."""


class CheckSettings(bootsteps.Step):  # type: ignore[misc,unused-ignore]
    """Stops a worker whose settings cannot be meant, with one clean line, before it runs anything."""

    label = "etcd-lock-settings"

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        try:
            settings = Settings.from_app(parent.app)
            settings.check_here()
            if kwargs.get("beat"):
                _check_for_beat(parent)
        except ConfigError as error:
            raise click.ClickException(str(error)) from error
        if forks(parent) and any(url.startswith("memory://") for url in settings.endpoints):
            raise click.ClickException(
                "etcd_lock_endpoints is memory://, which the processes of a prefork pool do not share: nothing "
                "would be locked. Give it a real etcd, or start the worker with -P solo or -P threads"
            )


def _check_for_beat(parent: Any) -> None:
    # Imported here: few workers have a beat.
    from celery_etcd_lock.beat.wrapped import is_ours, settings_for_beat, wrapped_scheduler

    if is_ours(parent.scheduler):
        wrapped_scheduler(parent.app, settings_for_beat(parent.app))


class Locks(bootsteps.StartStopStep):  # type: ignore[misc,unused-ignore]
    """Ends the sessions of children that have died, and tells ``celery inspect stats`` of those that live."""

    name = "etcd_lock"
    label = "etcd-lock"
    requires = (CheckSettings, "celery.worker.components:Pool")

    def create(self, parent: Any) -> None:
        add_commands()
        instance.begin_worker()
        events.begin_worker(parent.hostname, on=bool(parent.task_events))

    def start(self, parent: Any) -> None:
        settings = Settings.from_app(parent.app)
        if not settings.enabled:
            return
        if not forks(parent):
            atexit.register(_close)
            return
        errands = Errands.of(parent.app, forks=True)
        orphans = Orphans(errands, sessions_prefix(settings), lambda: _processes(parent))
        errands.watch(orphans.look, every=LOOK_EVERY)
        _at_the_very_end(partial(_finish, orphans, errands, os.getpid()))

    def info(self, parent: Any) -> dict[str, Any]:  # type: ignore[override,unused-ignore]
        shown = locks_of_children(parent.app) if forks(parent) else locks_of_process(parent.app)
        return {self.name: shown}


def _finish(orphans: Orphans, errands: Errands, pid: int) -> None:
    if os.getpid() != pid:
        return  # somebody's fork that ends as Python programs do
    with _undisturbed():
        orphans.end_with_parent()
        errands.close(within=_AT_EXIT)


def _close() -> None:
    with _undisturbed():
        close_all()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """At the end of a process: Celery's handlers raise, for who cannot wait any longer. This is bounded."""
    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGQUIT", signal.SIGTERM)):
            before.setdefault(number, signal.signal(number, signal.SIG_IGN))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _at_the_very_end(finish: Callable[[], None]) -> None:
    """Have `finish` called when the pool's own finalizers have waited for its children, or were kept from that.

    They hang on one function of multiprocessing's, and what is registered first is called last.
    """
    finalizers: Any = vars(multiprocessing.util)["_exit_function"]
    atexit.unregister(finalizers)
    atexit.register(finish)
    atexit.register(finalizers)


def forks(worker: Any) -> bool:
    """Whether tasks run in children of this process, forked or spawned."""
    return any(base.__module__ == "celery.concurrency.prefork" for base in worker.pool_cls.__mro__)


def _processes(worker: Any) -> list[Any]:
    pool = getattr(worker.pool, "_pool", None)
    return getattr(pool, "_pool", None) or []
