"""What other people's tests get, used as they would use it: in a project and a pytest of its own."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_etcd_lock import EtcdUnavailable, LockContended, SingletonTask
from celery_etcd_lock.etcd.api import Range
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.testing import held_elsewhere, memory_locks

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[1]
TASKS = """
    from celery import Celery
    from celery_etcd_lock import LockContended, SingletonTask, singleton_task

    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=True)
    app.conf.update(task_always_eager=True, task_eager_propagates=True, etcd_lock_eager=True)
    app.conf.etcd_lock_endpoints = "http://127.0.0.1:9"  # nobody is there

    @singleton_task(unique_on="order", on_conflict="skip")
    def ship(order, by="post"):
        return f"{order} by {by}"

    @app.task(base=SingletonTask, on_conflict="fail")
    def report(day):
        return day
"""


def run(pytester: pytest.Pytester, tests: str, *arguments: str, plugin: bool = True) -> pytest.RunResult:
    """`tests`, run by a pytest that has the plugin, of a project that has `TASKS`."""
    pytester.makepyfile(tasks=textwrap.dedent(TASKS), test_it=textwrap.dedent(tests))
    ours = ("-p", "celery_etcd_lock.pytest_plugin") if plugin else ()
    return pytester.runpytest_subprocess(*ours, "-p", "no:cacheprovider", *arguments)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def test_locks_in_memory_and_one_held_by_somebody_else(pytester: pytest.Pytester) -> None:
    """With `etcd_lock_memory` tasks run and lock without etcd, and a test can hold a task's lock against them."""
    outcome = run(
        pytester,
        """
        import pytest
        from celery_etcd_lock import LockContended
        from celery_etcd_lock.testing import held_elsewhere
        from tasks import report, ship

        pytestmark = pytest.mark.usefixtures("etcd_lock_memory")

        def test_they_run():
            assert ship.delay(1).get() == "1 by post"
            assert report.delay("monday").get() == "monday"

        def test_held():
            with held_elsewhere(ship, 1) as held:
                assert held.key.startswith("/celery/locks/tasks.ship/order=1/")
                assert ship.delay(1, by="air").get() is None
                assert ship.delay(2).get() == "2 by post"
            assert ship.delay(1).get() == "1 by post"

        def test_held_fails():
            with held_elsewhere(report, day="monday"), pytest.raises(LockContended) as contended:
                report.delay("monday")
            assert contended.value.key.endswith("day=monday")
        """,
    )
    outcome.assert_outcomes(passed=3)


def test_without_the_fixture_nothing_changes(pytester: pytest.Pytester) -> None:
    """A test that does not ask for it talks to the etcd that is set: here there is none."""
    outcome = run(
        pytester,
        """
        import pytest
        from celery_etcd_lock import EtcdUnavailable
        from tasks import ship

        def test_in_memory(etcd_lock_memory):
            assert ship.delay(1).get() == "1 by post"

        def test_not():
            with pytest.raises(EtcdUnavailable):
                ship.delay(1)
        """,
    )
    outcome.assert_outcomes(passed=2)


def test_a_real_etcd(pytester: pytest.Pytester, etcd: Any) -> None:
    """`etcd_server` is one, and the tasks of an app that is pointed at it lock there."""
    outcome = run(
        pytester,
        """
        import pytest
        from celery_etcd_lock import LockContended
        from celery_etcd_lock.locks import Mutex, Session
        from celery_etcd_lock.testing import held_elsewhere
        from tasks import app, ship

        @pytest.fixture(autouse=True)
        def there(etcd_server):
            app.conf.etcd_lock_endpoints = etcd_server.url

        def test_locked_there(etcd_server):
            with held_elsewhere(ship, 1) as held, Session.open(etcd_server.url) as session:
                assert ship.delay(1).get() is None
                with pytest.raises(LockContended):
                    Mutex(session, held.name).acquire(blocking=False)
            assert ship.delay(1).get() == "1 by post"
        """,
    )
    outcome.assert_outcomes(passed=1)


def test_with_celerys_own_worker(pytester: pytest.Pytester) -> None:
    """In the worker of `celery.contrib.pytest`, a thread of the test's process, tasks lock in memory too."""
    outcome = run(
        pytester,
        """
        import pytest
        from celery.exceptions import Ignore
        from celery_etcd_lock import LockContended, SingletonTask
        from celery_etcd_lock.testing import held_elsewhere

        @pytest.fixture
        def celery_config():
            return {"broker_url": "memory://", "result_backend": "cache+memory://"}

        @pytest.fixture
        def where(celery_app):
            @celery_app.task(base=SingletonTask, bind=True, name="where", on_conflict="fail")
            def where(self, number):
                self.lock.assert_held()
                return self.lock.key

            return where

        @pytest.fixture
        def celery_worker_parameters():
            return {"perform_ping_check": False}

        def test_it(etcd_lock_memory, where, celery_worker):
            assert where.delay(1).get(timeout=60).startswith("/celery/locks/where/number=1/write/")
            with held_elsewhere(where, 1), pytest.raises(LockContended):
                where.delay(1).get(timeout=60)
            assert where.delay(1).get(timeout=60)
        """,
        "-p", "celery.contrib.pytest",
    )  # fmt: skip
    outcome.assert_outcomes(passed=1)


def test_eager_runs_and_memory_need_no_etcd(pytester: pytest.Pytester) -> None:
    """Without the plugin: an eager task runs, unlocked, where no etcd is; with ``memory://`` it locks."""
    outcome = run(
        pytester,
        """
        import pytest
        from celery_etcd_lock import LockContended
        from celery_etcd_lock.settings import Settings
        from celery_etcd_lock.testing import held_elsewhere
        from tasks import app, report, ship

        def test_eager():
            app.conf.etcd_lock_eager = False
            assert ship.delay(1).get() == "1 by post"
            assert report.apply_async(("monday",), on_conflict="wait", lock_at_least_for=9).get() == "monday"

        def test_memory():
            Settings.forget(app)
            app.conf.update(etcd_lock_endpoints="memory://", etcd_lock_eager=True)
            assert report.delay("monday").get() == "monday"
            with held_elsewhere(report, "monday"), pytest.raises(LockContended):
                report.delay("monday")
        """,
        plugin=False,
    )
    outcome.assert_outcomes(passed=2)


@pytest.fixture
def app() -> Any:
    made: Any = Celery("ours", broker="memory://", backend="cache+memory://")
    made.conf.update(etcd_lock_endpoints="http://127.0.0.1:9", task_always_eager=True, etcd_lock_eager=True)
    return made


def test_one_store_a_block(app: Any) -> None:
    """What one block holds is not there in the next, and nothing is left behind by either."""

    @app.task(base=SingletonTask, name="once", on_conflict="fail")
    def once() -> str:
        return "ran"

    with memory_locks() as first:
        Session(MemoryTransport(first), ttl=30)
        with held_elsewhere(once):
            assert isinstance(once.delay().result, LockContended)
            with memory_locks() as second:
                assert once.delay().get() == "ran"
        assert once.delay().get() == "ran"
        assert not MemoryTransport(first).range(Range("/celery/locks/", "/celery/locks0")).kvs
        assert not MemoryTransport(second).range(Range("/celery/", "/celery0")).kvs


def test_readers_beside_it(app: Any) -> None:
    """A shared task's lock is held shared: another reader runs beside it, a writer of the same name does not."""

    @app.task(base=SingletonTask, name="reads", lock_mode="shared", on_conflict="fail")
    def reads() -> str:
        return "read"

    with memory_locks(), held_elsewhere(reads) as held, Session.from_app(app) as session:
        assert reads.delay().get() == "read"
        with pytest.raises(LockContended):
            Mutex(session, held.name).acquire(blocking=False)


def test_of_no_singleton_task(app: Any) -> None:
    """What has no lock cannot be held."""

    @app.task(name="plain")
    def plain() -> None: ...

    with pytest.raises(TypeError, match="no singleton task"), held_elsewhere(plain):
        pass


def test_a_session_of_the_apps_settings(app: Any) -> None:
    """`Session.from_app` takes TTL and namespace from the app, and closes what it opened."""
    app.conf.update(etcd_lock_endpoints="memory://from-app", etcd_lock_namespace="shop", etcd_lock_ttl=17)
    with Session.from_app(app) as session:
        assert session.key.startswith("/shop/sessions/")
        assert session.transport.lease_time_to_live(session.lease).granted_ttl == 17
        Mutex(session, "/by-hand").acquire(blocking=False).release()
        transport = session.transport
    assert not MemoryTransport(MemoryEtcd.shared("memory://from-app")).range(Range("/shop/", "/shop0")).kvs
    with pytest.raises(EtcdUnavailable, match="closed"):
        transport.status()
