"""``celery etcd-lock release``: asking real holders in real workers for their locks, and what came of it."""

from __future__ import annotations

import importlib
import os
import re
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from celery_etcd_lock import LockLost, SingletonTask
from celery_etcd_lock.etcd.api import Put, Txn
from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.queue import EXCLUSIVE
from celery_etcd_lock.testing import EtcdServer
from tests.cli.conftest import Command
from tests.quota import fill, small_etcd
from tests.servers import RedisServer
from tests.workers import Project, Run, project, until

Release = Callable[..., Result]


@pytest.fixture
def key() -> str:
    """The key of a lock that is this test's alone."""
    return uuid.uuid4().hex


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[Release]:
    """Runs the command here, for the project's etcd; it gives up sooner than it does for people."""
    module = importlib.import_module("celery_etcd_lock.cli.release")
    monkeypatch.setattr(module, "_BESIDES", 1.0)
    made: list[Celery] = []

    def release_(project: Project, *arguments: str) -> Result:
        app = Celery("asks", set_as_current=False)
        made.append(app)
        app.conf.update(etcd_lock_endpoints=project.etcd_url, etcd_lock_namespace=project.queue)
        app.task(base=SingletonTask, name="limited_in_turn", unique_on="key", lock_limit=2)(_limited)
        context = CLIContext(app=app, no_color=True, workdir=None)
        return CliRunner().invoke(module.release, arguments, obj=context, catch_exceptions=False)

    yield release_
    for app in made:
        app.close()


def _limited(number: int, seconds: float = 0, key: str = "k") -> None:
    raise AssertionError("must not run here")


def run_of(project: Project, key: str, number: int) -> Run:
    found = until(lambda: [run for run in project.runs() if key in run.key and run.number == number], "the start")
    run: Run = found[0]
    return run


def test_a_run_is_ended_and_the_next_gets_the_lock(working: Project, run: Callable[..., Command], key: str) -> None:
    """The command as people have it: the run ends with a LockLost that names who asked, and the next one runs."""
    held = working.send("waiting", 1, 600.0, key)
    run_of(working, key, 1)
    following = working.send("waiting", 2, 2.0, key)
    until(lambda: len(working.keys(f"locks/waiting/key={key}/")) == 2, "the next one in line")
    released = run("release", "waiting", f'{{"key": "{key}"}}')
    with pytest.raises(LockLost, match=r"@.* asked for it back"):
        held.get(timeout=60)
    assert following.get(timeout=60) == 2
    assert released.wait() == 0, released.out + released.err
    outcome, next_one = released.out.splitlines()
    assert outcome.endswith(f"for waiting[{held.id}]: has given it back")
    assert next_one.startswith(f"waiting key={key} is ")
    assert released.err.count("asked, and looks within 3 s: ") == 1, "one line in a pipe, however long it takes"
    assert working.keys("asked/") == []


def test_a_run_that_goes_on(working: Project, release: Release, key: str) -> None:
    """`on_lost="warn"`: the holder was told, and goes on; the lock stays taken until its end."""
    held = working.send("lost_warns", 1, 600.0, key)
    name = run_of(working, key, 1).key.rpartition("/write/")[0]
    result = release(working, name)
    assert result.exit_code == 1
    assert f'[{held.id}]: was told, and goes on: its on_lost is "warn"' in result.output
    assert "is still held. --force deletes its key" in result.output
    assert "fencing tokens" in result.output
    assert working.keys(name.removeprefix(f"/{working.queue}/")), "nothing was touched"


def test_a_command_under_hold_is_ended(
    working: Project, release: Release, run: Callable[..., Command], key: str
) -> None:
    """And says why, with the exit status of a lock that was lost."""
    hold = run("hold", "waiting", f'{{"key": "{key}"}}', "--", "sleep", "600")
    until(lambda: "holding" in hold.err, "the hold")
    result = release(working, f"/{working.queue}/locks/waiting/key={key}")
    assert result.exit_code == 0
    assert re.search(
        r"for etcd-lock hold: sleep …: (has given it back|no longer has it: its lease has ended)\n", result.output
    )
    assert result.output.endswith(f"waiting key={key} is free\n")
    assert hold.wait() == 125
    assert "asked for it back. Ending sleep" in hold.err


def test_every_holder_of_a_limited_lock_is_asked_and_who_waits_is_not(
    working: Project, release: Release, key: str
) -> None:
    """Two are in, the third waits, and gets in."""
    held = [working.send("limited_in_turn", number, 600.0, key) for number in (1, 2)]
    name, _ = (run_of(working, key, number).key.rpartition("/slot/")[0] for number in (1, 2))
    third = working.send("limited_in_turn", 3, 0.5, key)
    until(lambda: len(working.keys(f"locks/limited_in_turn/key={key}/")) == 3, "the third in line")
    result = release(working, name)
    assert result.exit_code == 0, result.output
    asked = [line for line in result.output.splitlines() if line.endswith("has given it back")]
    assert len(asked) == 2
    for each in held:
        with pytest.raises(LockLost, match="asked for it back"):
            each.get(timeout=60)
    assert third.get(timeout=60) == 3


def test_a_stranger_cannot_be_asked(working: Project, release: Release, key: str) -> None:
    """It says so at once. With ``--force`` the key goes, and whoever waits gets the lock."""
    name = f"/{working.queue}/locks/waiting/key={key}"
    with closing(working.connect()) as transport:
        lease = transport.lease_grant(60).lease
        transport.txn(Txn([], [Put(f"{name}/{lease:x}", b"", lease), Put(f"/{working.queue}/locks/x/y/1", b"")]))
        following = working.send("waiting", 1, 0.0, key)
        result = release(working, name)
        assert result.exit_code == 1
        assert f"another etcd client (lease {lease:x}): cannot be asked" in result.output
        assert "(0 s)" not in result.output
        assert "without a lease, which stays" in release(working, f"/{working.queue}/locks/x/y").output
        result = release(working, name, "--force")
        assert result.exit_code == 0
        assert "its key was deleted" in result.output
        assert following.get(timeout=60) == 1
        transport.lease_revoke(lease)


def test_the_time_that_a_lock_stays_taken(working: Project, release: Release, key: str) -> None:
    """Nobody is there to be asked: it says how long it is, and ``--force`` ends it early."""
    name = f"/{working.queue}/locks/waiting/key={key}"
    with Session.open(working.etcd_url, namespace=working.queue) as session:
        acquire(session, name, EXCLUSIVE, at_least_for=60).release()
        result = release(working, name)
        assert result.exit_code == 1
        assert "has ended, and its lock_at_least_for keeps the lock taken for" in result.output
        assert "ends this time early" in result.output
        assert release(working, name, "--force").exit_code == 0
        Mutex(session, name).acquire(blocking=False).release()


def test_a_frozen_worker_is_released_by_force_only(
    redis: RedisServer, etcd: EtcdServer, tmp_path: Path, release: Release, key: str
) -> None:
    """SIGSTOP: it does not answer, and its lease has long to live. By force the next one gets the lock at once."""
    with project(redis.url, etcd.url, tmp_path, etcd_lock_ttl=30) as own:
        own.worker("-P", "solo")
        own.send("waiting", 1, 600.0, key)
        frozen = run_of(own, key, 1)
        name = frozen.key.rpartition("/write/")[0]
        os.kill(frozen.pid, signal.SIGSTOP)
        result = release(own, name, "--wait", "0.3")
        assert result.exit_code == 1
        assert "has not answered: it is stopped or cut off" in result.output
        assert own.keys("asked/") == [], "the question was taken back"
        result = release(own, name, "--force", "--wait", "0.3")
        assert result.exit_code == 0
        assert "two run at once" in result.output
        assert "within its TTL (30 s)" in result.output
        assert f"waiting key={key} is free" in result.output
        with Session.open(etcd.url) as session:
            Mutex(session, name).acquire(blocking=False).release()
        assert release(own, name).output == f"nobody holds waiting key={key}\n"


def test_a_dead_endpoint_is_told(release: Release, working: Project) -> None:
    """Within the timeout, in one line, and not as a traceback."""
    dead = Project(working.broker_url, "http://127.0.0.1:1", working.folder, dict(working.settings))
    result = release(dead, "/celery/locks/waiting/-")
    assert result.exit_code == 1
    assert result.output.startswith("Error: no etcd there")


def test_an_etcd_that_is_full_takes_no_question(release: Release, tmp_path: Path, key: str) -> None:
    """It says so, and by force the lock comes free all the same."""
    with small_etcd() as full, project("memory://", full.url, tmp_path, backend_url="cache+memory://") as own:
        name = f"/{own.queue}/locks/waiting/key={key}"
        with Session.open(full.url, namespace=own.queue) as session:
            Mutex(session, name).acquire()
            fill(full)
            assert "cannot be asked: " in release(own, name).output
            assert release(own, name, "--force").exit_code == 0
            assert own.keys("locks/") == []
