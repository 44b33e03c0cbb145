"""``doctor``: is the etcd that the settings name fit for locks, and what to do where it is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import click
from celery.bin.base import CeleryCommand, CeleryOption

from celery_etcd_lock.cli.doctor.findings import NOT_EXAMINED, Finding, lines, status_of
from celery_etcd_lock.cli.doctor.growth import about_clocks, about_history, about_quota, about_watches, sample
from celery_etcd_lock.cli.doctor.members import Member, about_members, about_versions, look_at_all
from celery_etcd_lock.cli.doctor.probes import about_permissions, reading_key
from celery_etcd_lock.cli.doctor.understood import about_settings, understood
from celery_etcd_lock.cli.tables import printable, terminal_width
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.exceptions import EtcdLockError
from celery_etcd_lock.settings import Settings

__all__ = ["doctor", "examine"]

_LONGEST_LOOK = 60


@click.command(cls=CeleryCommand)
@click.option(
    "--sample",
    "seconds",
    cls=CeleryOption,
    type=click.FloatRange(0.1, _LONGEST_LOOK),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help_group="Doctor Options",
    help="How long to watch the pace of writes, and the clocks of those who write.",
)
@click.option(
    "--timeout",
    cls=CeleryOption,
    type=click.FloatRange(min=0.1),
    default=None,
    metavar="SECONDS",
    help_group="Doctor Options",
    help="How long to wait for each endpoint.  [default: etcd_lock_timeout]",
)
@click.option(
    "--quota",
    cls=CeleryOption,
    type=click.IntRange(min=1),
    default=None,
    metavar="BYTES",
    help_group="Doctor Options",
    help="etcd's --quota-backend-bytes: before 3.6 it does not say.  [default: 2 GiB, etcd's own]",
)
@click.option("--strict", cls=CeleryOption, is_flag=True, help_group="Doctor Options", help="A warning is wrong, too.")
@click.option("--json", "as_json", cls=CeleryOption, is_flag=True, help_group="Doctor Options", help="As JSON.")
@click.pass_context
def doctor(
    ctx: click.Context, seconds: float, timeout: float | None, quota: int | None, strict: bool, as_json: bool
) -> None:
    """Whether etcd is fit for locks, and what to do.

    It looks at the settings, at each endpoint, the versions, the time that requests take, the permissions (by a key for
    each kind of ours, which is removed again), the history and what compacts it, the room there is, and clocks.

    Exit status: 0, nothing is wrong, though there may be warnings (--strict: not even those); 1, something is; 2, it
    could not be examined: the settings cannot be meant, no etcd answers, or it does not let us in.
    """
    try:
        settings = Settings.from_app(ctx.obj.app)
        settings.check_here()
    except EtcdLockError as error:
        findings = [Finding("wrong", "settings", said, "correct it") for said in str(error).splitlines()]
        shown: dict[str, Any] = {}
        examined = False
    else:
        shown = understood(settings)
        findings, examined = examine(settings, seconds=seconds, timeout=timeout or settings.timeout, quota=quota)
    status = status_of(findings, examined=examined, strict=strict)
    if as_json:
        told = {"status": status, "settings": shown, "findings": [finding.to_json() for finding in findings]}
        ctx.obj.echo(json.dumps(told, indent=2))
    else:
        for line in _told(shown, findings, status):
            ctx.obj.echo(printable(line))
    ctx.exit(status)


def examine(settings: Settings, *, seconds: float, timeout: float, quota: int | None) -> tuple[list[Finding], bool]:
    """All findings, and whether an etcd has answered and let us in. Raises nothing of etcd's, and ends in time:
    some `timeout` for the endpoints, all at once, and as much for each other thing, beside the `seconds` of watching.
    """
    findings = list(about_settings(settings))
    if settings.endpoints[0].startswith("memory://") and not settings.client:
        return findings, True
    members = look_at_all(settings, reading_key(settings), timeout)
    findings += about_members(members, timeout)
    statuses = [member.status for member in members if member.status]
    findings += about_versions(statuses, auth=settings.username is not None)
    findings += about_quota(statuses, quota)
    serving = [member for member in members if member.serves]
    if serving:
        findings += _of_the_cluster(settings, serving, seconds, timeout, quota)
    elif statuses:
        findings.append(Finding("unknown", "permissions, history, clocks", "no endpoint answers reads"))
    return findings, any(member.lets_in for member in members)


def _of_the_cluster(
    settings: Settings, serving: list[Member], seconds: float, timeout: float, quota: int | None
) -> Iterator[Finding]:
    """What takes an etcd that works, asked where that was seen just now."""
    given = settings.connection
    endpoints = tuple(member.url for member in serving) if given["endpoints"] else ()
    statuses = [member.status for member in serving if member.status]
    with closing(connect(**{**given, "endpoints": endpoints})) as transport:
        yield from about_permissions(transport, settings, timeout)
        try:
            seen = sample(transport, settings, reading_key(settings), seconds, timeout)
        except EtcdLockError as error:
            yield Finding("unknown", "history and clocks", str(error))
            return
    yield from about_watches(seen)
    yield from about_history(seen, statuses, quota)
    yield from about_clocks(seen)


def _told(shown: dict[str, Any], findings: list[Finding], status: int) -> Iterator[str]:
    width = max(60, terminal_width() or 80)
    for name, value in shown.items():
        if value is None:
            continue
        yield f"{name} = {json.dumps(value)}"
    if shown:
        yield ""
    yield from lines(findings, width)
    yield ""
    count = {level: sum(finding.level == level for finding in findings) for level in ("wrong", "warning")}
    warnings = f"{count['warning']} warning{'s' if count['warning'] != 1 else ''}"
    if status == NOT_EXAMINED:
        yield "It could not be examined."
    else:
        yield f"{count['wrong'] or 'Nothing'} wrong, {warnings}."
