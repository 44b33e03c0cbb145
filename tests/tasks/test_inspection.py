"""``celery inspect stats``: what it shows of a worker's locks."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from celery_etcd_lock.testing import EtcdServer
from tests.holding import AT_ONCE, hold, under
from tests.workers import Project, until

NewProject = Callable[..., Project]


def stats(project: Project) -> dict[str, Any]:
    """The part of ours, from the project's only worker."""
    (shown,) = until(lambda: project.app.control.inspect(timeout=10, limit=1).stats(), "the worker's answer").values()
    ours: dict[str, Any] = shown["etcd_lock"]
    return ours


def test_of_children_it_is_what_etcd_has(new_project: NewProject, etcd: EtcdServer) -> None:
    """Under prefork: which children have a session, by which lease, since when; and the settings that count."""
    project = new_project(etcd_lock_ttl=30)
    project.worker("-P", "prefork", "-c", "2")
    before = stats(project)
    assert before.pop("sessions") == []
    assert re.fullmatch("[0-9a-f]{8}", before.pop("instance"))
    assert before == {"endpoints": [etcd.url], "namespace": project.queue, "ttl": 30, "enabled": True}
    run, _ = hold(project, "k1")
    shown = stats(project)
    (session,) = shown["sessions"]
    (key,) = under(project, "sessions/")
    assert session["pid"] == run.pid
    assert int(session["lease"], 16) == key.lease
    assert key.key == f"/{project.queue}/sessions/{shown['instance']}/{run.pid}-{session['lease']}"
    assert session["since"].startswith(time.strftime("%Y-", time.gmtime()))
    os.kill(run.pid, signal.SIGKILL)
    until(lambda: stats(project)["sessions"] == [], "its end", seconds=AT_ONCE)


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_in_one_process_it_is_the_session_there(new_project: NewProject, pool: str) -> None:
    """Where tasks run in the worker's own process: its session, how long it is trusted, how many locks hang on it."""
    project = new_project(etcd_lock_ttl=30)
    project.worker("-P", pool, "-c", "3")
    assert stats(project)["sessions"] == []
    hold(project, "k1", seconds=8)
    hold(project, "k2", seconds=8)
    (session,) = stats(project)["sessions"]
    assert {key.lease for key in under(project, "locks/")} == {int(session["lease"], 16)}
    assert session["locks"] == 2
    assert 15 < session["trusted_for"] <= 27


def test_with_etcd_away_it_says_so_within_a_second(new_project: NewProject) -> None:
    """An etcd that is stopped, or that is there and silent: the rest is shown, with what is wrong."""
    with EtcdServer() as own:
        project = new_project(own.url, etcd_lock_timeout=5)
        project.worker("-P", "prefork", "-c", "1")
        own.pause()
        until(lambda: "within 0.7 s" in stats(project).get("error", ""), "the word that it does not answer")
        assert stats(project)["namespace"] == project.queue
        own.resume()
        until(lambda: "error" not in stats(project), "its return")
        own.stop()
        until(lambda: own.url in stats(project).get("error", ""), "the word that it is not there")


def test_with_locking_off(new_project: NewProject) -> None:
    """It is shown that it is off; etcd is not asked."""
    project = new_project("http://127.0.0.1:1", etcd_lock_enabled=False)
    project.worker("-P", "prefork", "-c", "1")
    shown = stats(project)
    assert shown["enabled"] is False
    assert shown["sessions"] == []
    assert "error" not in shown
