"""Metrics of real workers, as whoever scrapes them sees them, and as a real Prometheus does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.testing import EtcdServer
from tests.prometheus import PrometheusNotFound, PrometheusServer, do_without
from tests.servers import RedisServer, free_port
from tests.workers import Project, Worker, project, until

NewProject = Callable[..., Project]

TTL = 20
BOUND = 60
"""Seconds, several times what anything here takes."""

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(port: int) -> Samples:
    """Our series, without the prefix of their names."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    return {
        (sample.name.removeprefix("celery_etcd_lock_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("celery_etcd_lock_") and not sample.name.endswith("_created")
    }


def value(port: int, name: str, /, **labels: str) -> float:
    """-1: there is no such series."""
    return scrape(port).get((name, frozenset(labels.items())), -1)


def answers(port: int) -> bool:
    try:
        scrape(port)
    except OSError:
        return False
    return True


@dataclass
class Measured:
    """A project whose one worker serves its metrics on `port`."""

    project: Project
    worker: Worker
    port: int
    prometheus: PrometheusServer | PrometheusNotFound | None = None

    def scrape(self) -> Samples:
        return scrape(self.port)

    def value(self, name: str, /, **labels: str) -> float:
        return value(self.port, name, **labels)

    def shows(self, expected: float, name: str, /, **labels: str) -> None:
        until(lambda: self.value(name, **labels) == expected, f"{name}{labels} {expected}", seconds=BOUND)

    def exceeds(self, bound: float, name: str, /, **labels: str) -> None:
        until(lambda: self.value(name, **labels) > bound, f"{name}{labels} over {bound}", seconds=BOUND)

    @contextmanager
    def held_by_us(self, *tasks: str) -> Iterator[None]:
        """The locks of `tasks`, with their default key."""
        made = self.project
        with Session.open(made.etcd_url, namespace=f"{made.queue}-us") as session:
            locks = [Mutex(session, f"/{made.queue}/locks/{task}/-").acquire(timeout=BOUND) for task in tasks]
            yield
            for lock in locks:
                lock.release()


@contextmanager
def measured(
    redis: RedisServer, etcd: EtcdServer, folder: Path, *pool: str, multiprocess: bool = False
) -> Iterator[Measured]:
    port = free_port()
    with project(redis.url, etcd.url, folder, imports=["measured"], etcd_lock_ttl=TTL) as made:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("METRICS_PORT", str(port))
            if multiprocess:
                (folder / "metrics").mkdir()
                environment.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder / "metrics"))
            worker = made.worker(*pool)
        served = Measured(made, worker, port)
        until(lambda: answers(port), "the first scrape")
        yield served


@pytest.fixture(scope="module")
def prefork(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    folder = tmp_path_factory.mktemp("prefork")
    with measured(redis, etcd, folder, "-P", "prefork", "-c", "4", multiprocess=True) as served, ExitStack() as stack:
        try:
            # Here already: it takes five seconds until it scrapes its first target.
            served.prometheus = stack.enter_context(PrometheusServer([f"127.0.0.1:{served.port}"]))
        except PrometheusNotFound as missing:
            served.prometheus = missing
        yield served


@pytest.fixture(scope="module")
def threads(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    with measured(redis, etcd, tmp_path_factory.mktemp("threads"), "-P", "threads", "-c", "4") as served:
        yield served


class EveryPool:
    """What is the same wherever tasks run."""

    @pytest.fixture
    def served(self, request: pytest.FixtureRequest) -> Measured:
        found: Measured = request.getfixturevalue(type(self).__name__.removeprefix("Test").lower())
        return found

    def test_conflicts_by_outcome_and_who_waits(self, served: Measured) -> None:
        """Each outcome is counted; those who wait are shown until they have their lock, or have given up."""
        send = served.project.send
        with served.held_by_us("put_back", "in_slot", "skipping", "failing", "gives_up"):
            ends = [send(task, 1) for task in ("skipping", "failing", "gives_up")]
            for end in ends:
                end.get(timeout=BOUND, propagate=False)
            waits = [send(task, 1) for task in ("put_back", "in_slot")]
            served.shows(1, "waiting", task="put_back")
            served.shows(1, "waiting", task="in_slot")
            served.exceeds(1, "oldest_wait_seconds", task="in_slot")
            served.exceeds(0, "oldest_wait_seconds", task="put_back")
            for task, outcome in (
                ("skipping", "skip"), ("failing", "fail"), ("gives_up", "wait"), ("gives_up", "fail"),
                ("in_slot", "wait"),
            ):  # fmt: skip
                assert served.value("conflicts_total", task=task, outcome=outcome) == 1
            assert served.value("conflicts_total", task="put_back", outcome="retry") >= 1
            served.shows(0, "waiting", task="gives_up")
        assert [wait.get(timeout=BOUND) for wait in waits] == [1, 1]
        for task in ("put_back", "in_slot"):
            served.shows(0, "waiting", task=task)
            served.shows(0, "oldest_wait_seconds", task=task)
            served.shows(1, "hold_seconds_count", task=task)

    def test_held_and_lost(self, served: Measured) -> None:
        """A lock is shown as held while the body has it, and not when it is lost, though the body goes on."""
        made = served.project
        kept, loses = made.send("retrying", 1, 1.2), made.send("lost_warns", 1, 600.0)
        served.shows(1, "held", task="retrying")
        served.shows(1, "held", task="lost_warns")
        served.exceeds(0, "oldest_hold_seconds", task="lost_warns")
        assert served.value("lost_total", task="lost_warns") == 0, "a counter begins with 0: else there is no increase"
        assert 0 < served.value("session_trust_seconds") <= TTL
        assert kept.get(timeout=BOUND) == 1
        served.shows(0, "held", task="retrying")
        served.shows(1, "hold_seconds_count", task="retrying")
        assert 1.1 < served.value("hold_seconds_sum", task="retrying") < BOUND
        assert served.value("hold_seconds_bucket", task="retrying", le="1.0") == 0
        assert served.value("lost_total", task="retrying") == 0
        made.revoke_the_holders_lease("lost_warns/-")
        served.shows(1, "lost_total", task="lost_warns")
        served.shows(0, "held", task="lost_warns")
        served.shows(0, "oldest_hold_seconds", task="lost_warns")
        assert served.value("hold_seconds_count", task="lost_warns") == 1
        served.shows(0, "session_trust_seconds")
        assert not loses.ready()
        assert served.project.send("retrying", 2).get(timeout=BOUND) == 2

    def test_labels_know_no_keys(self, served: Measured) -> None:
        """However many keys there are, the series stay as many; a scrape costs the same."""
        made = served.project
        warm = [made.send("retrying", 0, 0.5, key=f"confidential-{each}") for each in "abc"]
        assert [each.get(timeout=BOUND) for each in warm] == [0] * 3
        before = set(served.scrape())
        sent = [made.send("retrying", number, 0.0, key=f"confidential-{number}") for number in range(40)]
        assert [each.get(timeout=BOUND) for each in sent] == list(range(40))
        after = set(served.scrape())
        assert after == before
        assert {name for _, labels in after for name, _ in labels} == {"task", "outcome", "le"}
        assert {dict(labels).get("task", "") for _, labels in after} <= {"", *names_of_tasks(made)}
        assert not [value for _, labels in after for _, value in labels if "confidential" in value]


def names_of_tasks(made: Project) -> set[str]:
    return {run.task for run in made.runs()} | {"skipping", "failing", "gives_up"}


class TestPrefork(EveryPool):
    def test_a_killed_child_holds_nothing(self, prefork: Measured) -> None:
        """Its gauges go with it; what it has counted stays."""
        made = prefork.project
        assert made.send("in_slot", 1, 0.0, key="killed").get(timeout=BOUND) == 1
        counted = prefork.value("hold_seconds_count", task="in_slot")
        result = made.send("in_slot", 2, 600.0, key="killed")
        (run,) = until(lambda: [run for run in made.runs("in_slot") if run.id == result.id], "the start")
        prefork.shows(1, "held", task="in_slot")
        prefork.exceeds(0, "oldest_hold_seconds", task="in_slot")
        os.kill(run.pid, signal.SIGKILL)
        until(lambda: prefork.value("held", task="in_slot") <= 0, "the end of what it held")
        until(lambda: prefork.value("oldest_hold_seconds", task="in_slot") <= 0, "the end of its age")
        assert prefork.value("hold_seconds_count", task="in_slot") == counted
        folder = made.folder / "metrics"
        assert list(folder.glob(f"counter_{run.pid}.db"))
        assert not list(folder.glob(f"gauge_live*_{run.pid}.db"))

    def test_an_ended_child_leaves_what_it_has_counted_to_the_others(self, prefork: Measured) -> None:
        """However many have ended, there is one file of each kind for them all; nothing is counted twice or lost."""
        made, folder = prefork.project, prefork.project.folder / "metrics"
        result = made.send("retrying", 1, key="ended")
        assert result.get(timeout=BOUND) == 1
        (run,) = (run for run in made.runs("retrying") if run.id == result.id)
        counted = prefork.value("hold_seconds_count", task="retrying")
        os.kill(run.pid, signal.SIGTERM)
        until(lambda: not list(folder.glob(f"*_{run.pid}.db")), "the end of its files")
        assert prefork.value("hold_seconds_count", task="retrying") == counted
        assert (folder / "histogram_ended.db").exists()

    def test_a_prometheus_reads_them(self, prefork: Measured) -> None:
        """By its HTTP API, from a worker that it scrapes."""
        made = prefork.project
        server = prefork.prometheus
        if not isinstance(server, PrometheusServer):
            do_without(server)
        with prefork.held_by_us("skipping"):
            made.send("waiting", 1, 600.0, key="long")
            until(lambda: one(server, 'celery_etcd_lock_held{job="celery",task="waiting"}') == 1, "the lock held")
            before = prefork.value("conflicts_total", task="skipping", outcome="skip")
            assert made.send("skipping", 1).get(timeout=BOUND) == "skipped"
            skips = 'sum by (task, outcome) (celery_etcd_lock_conflicts_total{task="skipping"})'
            until(lambda: one(server, skips) == max(before, 0) + 1, "the skip")


def one(server: PrometheusServer, expression: str) -> float | None:
    """The value of the one series there is, if there is one."""
    found = server.query(expression)
    return float(found[0]["value"][1]) if found else None


class TestThreads(EveryPool):
    pass


def test_beat_says_that_it_leads(new_project: NewProject) -> None:
    """From its own process, which serves them itself."""
    made, port = new_project(imports=["measured"]), free_port()
    command = [sys.executable, "-m", "celery", "-A", "project", "beat", "-S", "celery_etcd_lock.beat:EtcdScheduler"]
    with (made.folder / "beat.log").open("wb") as log:
        beat = subprocess.Popen(
            command, env={**made.environment, "METRICS_PORT": str(port)}, cwd=made.folder, stdout=log, stderr=log
        )
    try:

        def leads() -> bool:
            assert beat.poll() is None, (made.folder / "beat.log").read_text()
            return answers(port) and value(port, "beat_leader", beat="default") == 1

        until(leads, "its election")
    finally:
        beat.kill()
        beat.wait()


def test_prefork_needs_multiprocess_mode(new_project: NewProject) -> None:
    """Else the counts would be in children, where nobody reads them: the worker says so and does not start."""
    worker = new_project(imports=["measured"]).worker("-P", "prefork", "-c", "1", ready=False)
    assert worker.process.wait(60) != 0
    assert "set PROMETHEUS_MULTIPROC_DIR to an empty folder before the worker starts" in worker.output
    assert "Traceback" not in worker.output
