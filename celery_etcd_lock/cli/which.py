"""Which lock is meant: by a task and its arguments, as the task itself would have it, or by its name in etcd."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from celery_etcd_lock.cli.queues import Lock
from celery_etcd_lock.exceptions import EtcdLockError
from celery_etcd_lock.locks.queue import checked_name
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.conflict import nearest
from celery_etcd_lock.tasks.keys import KeyRule, lock_name
from celery_etcd_lock.tasks.task import SingletonTask

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["Meant", "lock_meant"]

_EXTRAS = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}

_MOST = 10
"""Names in one message."""


@dataclass(frozen=True)
class Meant:
    """A lock that somebody has named."""

    name: str
    """In etcd."""
    title: str
    """For people: ``shop.sync account_id=42``."""
    task: SingletonTask | None = None


def lock_meant(app: Celery, task: str, given: Sequence[str] = ()) -> Meant:
    """The lock of the task named `task` for the arguments `given`, as JSON; or, with a leading ``/``, of that name.

    `given`: a list of positional arguments, an object of keyword arguments, or one of each; or a key, as `ls` shows it:
    ``account_id=42``. `click.ClickException` that says what is wrong, if there is no such task, it takes no lock, or
    its lock cannot be told from these arguments.
    """
    if _settings(app).endpoints[0].startswith("memory://"):
        raise click.ClickException("etcd_lock_endpoints is memory://, whose locks no other process sees: name an etcd")
    if task.startswith("/") and given:
        raise click.ClickException(f"{task} is a lock's name, which takes no arguments: leave out {given[0]}")
    try:
        if task.startswith("/"):
            return Meant(checked_name(task), Lock.named(task).title)
        singleton = _singleton(app, task)
        rule = singleton._key_rule
        assert rule is not None
        if len(given) == 1 and _is_key(given[0], singleton):
            name = lock_name(_settings(app).namespace, task, given[0])
        else:
            name = singleton.lock_name(*_completed(rule, *_parsed(given)))
    except (EtcdLockError, TypeError, ValueError) as error:  # ValueError: of pydantic
        raise click.ClickException(str(error)) from error
    return Meant(name, Lock.named(name).title, singleton)


def _settings(app: Celery) -> Settings:
    try:
        return Settings.from_app(app)
    except EtcdLockError as error:
        raise click.ClickException(str(error)) from error


def _is_key(text: str, singleton: SingletonTask) -> bool:
    """Whether `text` is a key as it is shown, and neither JSON nor a command before which ``--`` is missing."""
    with suppress(ValueError):
        json.loads(text)
        return False
    ours = "=" in text if singleton.lock_key is None else shutil.which(text) is None
    return ours and not text.startswith(("[", "{"))


def _parsed(given: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    args: list[Any] | None = None
    kwargs: dict[str, Any] | None = None
    for text in given:
        try:
            value = json.loads(text)
        except ValueError:
            raise click.ClickException(
                f"{text} is no JSON: write the task's arguments as '[42]' or '{{\"account_id\": 42}}', or a key as ls "
                "shows it; and a command to run after --"
            ) from None
        if isinstance(value, list) and args is None:
            args = value
        elif isinstance(value, dict) and kwargs is None:
            kwargs = value
        elif isinstance(value, (list, dict)):
            raise click.ClickException(f"{text}: write one list of positional arguments and one object of keyword ones")
        else:
            raise click.ClickException(f"{text}: positional arguments are a list: write '[{text}]'")
    return args or [], kwargs or {}


def _singleton(app: Celery, name: str) -> SingletonTask:
    try:
        app.loader.import_default_modules()
    except Exception as error:
        raise click.ClickException(
            f"the project's tasks cannot be imported: {type(error).__name__}: {error}"
        ) from error
    tasks: dict[str, Any] = app.tasks
    singletons = sorted(each.name for each in tasks.values() if isinstance(each, SingletonTask) and each._key_rule)
    if name in singletons:
        singleton: SingletonTask = tasks[name]
        return singleton
    if name in tasks:
        raise click.ClickException(
            f"{name} is no singleton task: its runs take no lock, and nothing that is held would keep them out. "
            "Make it one with @singleton_task, or give the name of a lock, with its leading '/'"
        )
    raise click.ClickException(f"there is no task {name!r} in this app: {_near(name, singletons)}")


def _near(name: str, singletons: list[str]) -> str:
    if not singletons:
        return "it has no singleton task at all"
    same_end = [each for each in singletons if each.rpartition(".")[2] == name.rpartition(".")[2]]
    right = same_end[0] if len(same_end) == 1 else nearest(name, singletons)
    if right:
        return f"did you mean {right!r}?"
    more = ", …" if len(singletons) > _MOST else ""
    return f"its singleton tasks are {', '.join(singletons[:_MOST])}{more}"


def _completed(rule: KeyRule, args: list[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """With None for parameters that were left out and do not count. `click.ClickException` if one does."""
    signature, counting = rule.signature, rule.counting
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError as error:
        raise _misfit(rule, str(error)) from None
    missing = [
        each.name
        for each in signature.parameters.values()
        if each.default is each.empty and each.kind not in _EXTRAS and each.name not in bound.arguments
    ]
    if needed := [name for name in missing if counting is None or name in counting]:
        raise _misfit(rule, f"its lock is another for each {' and '.join(needed)}")
    if not missing:
        return args, kwargs
    bound.arguments.update(dict.fromkeys(missing))
    return bound.args, bound.kwargs


def _misfit(rule: KeyRule, why: str) -> click.ClickException:
    parameters = [each.replace(annotation=each.empty) for each in rule.signature.parameters.values()]
    example = parameters[0].name if parameters else "name"
    return click.ClickException(
        f"{rule.task}{inspect.Signature(parameters)}: {why}. Write its arguments as JSON: a list, or an object such as "
        f"'{{\"{example}\": …}}'"
    )
