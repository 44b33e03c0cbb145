"""``history``: who held which lock when, and who waited, from the revisions that etcd still keeps."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import CeleryCommand, CeleryOption

from celery_etcd_lock.cli.connected import connected
from celery_etcd_lock.cli.history.instants import Calendar, Dated, dated
from celery_etcd_lock.cli.history.past import Reach, replay
from celery_etcd_lock.cli.history.story import Story, tell
from celery_etcd_lock.cli.history.story_html import page
from celery_etcd_lock.cli.history.story_text import Drawn, lines
from celery_etcd_lock.cli.history.timeline import Scope, Timeline
from celery_etcd_lock.cli.queues import limits_of
from celery_etcd_lock.cli.tables import terminal_width
from celery_etcd_lock.cli.which import lock_meant
from celery_etcd_lock.etcd.api import Event, KeyValue, Transport
from celery_etcd_lock.exceptions import ConfigError, PermissionDenied
from celery_etcd_lock.locks.queue import checked_name
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.conflict import nearest
from celery_etcd_lock.tasks.keys import lock_name

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["Told", "history", "read"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _seconds(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """A number with a unit, or of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", value.strip())
    if match is None:
        raise click.BadParameter(f"{value!r} is no length of time: write it like 90s, 15m, 1h or 2d", ctx, param)
    return float(match[1]) * _UNITS[match[2] or "s"]


@click.command(cls=CeleryCommand)
@click.argument("lock", metavar="[TASK | LOCK]", required=False, default="")
@click.argument("key", required=False)
@click.option(
    "--since",
    cls=CeleryOption,
    callback=_seconds,
    default="1h",
    show_default=True,
    metavar="TIME",
    help_group="History Options",
    help="How long ago it begins: 90s, 15m, 1h, 2d.",
)
@click.option(
    "--limit",
    cls=CeleryOption,
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help_group="History Options",
    help="How many to show, the newest.",
)
@click.option(
    "--look-back",
    cls=CeleryOption,
    type=click.IntRange(min=1),
    default=50_000,
    show_default=True,
    metavar="REVISIONS",
    help_group="History Options",
    help="How many revisions to read, at most. etcd walks all of them, of all keys, for each thousand that it tells, "
    "and keeps writers waiting meanwhile: think before you ask a busy one for many more.",
)
@click.option("--json", "as_json", cls=CeleryOption, is_flag=True, help_group="History Options", help="As JSON.")
@click.option(
    "--html",
    "as_html",
    cls=CeleryOption,
    is_flag=True,
    help_group="History Options",
    help="As one HTML page, which loads nothing: redirect it to a file.",
)
@click.pass_context
def history(
    ctx: click.Context,
    lock: str,
    key: str | None,
    since: float,
    limit: int,
    look_back: int,
    as_json: bool,
    as_html: bool,
) -> None:
    """Who held which lock when, and who waited.

    \b
    Of all tasks, of one TASK, or of one LOCK: a task's name and a key, as `ls` shows
    them, or its arguments as JSON; or the lock's name in etcd:
    celery -A proj etcd-lock history shop.sync --since 15m
    celery -A proj etcd-lock history shop.sync account_id=42

    It is read from the revisions that etcd still keeps, and nothing is written. etcd keeps them until it is compacted,
    and has no times. Who comes says when; when somebody went lies between the times of who came before and after, and
    is shown as about.
    """  # noqa: D301 - click's mark for lines that stay
    if as_json and as_html:
        raise click.UsageError("--json and --html are two forms: write one", ctx)
    app, limits = ctx.obj.app, limits_of(ctx.obj.app)
    if key is not None:
        lock = lock_meant(app, lock, [key]).name
    with connected(ctx) as etcd:
        story = read(
            etcd.transport,
            scope_of(app, etcd.settings, lock),
            since=since,
            look_back=look_back,
            limit=limit,
            limit_of=lambda task: limits(task) or None,
            timeout=etcd.settings.timeout,
        )
    for piece in _drawn(story, as_json=as_json, as_html=as_html):
        ctx.obj.echo(piece, nl=not as_html)


def read(
    transport: Transport,
    scope: Scope,
    *,
    since: float,
    look_back: int,
    limit: int,
    limit_of: Callable[[str], int | None],
    timeout: float,
) -> Story:
    """The history of `scope` in the last `since` seconds. What reads and watches raise; see `past.replay`."""
    told = Told(scope, limit_of, look_back)
    asked = {"prefix": scope.prefix, "watched": scope.prefix}
    namespace = f"/{scope.namespace}/"

    def replayed(**more: Any) -> Reach:
        return replay(transport, told, **{**asked, **more}, look_back=look_back, timeout=timeout)

    if scope.prefix.startswith(namespace):
        try:  # all of it, and not the locks alone: sessions and beats tell the time, too
            reach = replayed(beside=(f"{namespace}sessions/", f"{namespace}beat/"), watched=namespace)
        except PermissionDenied:
            reach = replayed()
    else:
        reach = replayed()
    now = time.time()
    calendar = Calendar(told.dates.values(), reach.head, now)
    stays, dropped = told.timeline.finish(), told.timeline.dropped
    return tell(scope, stays, calendar, reach, since=now - since, now=now, limit=limit, dropped=dropped)


class Told:
    """What the past tells: see `past.Listener`."""

    def __init__(self, scope: Scope, limit_of: Callable[[str], int | None], keep: int) -> None:
        self._scope, self._limit_of, self._keep = scope, limit_of, keep
        self.timeline = Timeline(scope, limit_of, keep)
        self.dates: dict[int, Dated] = {}

    def begin(self, revision: int, kvs: list[KeyValue]) -> None:
        self.timeline, self.dates = Timeline(self._scope, self._limit_of, self._keep), {}
        for kv in kvs:
            self._date(kv)
        self.timeline.begin(revision, kvs)

    def see(self, event: Event) -> None:
        if event.kind == "put":
            self._date(event.kv)
        self.timeline.see(event)

    def complete(self, there: dict[str, int]) -> bool:
        return self.timeline.live() == {key: there[key] for key in there if self._scope.lock_of(key)}

    def _date(self, kv: KeyValue) -> None:
        if found := dated(kv):
            self.dates[found.revision] = found


def scope_of(app: Celery, settings: Settings, lock: str) -> Scope:
    """What `lock` means: nothing, a task's name, or a lock's. `ConfigError` for a task that there is not."""
    if not lock:
        return Scope(settings.namespace)
    if lock.startswith("/"):
        return Scope(settings.namespace, lock=checked_name(lock))
    with suppress(Exception):  # what keeps the project's tasks from being imported is not said here
        app.loader.import_default_modules()
    if lock not in app.tasks:
        known = [name for name in app.tasks if not name.startswith("celery.")]
        right = nearest(lock, known)
        hint = (
            f"did you mean {right}?"
            if right
            else "write its full name, or a lock's with its leading /; without a name all are shown"
        )
        raise ConfigError(f"there is no task {lock!r} in this app: {hint}")
    return Scope(settings.namespace, owner=lock_name(settings.namespace, lock, "-").split("/")[3])


def _drawn(story: Story, *, as_json: bool, as_html: bool) -> Iterator[str]:
    if as_json:
        return iter([json.dumps(story.to_json(), indent=2)])
    if as_html:
        return page(story)
    return lines(story, width=terminal_width(), drawn=Drawn.of(getattr(sys.stdout, "encoding", None)))
