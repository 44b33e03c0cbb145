"""Tasks while etcd has reached its quota: those that run go on, those that begin fare as their on_unavailable says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from celery_etcd_lock.exceptions import NoSpace
from tests.quota import fill, make_room, small_etcd
from tests.workers import Project, until

NewProject = Callable[..., Project]


def test_a_full_etcd_is_an_outage_for_tasks_that_begin(new_project: NewProject) -> None:
    """One that runs keeps its lock and gives it back; others are put back, fail or run without it; then all is well."""
    with small_etcd() as server:
        project = new_project(server.url, etcd_lock_ttl=3)
        worker = project.worker("-P", "threads", "-c", "2")
        running = project.send("failing", 1, seconds=6, key="long")
        until(lambda: project.runs("failing"))
        said = fill(server)

        put_back = project.send("retrying", 2)
        until(lambda: put_back.state == "RETRY")
        assert isinstance(put_back.info, NoSpace)
        assert str(put_back.info) == said
        with pytest.raises(NoSpace, match="etcdctl alarm disarm"):
            project.send("unavailable_fails", 3).get(timeout=60)
        assert project.send("unavailable_runs", 4).get(timeout=60) == 4
        (unlocked,) = project.runs("unavailable_runs")
        assert unlocked.token == 0

        assert running.get(timeout=60) == 1
        (long,) = project.runs("failing")
        assert long.how == "returned"
        assert not project.runs("retrying")
        assert f"the etcd at {server.url} refuses: {said}" in worker.output

        make_room(server, said)
        assert put_back.get(timeout=60) == 2
        (late,) = project.runs("retrying")
        assert late.token > long.token
        assert project.send("failing", 5, key="long").get(timeout=60) == 5, "its lock was given back"
        assert "etcd is back" in worker.output
        assert "etcd_lock.lost" not in worker.output
