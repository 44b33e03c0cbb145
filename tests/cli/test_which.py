"""Which lock a task and its arguments on the command line mean, and what is said where none is meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import pytest
from celery import Celery

from celery_etcd_lock import SingletonTask
from celery_etcd_lock.cli.queues import Lock
from celery_etcd_lock.cli.which import lock_meant
from celery_etcd_lock.tasks.keys import lock_name


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("which", set_as_current=False)
    alone: dict[str, Any] = {"base": SingletonTask}
    app.task(name="shop.sync", unique_on="account_id", **alone)(_sync)
    app.task(name="shop.every", **alone)(_sync)
    app.task(name="shop.all", lock_key="all", **alone)(_sync)
    app.task(name="shop.catalog", lock_key="/catalog/{account_id}", **alone)(_sync)
    app.task(name="shop.called", lock_key=lambda account_id, full: account_id, **alone)(_sync)
    app.task(name="shop.plain")(_sync)
    yield app
    app.close()


def _sync(account_id: Any, full: Any) -> None:
    raise AssertionError("must not run here")


@pytest.mark.parametrize(
    ("task", "given", "title"),
    [
        ("shop.sync", ["[42, true]"], "shop.sync account_id=42"),
        ("shop.sync", ["[42]"], "shop.sync account_id=42"),
        ("shop.sync", ['{"account_id": 42}'], "shop.sync account_id=42"),
        ("shop.sync", ['{"full": 1}', '["a/b"]'], 'shop.sync account_id="a/b"'),
        ("shop.every", ['[42, {"a": 1}]'], 'shop.every account_id=42,full={"a":1}'),
        ("shop.all", [], "shop.all all"),
        ("shop.catalog", ["[7]"], "/catalog/7"),
        ("shop.called", ["[7, 1]"], "shop.called 7"),
        ("/maintenance", [], "/maintenance"),
        ("shop.sync", ["account_id=42"], "shop.sync account_id=42"),
        ("shop.all", ["all"], "shop.all all"),
    ],
)
def test_what_is_meant(app: Celery, task: str, given: list[str], title: str) -> None:
    """By the task's own rule; what does not count may be left out."""
    meant = lock_meant(app, task, given)
    assert meant.title == title
    assert Lock.named(meant.name).title == title
    if meant.task is not None and task == "shop.sync":
        assert meant.name == lock_name("celery", task, title.partition(" ")[2])


@pytest.mark.parametrize(
    ("task", "given", "said"),
    [
        ("shop.snyc", [], "did you mean 'shop.sync'"),
        ("sync", [], "did you mean 'shop.sync'"),
        ("xyz", [], "its singleton tasks are shop.all, shop.called, shop.catalog, shop.every, shop.sync"),
        ("shop.plain", [], "is no singleton task"),
        ("shop.sync", [], r"shop.sync\(account_id, full\): its lock is another for each account_id"),
        ("shop.every", ["[1]"], "another for each full"),
        ("shop.called", ["[1]"], "another for each full"),
        ("shop.sync", ["[1, 2, 3]"], "too many positional arguments"),
        ("shop.sync", ['{"acount_id": 1}'], "unexpected keyword argument 'acount_id'"),
        ("shop.sync", ["42"], r"write '\[42\]'"),
        ("shop.sync", ["./migrate"], "no JSON: .* a command to run after --"),
        ("shop.sync", ["[1]", "[2]"], "one list of positional arguments and one object"),
        ("/maintenance", ["[1]"], "takes no arguments"),
        ("/maintenance/", [], "does not end in '/'"),
    ],
)
def test_what_is_said_where_none_is_meant(app: Celery, task: str, given: list[str], said: str) -> None:
    """What was wrong, and what to write instead."""
    with pytest.raises(click.ClickException, match=said):
        lock_meant(app, task, given)


def test_locks_that_no_other_process_sees(app: Celery) -> None:
    """memory:// is of one process."""
    app.conf.etcd_lock_endpoints = "memory://x"
    with pytest.raises(click.ClickException, match="no other process sees"):
        lock_meant(app, "shop.all")


def test_names_of_other_layouts_are_their_own_titles() -> None:
    """An election's, somebody else's."""
    assert Lock.named("/celery/beat/default/leader").title == "/celery/beat/default/leader"
    assert Lock.named("maintenance").title == "maintenance"
