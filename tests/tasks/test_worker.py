"""The worker process: what it checks at its start, and what it costs etcd."""

from __future__ import annotations

from collections.abc import Callable

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Range, Watch, prefix_end
from tests.workers import Project, overlaps, until

NewProject = Callable[..., Project]


def test_one_lease_and_one_name_after_a_thousand_locks(new_project: NewProject) -> None:
    """1,000 different locks hang on one lease; one lock taken 1,000 times leaves one name in etcd's history."""
    project = new_project()
    project.worker("-P", "solo", "--prefetch-multiplier", "100", "-l", "WARNING", ready=False)
    results = [project.send("retrying", number, 0, key=f"k{number}") for number in range(1000)]
    results += [project.send("retrying", number, 0, key="same") for number in range(1000)]
    for result in results:
        result.get(timeout=120)
    transport = connect(project.etcd_url)
    (session,) = transport.range(Range(f"/{project.queue}/sessions/", f"/{project.queue}/sessions0")).kvs
    prefix = f"/{project.queue}/locks/"
    names, leases, seen = set(), set(), 0
    stream = transport.watch(Watch(prefix, prefix_end(prefix), start_revision=session.create_revision))
    for reply in stream:
        puts = [event.kv for event in reply.events if event.kind == "put"]
        names |= {kv.key for kv in puts}
        leases |= {kv.lease for kv in puts}
        seen += len(reply.events)
        if seen == 4000:
            break
    stream.close()
    transport.close()
    assert leases == {session.lease}
    assert len(names) == 1001


def test_observing_prevents_nothing_and_says_what_it_would_have(new_project: NewProject) -> None:
    """With `etcd_lock_enabled="observe"` all bodies run, and the log tells which would have met another."""
    project = new_project(etcd_lock_enabled="observe")
    worker = project.worker("-P", "prefork", "-c", "2")
    first = project.send("failing", 0, 3.0)
    until(lambda: project.runs("failing"), "the first start")
    second = project.send("failing", 1)
    assert [second.get(timeout=60), first.get(timeout=60)] == [1, 0]
    assert len(overlaps(project.runs("failing"))) == 1
    assert worker.output.count("etcd_lock.observed") == 1
    assert f"failing[{second.id}] runs; with etcd_lock_enabled=True it would fail" in worker.output
    assert first.id in worker.output.split("etcd_lock.observed")[1].splitlines()[0], "the holder"


def test_a_store_in_memory_is_refused_under_prefork(new_project: NewProject) -> None:
    """Processes do not share it, so it would exclude nobody: the worker does not start."""
    worker = new_project("memory://").worker("-P", "prefork", "-c", "1", ready=False)
    assert worker.process.wait(60) != 0
    assert "memory://" in worker.output
    assert "-P solo" in worker.output


def test_a_misspelt_setting_stops_the_worker_with_one_clean_line(new_project: NewProject) -> None:
    """The right name is suggested, before the first task and without a traceback."""
    project = new_project(etcd_lock_tll=3)
    worker = project.worker("-P", "solo", ready=False)
    assert worker.process.wait(60) != 0
    assert "etcd_lock_tll" in worker.output
    assert "etcd_lock_ttl" in worker.output
    assert "Traceback" not in worker.output


def test_all_that_is_wrong_is_said_at_once(new_project: NewProject) -> None:
    """Several impossible settings are one error."""
    project = new_project(etcd_lock_ttl=0, etcd_lock_on_lost="abourt")
    worker = project.worker("-P", "prefork", "-c", "1", ready=False)
    assert worker.process.wait(60) != 0
    for name in ("etcd_lock_ttl", "etcd_lock_on_lost", "abort"):
        assert name in worker.output
    assert "Traceback" not in worker.output
