"""Which lock somebody means, who has typed a name; and which names are near it, if there is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from itertools import groupby

import click

from celery_etcd_lock.cli.connected import Etcd
from celery_etcd_lock.cli.pages import keys_below
from celery_etcd_lock.cli.queues import Lock, Queue, limits_of, lock_name_in, queues
from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.tasks.keys import lock_name

__all__ = ["queue_named", "queue_of"]

_MOST = 5
"""Names in one message."""


def queue_of(ctx: click.Context, etcd: Etcd, name: str) -> Queue | None:
    """The queue of the lock of that name in etcd; None: nobody is in it."""
    below = keys_below(etcd.transport, name + "/")
    # A name that is only the beginning of locks' names must not look like a lock that all of theirs wait for.
    own = (kv for kv in below if lock_name_in(kv.key) == name or _stands_in(name, kv.key))
    return next(queues(own, limits_of(ctx.obj.app), name), None)


def _stands_in(name: str, key: str) -> bool:
    """Whether `key` is made as contenders for the lock `name` are, which is none of a task's."""
    kind, _, identity = key.removeprefix(name + "/").rpartition("/")
    return bool(identity) and kind in {"", "write", "read", "slot"}


def queue_named(ctx: click.Context, etcd: Etcd, given: str, key: str | None) -> Queue:
    """The queue of the lock that `given`, and perhaps `key`, mean. `click.ClickException` that says what is near."""
    for name in dict.fromkeys(_candidates(etcd, given, key)):
        found = queue_of(ctx, etcd, name)
        if found is not None:
            return found
    taken = [Lock.named(name) for name, _ in groupby(_names(etcd))]
    of_task = [lock for lock in taken if lock.task == given] if key is None else []
    if len(of_task) == 1:
        found = queue_of(ctx, etcd, of_task[0].name)
        if found is not None:
            return found
    title = f"{given} {key}" if key is not None else given
    if of_task:
        raise click.ClickException(f"{given} has {len(of_task)} locks that are held, say which: {_listed(of_task)}")
    if not taken:
        raise click.ClickException(f"nobody holds {title}, nor any other lock")
    near = _near(title, taken)
    hint = f"did you mean {_listed(near)}?" if near else "see them all with: celery etcd-lock ls"
    raise click.ClickException(f"nobody holds {title}: {hint}")


def _candidates(etcd: Etcd, given: str, key: str | None) -> Iterator[str]:
    namespace, text = etcd.settings.namespace, given.rstrip("/")
    if key is not None:
        yield _name(namespace, given, key)
        return
    if text.startswith("/"):
        yield text
        yield _name(namespace, "-", text)  # a key that several tasks share
        return
    task, space, rest = given.partition(" ")  # as it is shown
    yield _name(namespace, task, rest if space else "-")


def _name(namespace: str, task: str, key: str) -> str:
    try:
        return lock_name(namespace, task, key)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


def _names(etcd: Etcd) -> Iterator[str]:
    return (lock_name_in(kv.key) for kv in keys_below(etcd.transport, etcd.below("locks"), keys_only=True))


def _near(title: str, taken: Sequence[Lock]) -> list[Lock]:
    by_text = {text: lock for lock in taken for text in (lock.name, lock.title)}
    containing = [lock for lock in taken if title.strip("/") in lock.title][:_MOST]
    close = difflib.get_close_matches(title, by_text, n=_MOST, cutoff=0.6)
    return containing or list({by_text[text].name: by_text[text] for text in close}.values())


def _listed(locks: Sequence[Lock]) -> str:
    more = ", …" if len(locks) > _MOST else ""
    return ", ".join(repr(lock.title) for lock in locks[:_MOST]) + more
