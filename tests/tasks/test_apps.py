"""Locks for whole apps: every task of one, two in one process, one key for several tasks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from celery import Celery, chord

from celery_etcd_lock import Conflict, LockContended, SingletonTask, singleton_task
from celery_etcd_lock.etcd.api import Range, Watch, prefix_end
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.tasks.runtime import Runtime
from celery_etcd_lock.testing import EtcdServer, held_elsewhere
from tests.servers import RedisServer
from tests.tasks.shaped_tasks import make
from tests.workers import Project, overlaps, project

NewProject = Callable[..., Project]

BOUND = 120
"""Seconds, several times what anything here takes."""


@pytest.fixture(scope="module")
def running(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Every task is a singleton; results are in files, so that chords need ``celery.chord_unlock``."""
    folder = tmp_path_factory.mktemp("everything")
    (folder / "results").mkdir()
    settings = {"imports": ["shaped_tasks"], "task_cls": "celery_etcd_lock:SingletonTask"}
    with project(redis.url, etcd.url, folder, backend_url=f"file://{folder / 'results'}", **settings) as made:  # type: ignore[arg-type,unused-ignore]
        made.app.conf.result_chord_retry_interval = 0.1
        make(made.app)
        made.worker("-P", "threads", "-c", "4")
        yield made


class TestEverything:
    def test_celerys_own_tasks_take_no_lock(self, running: Project) -> None:
        """A chord that is unlocked by polling, `celery.backend_cleanup`, `celery.map`: all run, none has locked."""
        with closing(running.connect()) as transport:
            since = transport.range(Range("/", limit=1)).header.revision
            plain, total = running.app.tasks["plain"], running.app.tasks["total"]
            assert chord([plain.s(number) for number in range(3)], total.s()).delay().get(timeout=BOUND) == 3
            assert running.send("celery.backend_cleanup").get(timeout=BOUND) is None
            mapped = running.app.send_task("celery.map", kwargs={"task": plain.s(), "it": [1, 2]})
            assert mapped.get(timeout=BOUND) == [1, 2]
            assert "celery.chord_unlock" in running.workers[0].output
            prefix, seen = f"/{running.queue}/locks/", set[str]()
            stream = transport.watch(Watch(prefix, prefix_end(prefix), start_revision=since + 1))
            for reply in stream:
                seen |= {event.kv.key[len(prefix) :].split("/")[0] for event in reply.events}
                if "total" in seen:
                    break
            stream.close()
        assert seen == {"plain", "total"}

    def test_a_users_do(self, running: Project) -> None:
        """A plain ``@app.task`` runs once at a time for the same arguments, and beside itself for others."""
        results = [running.send("any", number, 0.7) for number in (1, 1, 2)]
        assert [result.get(timeout=BOUND) for result in results] == [1, 1, 2]
        runs = running.runs("any")
        assert overlaps([run for run in runs if run.number == 1]) == []
        assert all(run.key for run in runs)

    def test_by_assignment(self) -> None:
        """``app.Task = SingletonTask`` is the same."""
        app: Any = Celery("assigned", set_as_current=False)
        app.Task = SingletonTask

        @app.task(name="mine")
        def mine() -> None: ...

        @app.task(name="mine_too", base=SingletonTask, on_conflict="skip")
        def mine_too() -> None: ...

        @singleton_task(app=app, name="decorated")
        def decorated() -> None: ...

        assert all(isinstance(app.tasks[name], SingletonTask) for name in ("mine", "mine_too", "decorated"))
        assert app.tasks["mine"].lock_name() == "/celery/locks/mine/-"
        assert {name for name, task in app.tasks.items() if task._key_rule is None} == {
            name for name in app.tasks if name.startswith("celery.")
        }


@pytest.fixture
def two() -> Iterator[tuple[Any, Any]]:
    """Two apps with a store and a namespace each."""
    made: list[Any] = []
    for name in ("one", "two"):
        app: Any = Celery(name, broker="memory://", backend="cache+memory://", set_as_current=False)
        app.conf.update(
            etcd_lock_endpoints=f"memory://{name}", etcd_lock_namespace=name, task_always_eager=True,
            etcd_lock_eager=True, etcd_lock_ttl=20 if name == "one" else 40, task_default_queue=name,
        )  # fmt: skip
        made.append(app)
    yield made[0], made[1]
    for app in made:
        Runtime.of(app).close()
        app.close()


def keys(store: str) -> list[str]:
    transport = MemoryTransport(MemoryEtcd.shared(f"memory://{store}"))
    return [kv.key for kv in transport.range(Range("/", "0")).kvs]


class TestTwoInOneProcess:
    def test_a_shared_task_locks_where_its_app_does(self, two: tuple[Any, Any]) -> None:
        """The same function on both: each copy has its app's etcd, namespace and settings, and is in nobody's way."""
        one, other = two

        @singleton_task(name="both", bind=True, on_conflict="fail")
        def both(self: Any) -> tuple[str, int]:
            return self.lock.name, Runtime.of(self.app).session().ttl

        assert one.tasks["both"].apply().get() == ("/one/locks/both/-", 20)
        assert other.tasks["both"].apply().get() == ("/two/locks/both/-", 40)
        with held_elsewhere(one.tasks["both"]):
            with pytest.raises(LockContended):
                one.tasks["both"].apply(throw=True)
            assert other.tasks["both"].apply().get()[0] == "/two/locks/both/-"

    def test_one_ends_by_itself(self, two: tuple[Any, Any]) -> None:
        """Closing one app's session leaves the other's; the next lock opens a new one."""
        for app in two:

            @app.task(base=SingletonTask, name="own", shared=False)
            def own() -> None: ...

            app.tasks["own"].apply().get()
        assert [keys(name)[0].startswith(f"/{name}/sessions/") for name in ("one", "two")] == [True, True]
        Runtime.of(two[0]).close()
        assert keys("one") == []
        assert len(keys("two")) == 1
        two[0].tasks["own"].apply().get()
        assert len(keys("one")) == 1

    def test_both_at_once(self, two: tuple[Any, Any]) -> None:
        """A thread for each app: the same task runs in both at the same time, under a lock of each."""
        meeting = threading.Barrier(2, timeout=BOUND)
        for app in two:

            @app.task(base=SingletonTask, name="meets", bind=True, shared=False)
            def meets(self: Any) -> str:
                meeting.wait()
                return str(self.lock.name)

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda app: app.tasks["meets"].apply().get(), two))
        assert results == ["/one/locks/meets/-", "/two/locks/meets/-"]


def test_one_key_for_several_tasks(two: tuple[Any, Any]) -> None:
    """A key of their own in three modes, by names of parameters that differ: who excludes whom is the modes' affair."""
    app = two[0]

    def task(name: str, **options: Any) -> Any:
        @app.task(base=SingletonTask, name=name, on_conflict="fail", **options)
        def body(number: int, other: int = 0) -> str:
            return "ran"

        return app.tasks[name]

    @app.task(base=SingletonTask, name="by_account", lock_key="/x/{account}", on_conflict=Conflict.skip(result="no"))
    def by_account(account: int) -> str:
        return "ran"

    writes, reads = task("writes", lock_key="/x/{number}"), task("reads", lock_key="/x/{number}", lock_mode="shared")
    limited = task("limited", lock_key="/x/{number}", lock_limit=2)
    elsewhere = task("elsewhere", lock_key="x/{number}")
    names = {each.lock_name((7,)) for each in (writes, reads, limited, by_account)}
    assert names == {"/one/locks/@shared/x%2F7"}
    with held_elsewhere(reads, 7):
        assert reads.apply((7, 1)).get() == "ran"
        assert by_account.apply((7,)).get() == "no"
        assert by_account.apply((8,)).get() == "ran"
        assert elsewhere.apply((7,)).get() == "ran", "a key under its own name"
        for kept_out in (writes, limited):
            with pytest.raises(LockContended):
                kept_out.apply((7,), throw=True)
    with held_elsewhere(limited, 7):
        assert limited.apply((7,)).get() == "ran"
        for kept_out in (writes, reads):
            with pytest.raises(LockContended):
                kept_out.apply((7,), throw=True)
    with held_elsewhere(by_account, 7):
        for kept_out in (writes, reads, limited):
            with pytest.raises(LockContended):
                kept_out.apply((7,), throw=True)
    assert writes.apply((7,)).get() == "ran"
