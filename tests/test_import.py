"""What an import of the package does, and does not, and what it costs those who import it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import celery_etcd_lock
from celery_etcd_lock import exceptions, locks
from celery_etcd_lock.tasks import conflict, current, decorator, task
from tests.cli.installed import metadata

ROOT = str(Path(__file__).parents[1])

OURS = 'json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] == "celery_etcd_lock"))'
RECEIVERS = """
def receivers(signal):
    return [f"{each.__module__}.{each.__name__}" for _, each in signal.receivers]
"""


def python(code: str, path: str = ROOT) -> Any:
    """What `code` prints, as JSON, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH", "")]))}
    code = "import json, sys\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_thread_and_no_socket() -> None:
    """Neither from an import nor from the first use of each public name: processes that fork later import it."""
    code = """
import threading
done = []
def notice(event, arguments):
    if event.startswith("socket.") or event in ("os.fork", "subprocess.Popen"):
        done.append(event)
def start(thread, start=threading.Thread.start):
    done.append("a thread")
    start(thread)
sys.addaudithook(notice)
threading.Thread.start = start
import celery_etcd_lock, celery_etcd_lock.signals, celery_etcd_lock.cli, celery_etcd_lock.tasks.guard
from celery_etcd_lock import *
from celery_etcd_lock.locks import *
ours = list(done)
import socket
socket.socket().close(); threading.Thread(target=int).start()  # which would be noticed
print(json.dumps([ours, done]))
"""
    ours, noticed = python(code)
    assert ours == []
    assert noticed == ["socket.__new__", "a thread"]


@pytest.mark.parametrize(
    ("before", "wanted"),
    [("", ["celery_etcd_lock"]), ("from celery import Celery", ["celery_etcd_lock", "celery_etcd_lock.tasks"])],
    ids=["alone", "after Celery"],
)
def test_an_import_brings_next_to_nothing(before: str, wanted: list[str]) -> None:
    """Whatever a public name needs comes with that name; Celery does not come with the package."""
    modules = python(f"{before}\nimport celery_etcd_lock\nprint({OURS})")
    assert modules == wanted
    assert python("import celery_etcd_lock\nprint(json.dumps('celery' in sys.modules))") is False


def test_locks_bring_neither_celery_nor_the_wire() -> None:
    """Who only takes locks has no part of Celery, and of the wire what a session asks for."""
    code = "from celery_etcd_lock.locks import *\nprint(json.dumps([n for n in sys.modules if '.' not in n]))"
    assert not {"celery", "kombu", "billiard", "click", "urllib3", "grpc", "google"} & set(python(code))


def test_celery_itself_loads_next_to_nothing_of_ours(tmp_path: Path) -> None:
    """`celery` imports the entry point at every start, whatever it is asked for."""
    path = os.pathsep.join([str(metadata(tmp_path)), ROOT])
    modules = python(
        f"from celery.bin.celery import celery\nassert 'etcd-lock' in celery.commands\nprint({OURS})", path
    )
    assert modules == ["celery_etcd_lock", "celery_etcd_lock.cli", "celery_etcd_lock.tasks"]


TASK = """
from celery import Celery
app = Celery("app", broker="memory://")
def body(): pass
"""
PLAIN = TASK + "task = app.task(name='task')(body); app.finalize(); "
SINGLETON = TASK + (
    "from celery_etcd_lock import singleton_task; task = singleton_task(name='task', app=app)(body); app.finalize(); "
)
TAKES_TIME = ("difflib", "hashlib", "http", "secrets", "shlex", "subprocess", "urllib3")
"""Of others' modules, those that were loaded once, or would be, long before they are needed."""


@pytest.mark.parametrize("then", ["", "task.delay(); "], ids=["made", "published"])
def test_a_task_brings_nothing_that_takes_locks(then: str) -> None:
    """A process that only publishes it does without: all that comes with the first lock."""
    modules, theirs = (
        set(python(f"{program}{then}print(json.dumps(list(sys.modules)))")) for program in (SINGLETON, PLAIN)
    )
    ours = {name.removeprefix("celery_etcd_lock.") for name in modules if name.startswith("celery_etcd_lock.")}
    assert ours == {
        "etcd", "etcd.api", "events", "exceptions", "locks", "locks.queue", "logs", "settings", "signals", "tasks",
        "tasks.canonical", "tasks.conflict", "tasks.current", "tasks.decorator", "tasks.discarded", "tasks.keys",
        "tasks.message", "tasks.options", "tasks.publish", "tasks.task",
    }  # fmt: skip
    brought = {name for name in modules - theirs if name.partition(".")[0] in TAKES_TIME}
    assert brought <= ({"secrets", "hashlib"} if then else set())


def test_a_worker_has_it_all_before_it_forks() -> None:
    """Else each of its children would import it, and have it in memory of its own."""
    before, after = python(
        f"""{SINGLETON}
import celery_etcd_lock.worker
before = {OURS}
app.conf.update(etcd_lock_endpoints="memory://", etcd_lock_eager=True)
held = []
task.run = lambda: held.append(task.lock.key)
task.apply().get()
assert held[0]
print("[" + before + "," + {OURS} + "]")
"""
    )
    assert "celery_etcd_lock.etcd.gateway" in before
    assert set(after) - set(before) == {"celery_etcd_lock.etcd.keyspace", "celery_etcd_lock.etcd.memory"}


def test_the_import_costs_less_than_50_ms() -> None:
    """Beside `import celery` alone, which imports hardly anything of Celery, turn by turn."""
    taken: dict[str, list[float]] = {"import celery": [], "import celery, celery_etcd_lock": []}
    for _ in range(9):
        for code, times in taken.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": ROOT}, check=True)
            times.append(time.perf_counter() - began)
    without, with_it = (statistics.median(times) for times in taken.values())
    assert with_it - without < 0.05, f"{without * 1000:.0f} ms, {with_it * 1000:.0f} ms with us"


class TestNames:
    def test_each_is_the_one_of_its_own_module(self) -> None:
        """One object, wherever it is taken from, the second time too."""
        homes = (exceptions, conflict, current, decorator, task)
        for name in celery_etcd_lock.__all__:
            first = getattr(celery_etcd_lock, name)
            assert getattr(celery_etcd_lock, name) is first
            assert [vars(home)[name] for home in homes if name in home.__all__] == [first]

    def test_all_of_them_by_a_star(self) -> None:
        """And they are listed before any was asked for."""
        listed, taken = python(
            "import celery_etcd_lock\nlisted = dir(celery_etcd_lock)\nspace = {}\n"
            "exec('from celery_etcd_lock import *', space)\nprint(json.dumps([listed, sorted(space)]))"
        )
        assert set(celery_etcd_lock.__all__) <= set(listed)
        assert set(taken) - {"__builtins__"} == set(celery_etcd_lock.__all__)

    def test_no_other(self) -> None:
        """The usual errors, as of a module that has all its names."""
        with pytest.raises(AttributeError, match="module 'celery_etcd_lock' has no attribute 'singelton_task'"):
            _ = celery_etcd_lock.singelton_task  # type: ignore[attr-defined]
        with pytest.raises(ImportError, match="cannot import name 'singelton_task' from 'celery_etcd_lock'"):
            from celery_etcd_lock import singelton_task  # type: ignore[attr-defined]  # noqa: F401


class TestNamesOfLocks:
    def test_each_is_the_one_of_its_own_module(self) -> None:
        """All of them, whichever was asked for first, and no other."""
        for name in locks.__all__:
            first = getattr(locks, name)
            assert getattr(locks, name) is first
            assert vars(sys.modules[first.__module__])[name] is first
            assert first.__module__.startswith("celery_etcd_lock.locks.")
        assert set(locks.__all__) <= set(dir(locks))
        with pytest.raises(AttributeError, match="has no attribute 'Mutexes'"):
            _ = locks.Mutexes  # type: ignore[attr-defined]


class TestWhoListens:
    """What works by listening is there once anything is, in whichever order a project imports it."""

    @pytest.mark.parametrize(
        "code",
        [
            "from celery_etcd_lock import singleton_task",
            "from celery_etcd_lock import SingletonTask",
            "import celery; from celery_etcd_lock import singleton_task; from celery import Celery",
            "from celery_etcd_lock.compat import Singleton",
            "from celery_etcd_lock.beat import EtcdScheduler",
        ],
    )
    def test_with_tasks_or_a_beat(self, code: str) -> None:
        """Settings are checked by workers; the log, events and discarded messages are seen to."""
        init, acquired, revoked, elected = python(
            f"{code}{RECEIVERS}\nfrom celery.signals import worker_init, task_revoked\n"
            "from celery_etcd_lock.signals import lock_acquired, leader_elected\n"
            "print(json.dumps([receivers(s) for s in (worker_init, lock_acquired, task_revoked, leader_elected)]))"
        )
        assert init.count("celery_etcd_lock.tasks._add_steps") == 1
        assert sorted(acquired) == ["celery_etcd_lock.events.send", "celery_etcd_lock.logs._acquired"]
        assert revoked.count("celery_etcd_lock.tasks.discarded._revoked") == 1
        assert elected == ["celery_etcd_lock.logs._elected"]

    @pytest.mark.parametrize(
        "code",
        [
            "from celery import Celery; from celery_etcd_lock.locks import Session",
            "from celery import Celery; from celery_etcd_lock import LockLost",
            "from celery_etcd_lock import Conflict",
            "import celery_etcd_lock.settings",
            "import celery.bin.base; import celery_etcd_lock.cli",
        ],
    )
    def test_in_a_project_without_such_tasks(self, code: str) -> None:
        """Its workers check the settings all the same: `Session.from_app` takes them."""
        code = f"{code}{RECEIVERS}\nfrom celery.signals import worker_init\nprint(json.dumps(receivers(worker_init)))"
        assert python(code).count("celery_etcd_lock.tasks._add_steps") == 1
