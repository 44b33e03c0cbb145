"""Projects that come from celery-singleton and celery-once: what their suites ask for, and what we say to them."""

from __future__ import annotations

import gc
import json
import pickle
import random
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from celery import Celery
from celery.result import EagerResult

import celery_etcd_lock
from celery_etcd_lock import ConfigError
from celery_etcd_lock.compat import (
    AlreadyQueued,
    CompatWarning,
    DuplicateTaskError,
    QueueOnce,
    Singleton,
    clear_locks,
)
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import KeyValue, Range, prefix_end
from celery_etcd_lock.tasks.runtime import Runtime
from celery_etcd_lock.testing import EtcdServer
from tests.servers import RedisServer
from tests.tasks.foreign_tasks import make
from tests.workers import Project, overlaps, project, until

pytestmark = [
    pytest.mark.filterwarnings("ignore::celery_etcd_lock.compat.CompatWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # see `sockets_collected`
]

SLICE = 1.6
"""How much longer a mark may stand than it must: see `tasks.leases`."""


class Marks:
    """The marks of one namespace, in the real etcd."""

    def __init__(self, url: str, namespace: str) -> None:
        self._etcd = connect(url)
        self._prefix = f"/{namespace}/queued/"

    def all(self) -> list[KeyValue]:
        return list(self._etcd.range(Range(self._prefix, prefix_end(self._prefix))).kvs)

    def lasts(self) -> float:
        """Seconds for which the lease of the only mark was granted."""
        (mark,) = self.all()
        return self._etcd.lease_time_to_live(mark.lease).granted_ttl

    def close(self) -> None:
        self._etcd.close()


@contextmanager
def client(project: Project, **settings: Any) -> Iterator[Any]:
    """An app on the broker and the etcd of `project`."""
    app: Any = Celery("client", broker=project.broker_url, backend=project.broker_url, set_as_current=False)
    app.conf.update(
        {
            "task_default_queue": project.queue,
            "etcd_lock_endpoints": project.etcd_url,
            **{name: value for name, value in project.settings.items() if name.startswith("etcd_lock_")},
            **settings,
        }
    )
    try:
        yield app
    finally:
        Runtime.of(app).close()
        app.close()


@pytest.fixture(scope="module", autouse=True)
def sockets_collected() -> Iterator[None]:
    """What Celery and redis-py leave to the garbage collector goes before other tests could be told of it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def queue(redis: RedisServer, etcd: EtcdServer, tmp_path: Path) -> Project:
    """A queue from which nobody takes anything, and an etcd namespace of its own."""
    return Project(redis.url, etcd.url, tmp_path)


@pytest.fixture
def app(queue: Project) -> Iterator[Any]:
    with client(queue) as one:
        yield one


@pytest.fixture
def marks(queue: Project) -> Iterator[Marks]:
    made = Marks(queue.etcd_url, queue.queue)
    yield made
    made.close()


def said(make: Callable[[], Any]) -> list[str]:
    """What `make` and Celery's making of it say to a project's author."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(each.message) for each in caught if issubclass(each.category, CompatWarning)]


def no_arguments() -> None:
    """A body."""


def one_argument(a: int) -> None:
    """Another."""


class TestSingletonPublishes:
    def test_ten_times_the_same_is_one(self, app: Any, marks: Marks) -> None:
        """All results are of one task, of which etcd knows."""

        @app.task(base=Singleton)
        def f(*args: int) -> None: ...

        assert len({f.apply_async(args=[1, 2, 3]).id for _ in range(10)}) == 1
        assert len(marks.all()) == 1

    def test_different_arguments_are_different_tasks(self, app: Any) -> None:
        """Nothing is refused."""

        @app.task(base=Singleton)
        def f(*args: int) -> None: ...

        assert len({f.apply_async(args=[i, i + 1]).id for i in range(5)}) == 5

    def test_by_position_and_by_keyword_is_the_same(self, app: Any) -> None:
        """Stricter than celery-singleton, to which they are two tasks."""

        @app.task(base=Singleton)
        def f(a: int, b: int = 2) -> None: ...

        assert f.delay(1).id == f.delay(a=1).id == f.delay(1, b=2).id

    def test_what_cannot_be_published_leaves_no_mark(self, app: Any, marks: Marks) -> None:
        """The error comes through, and the next one is published."""

        @app.task(base=Singleton)
        def f(*args: int) -> None: ...

        with pytest.raises(Exception, match="no-such-serializer"):
            f.apply_async(args=[1], serializer="no-such-serializer")
        assert marks.all() == []
        first = f.delay(1)
        assert marks.all()[0].value == json.dumps({"task_id": first.id}, separators=(",", ":")).encode()

    def test_raise_on_duplicate(self, app: Any) -> None:
        """`DuplicateTaskError` knows the task that is queued, and is the native one too."""

        @app.task(base=Singleton, raise_on_duplicate=True, name="shop.f")
        def f(*args: int) -> None: ...

        first = f.delay(1)
        with pytest.raises(DuplicateTaskError, match=f"shop.f .*{first.id}") as caught:
            f.delay(1)
        assert caught.value.task_id == first.id
        assert isinstance(caught.value, celery_etcd_lock.DuplicateTaskError)
        f.delay(2)

    @pytest.mark.parametrize(("of_app", "of_task", "raises"), [
        (None, None, False), (False, True, True), (True, None, True), (True, False, False),
    ])  # fmt: skip
    def test_the_task_before_the_app(
        self, queue: Project, of_app: bool | None, of_task: bool | None, raises: bool
    ) -> None:
        """``singleton_raise_on_duplicate`` counts where the task says nothing."""
        with client(queue, singleton_raise_on_duplicate=of_app) as app:

            @app.task(base=Singleton, raise_on_duplicate=of_task)
            def f() -> None: ...

            first = f.delay()
            if raises:
                with pytest.raises(DuplicateTaskError):
                    f.delay()
            else:
                assert f.delay().id == first.id

    @pytest.mark.parametrize(("unique_on", "same", "different"), [
        (["a", "c"], ((2, 9, 4), {"d": 9}), ((2, 3, 9), {"d": 5})),
        (["b", "d"], ((9,), {"b": 3, "c": 9, "d": 5}), ((2, 3), {"d": 9})),
        ("c", ((9, 9, 4), {}), ((2, 3, 5, 5), {})),
    ])  # fmt: skip
    def test_unique_on(self, app: Any, unique_on: Any, same: Any, different: Any) -> None:
        """Only these parameters count, by position or by keyword; a string is one of them."""

        @app.task(base=Singleton, unique_on=unique_on)
        def f(a: int, b: int = 2, c: int = 3, d: int = 4) -> None: ...

        first = f.delay(2, 3, 4, 5)
        assert f.apply_async(*same).id == first.id
        assert f.apply_async(*different).id != first.id

    def test_unique_on_a_default(self, app: Any) -> None:
        """A parameter that is left out has its default."""

        @app.task(base=Singleton, unique_on="d")
        def f(a: int, d: int = 4) -> None: ...

        assert f.delay(1).id == f.delay(2, d=4).id != f.delay(2, d=5).id

    @pytest.mark.parametrize("empty", [[], (), "", [""]])
    def test_unique_on_nothing_is_one_for_the_task(self, app: Any, empty: Any) -> None:
        """No argument counts, in the queue and in the run; and that older releases took it otherwise is said."""

        def define() -> None:
            @app.task(base=Singleton, unique_on=empty, name="shop.f", lazy=False)
            def f(a: int, b: int = 2) -> None: ...

        assert "its releases up to 0.3.1 took it as all arguments" in said(define)[0]
        f = app.tasks["shop.f"]
        assert f.delay(1).id == f.delay(2, b=3).id
        assert f.lock_name((1,)).endswith("/locks/shop.f/all")

    def test_lock_expiry_is_how_long_a_lost_message_counts(self, queue: Project, marks: Marks) -> None:
        """Of the task, else of the app, else ours; not shorter, and longer by a slice at most."""
        with client(queue, singleton_lock_expiry=100, etcd_lock_queued_ttl=5000) as app:

            @app.task(base=Singleton, lock_expiry=60)
            def own() -> None: ...

            @app.task(base=Singleton)
            def apps() -> None: ...

            own.delay()
            assert 60 <= marks.lasts() <= 60 * SLICE
            own.release_lock()
            apps.delay()
            assert 100 <= marks.lasts() <= 100 * SLICE
            apps.release_lock()
            app.conf.singleton_lock_expiry = None
            apps.delay()
            assert 5000 <= marks.lasts() <= 5000 * SLICE

    def test_lock_expiry_counts_from_the_eta(self, app: Any, marks: Marks) -> None:
        """Unlike celery-singleton's: a task does not lose its place because it is to run later."""

        @app.task(base=Singleton, lock_expiry=60)
        def f() -> None: ...

        f.apply_async(countdown=1000)
        assert marks.lasts() >= 1060 - 5

    def test_a_short_lock_expiry_lets_the_next_one_in(self, app: Any) -> None:
        """One that is lost is forgotten after so long."""

        @app.task(base=Singleton, lock_expiry=1)
        def f() -> None: ...

        first = f.delay().id
        assert f.delay().id == first
        until(lambda: f.delay().id != first, "the mark's end")

    def test_uuids_are_their_strings(self, app: Any) -> None:
        """No ``singleton_json_encoder_class`` is needed for them."""

        @app.task(base=Singleton)
        def f(*args: Any) -> None: ...

        some = [uuid.uuid4() for _ in range(3)]
        ids = {f.apply_async(args=[random.choice([str(each), each]) for each in some]).id for _ in range(10)}
        assert len(ids) == 1
        assert f.delay(uuid.uuid4()).id not in ids

    def test_locks_can_be_cleared(self, app: Any, marks: Marks) -> None:
        """All of the app's, or that of one call; and that nobody needs to is said."""

        @app.task(base=Singleton)
        def f(*args: int) -> None: ...

        firsts = [f.delay(i).id for i in range(3)]
        f.release_lock([0])
        assert f.delay(0).id != firsts[0]
        assert f.delay(1).id == firsts[1]
        with pytest.warns(CompatWarning, match=r"clear_locks\(\) is not needed"):
            clear_locks(app)
        assert marks.all() == []
        assert {f.delay(i).id for i in range(3)}.isdisjoint(firsts)


class TestOncePublishes:
    def test_the_second_is_refused(self, app: Any, marks: Marks) -> None:
        """`AlreadyQueued` says for how long, and for whom; of other arguments there may be one."""

        @app.task(base=QueueOnce, name="shop.f", once={"timeout": 500})
        def f(a: int, b: int = 2) -> None: ...

        first = f.delay(1)
        with pytest.raises(AlreadyQueued, match=first.id) as caught:
            f.apply_async(kwargs={"a": 1})
        assert 0 < caught.value.countdown <= 500 * SLICE
        assert caught.value.task_id == first.id
        f.delay(2)
        assert len(marks.all()) == 2

    def test_graceful(self, app: Any, marks: Marks) -> None:
        """By the task or by the call: nothing is published, and the result says so without an exception."""

        @app.task(base=QueueOnce, once={"graceful": True})
        def by_task() -> None: ...

        @app.task(base=QueueOnce)
        def by_call() -> None: ...

        by_task.delay()
        by_call.delay()
        again: list[Any] = [by_task.delay(), by_call.apply_async(once={"graceful": True})]
        again.append(by_call.s().set(once={"graceful": True}).apply_async())
        for result in again:
            assert isinstance(result, EagerResult)
            known: tuple[Any, ...] = (result.id, result.state, result.result, result.get())
            assert known == (None, "REJECTED", None, None)
        with pytest.raises(AlreadyQueued):
            by_task.apply_async(once={"graceful": False})
        assert len(marks.all()) == 2

    def test_keys(self, app: Any) -> None:
        """Only these count, given or not; with none of them there is one for the task."""

        @app.task(base=QueueOnce, once={"keys": ["a", "b"]})
        def some(a: int, b: int = 2, c: int = 3) -> None: ...

        @app.task(base=QueueOnce, once={"keys": []})
        def none(a: int) -> None: ...

        some.delay(1)
        with pytest.raises(AlreadyQueued):
            some.delay(1, b=2, c=9)
        some.delay(1, b=3)
        none.delay(1)
        with pytest.raises(AlreadyQueued):
            none.delay(2)

    @pytest.mark.parametrize(("once", "settings", "of_call", "seconds"), [
        ({}, {"default_timeout": 60}, {}, 60),
        ({"timeout": 200}, {"default_timeout": 60}, {}, 200),
        ({"timeout": 200}, {"default_timeout": 60}, {"timeout": 700}, 700),
        ({}, None, {}, 3600),
        ({"timeout": None}, None, {}, 9000),
    ])  # fmt: skip
    def test_timeout(
        self, queue: Project, marks: Marks, once: Any, settings: Any, of_call: Any, seconds: float
    ) -> None:
        """Of the call, else of the task, else of ``ONCE``, else an hour; None is for ever there, here it is ours."""
        conf = {} if settings is None else {"ONCE": {"backend": "x", "settings": settings}}
        with client(queue, etcd_lock_queued_ttl=9000, **conf) as app:

            @app.task(base=QueueOnce, once=once)
            def f() -> None: ...

            f.apply_async(once=of_call)
            assert seconds <= marks.lasts() <= seconds * SLICE

    def test_a_lock_can_be_cleared_by_its_key(self, app: Any, marks: Marks) -> None:
        """As people do by hand after a crash: the key is that of the call, however it is written."""

        @app.task(base=QueueOnce, bind=True, once={"keys": ["a"]}, autoretry_for=(ValueError,), name="shop.f")
        def f(self: Any, a: int, b: int = 2) -> None: ...

        f.delay(1)
        (mark,) = marks.all()
        assert f.get_key((1, 9)) == f.get_key(kwargs={"a": 1, "b": 3}) == mark.key
        assert f.get_key((2,)) != mark.key
        f.once_backend.clear_lock(f.get_key(args=[1]))
        assert marks.all() == []
        f.delay(1)

    def test_eager_runs_know_of_once(self, app: Any) -> None:
        """``apply(once=…)`` runs the body, and `task_always_eager` asks no etcd."""

        @app.task(base=QueueOnce)
        def f(a: int) -> int:
            return a

        assert f.apply((1,), once={"graceful": True}).get() == 1
        app.conf.task_always_eager = True
        assert [f.apply_async((2,), once={"timeout": 5}).get() for _ in range(2)] == [2, 2]

    @pytest.mark.parametrize("once", ["graceful", ["a"], {"timeout": -1}, {"timeout": "1h"}])
    def test_nonsense_is_refused(self, app: Any, once: Any) -> None:
        """In a task's options when it is made, in a call's when it is sent."""

        @app.task(base=QueueOnce, lazy=False, name="fine")
        def fine() -> None: ...

        with pytest.raises(ConfigError, match="once"):
            fine.apply_async(once=once)
        with pytest.raises(ConfigError, match="task wrong: once"):

            @app.task(base=QueueOnce, once=once, lazy=False, name="wrong")
            def wrong() -> None: ...


class TestWords:
    """What is said to a project's author."""

    def test_the_native_line_of_a_singleton(self, app: Any) -> None:
        """One warning for the task, however often Celery binds it, with the very line to write."""

        def define() -> None:
            @app.task(base=Singleton, name="shop.sync", unique_on="a", raise_on_duplicate=True, lock_expiry=10)
            def sync(a: int, b: int = 1) -> None: ...

            app.finalize()
            assert app.tasks["shop.sync"].unique_queued == "until_end"

        (text,) = said(define)
        assert text.startswith(
            'task shop.sync: write @singleton_task(unique_on="a", unique_queued="until_end", on_duplicate="raise") '
            "instead of base=Singleton, unique_on='a', raise_on_duplicate=True, lock_expiry=10; "
        )
        assert "lock_expiry=10 bounds how long a lost message" in text
        assert "etcd_lock_queued_ttl" in text
        assert "celery_etcd_lock.DuplicateTaskError" in text

    @pytest.mark.parametrize(("once", "line"), [
        ({}, '(unique_queued="until_end", on_duplicate="raise")'),
        ({"timeout": 5, "graceful": False}, '(unique_queued="until_end", on_duplicate="raise")'),
        (
            {"keys": ["a", "b"], "graceful": True, "unlock_before_run": True},
            '(unique_on=["a", "b"], unique_queued="until_start")',
        ),
        ({"keys": ["b"], "graceful": True}, '(unique_on="b", unique_queued="until_end")'),
        ({"keys": []}, '(lock_key="all", unique_queued="until_end", on_duplicate="raise")'),
    ])  # fmt: skip
    def test_the_native_line_of_once(self, app: Any, once: Any, line: str) -> None:
        """The same for celery-once's options; and the line is one that means the same."""
        tasks: list[Any] = []

        def define() -> None:
            @app.task(base=QueueOnce, name="shop.f", once=once, lazy=False)
            def f(a: int, b: int = 1) -> None: ...

            tasks.append(f)

        (text,) = said(define)
        assert text.startswith(f"task shop.f: write @singleton_task{line} instead of base=QueueOnce")
        scope = {"made": celery_etcd_lock.singleton_task, "app": app}
        exec(f"@made(app=app, name='native', {line[1:]}\ndef f(a, b=1): ...", scope)
        native, foreign = app.tasks["native"], tasks[0]
        assert native.lock_name((1, 2)).rpartition("/")[2] == foreign.lock_name((1, 2)).rpartition("/")[2]
        assert native.unique_queued == foreign.unique_queued
        assert (native.on_duplicate == "raise") is not bool(once.get("graceful"))

    def test_a_class_and_a_base_of_the_projects_own(self, app: Any) -> None:
        """Both stay, with our base in place of the other."""

        class Sync(Singleton):
            name = "shop.sync"
            unique_on = ("a", "b")

            def run(self, a: int, b: int) -> None: ...

        class Own(QueueOnce):
            abstract = True

        def define() -> None:
            app.register_task(Sync())

            @app.task(base=Own, name="shop.f", lazy=False)
            def f() -> None: ...

        of_class, of_base = said(define)
        assert 'write class Sync(SingletonTask) with unique_on = ["a", "b"]; unique_queued = "until_end"' in of_class
        assert '@singleton_task(base=Own, unique_queued="until_end", on_duplicate="raise"), where Own has' in of_base
        assert "SingletonTask in place of QueueOnce" in of_base

    def test_settings_that_mean_nothing_are_named_once(self, queue: Project) -> None:
        """Not their values, which hold passwords."""
        conf: dict[str, Any] = {
            "singleton_backend_url": "redis://:secret@host/0",
            "singleton_key_prefix": "secret",
            "singleton_raise_on_duplicate": True,
            "ONCE": {"backend": "secret", "settings": {"url": "redis://:secret@host/1", "default_timeout": 60}},
            "etcd_lock_on_conflict": "skip",
        }
        with client(queue, **conf) as app:

            def define() -> None:
                for name in ("one", "two"):
                    app.task(base=Singleton, name=name, lazy=False)(no_arguments)
                    app.task(base=QueueOnce, name=f"once_{name}", lazy=False)(no_arguments)

            texts = said(define)
        assert len(texts) == 4 + 2
        (singletons,) = [text for text in texts if "singleton_backend_url, singleton_key_prefix. " in text]
        (once,) = [text for text in texts if 'ONCE["backend"], ONCE["settings"]["url"]. ' in text]
        for text in (singletons, once):
            assert text.startswith("app client: not used, and to be left out")
            assert "etcd_lock_endpoints" in text
        assert "secret" not in "".join(texts)
        assert "singleton_raise_on_duplicate=True on the app" in texts[0]
        assert 'on_conflict="retry"' in texts[0], "the app's own would drop what these packages never dropped"

    def test_misspelt_keys_of_once(self, app: Any) -> None:
        """They did nothing there, and do not here; but it is said."""

        def define() -> None:
            app.task(base=QueueOnce, once={"gracefull": True}, name="f", lazy=False)(no_arguments)

        assert "once has no key 'gracefull' (did you mean 'graceful'?)" in said(define)[0]

    @pytest.mark.parametrize(("base", "method"), [
        (Singleton, "generate_lock"), (Singleton, "on_duplicate"), (QueueOnce, "get_key"),
    ])  # fmt: skip
    def test_what_is_overridden_in_vain(self, app: Any, base: Any, method: str) -> None:
        """It decided what is unique, and would not be asked: said when the task is made."""
        own = type("Own", (base,), {"abstract": True, "__module__": __name__, method: lambda self, *args: "x"})
        with pytest.raises(ConfigError, match=rf"task f: Own\.{method} overrides what is not called here"):
            app.task(base=own, name="f", lazy=False)(no_arguments)

    def test_native_options_beside_the_foreign_ones(self, app: Any) -> None:
        """Who has begun to switch is taken at their word, and two words for one thing are refused."""

        @app.task(base=QueueOnce, name="a", lock_key="x:{a}", on_conflict="skip", on_duplicate="return", lazy=False)
        def a(a: int) -> None: ...

        assert a.lock_name((1,)).endswith("/locks/a/x:1")
        assert (a.unique_queued, a.on_conflict.name) == ("until_end", "skip")
        assert a.delay(1).id == a.delay(1).id
        with pytest.raises(ConfigError, match="contradict"):
            app.task(base=QueueOnce, name="b", lock_key="x", once={"keys": ["a"]}, lazy=False)(one_argument)

    def test_foreign_options_on_a_native_task(self, app: Any) -> None:
        """Somebody changed the base and not the options: they do nothing, and it is said."""
        native = celery_etcd_lock.SingletonTask
        with pytest.warns(UserWarning, match="once is no option of a singleton task.*QueueOnce"):
            app.task(base=native, once={"graceful": True}, name="a", lazy=False)(no_arguments)
        with pytest.warns(UserWarning, match="raise_on_duplicate is no option of a singleton task.*Singleton"):
            app.task(base=native, raise_on_duplicate=True, name="b", lazy=False)(no_arguments)

    def test_subclasses_of_a_task_that_has_been_made(self, app: Any) -> None:
        """A concrete task's class may be subclassed with other options: the first's translation is not in the way."""

        class Parent(QueueOnce):
            name = "parent"
            once: ClassVar[dict[str, Any]] = {"keys": []}

            def run(self, a: int) -> None: ...

        class Child(Parent):
            name = "child"
            once: ClassVar[dict[str, Any]] = {"keys": ["a"], "unlock_before_run": True}

        parent, child = app.register_task(Parent()), app.register_task(Child())
        assert (parent.lock_key, parent.unique_on, parent.unique_queued) == ("all", None, "until_end")
        assert (child.lock_key, child.unique_on, child.unique_queued) == (None, ["a"], "until_start")


@pytest.mark.parametrize("error", [DuplicateTaskError("queued", "id-1"), AlreadyQueued(12.5, "f", "id-1")])
def test_what_is_raised_travels(error: Any) -> None:
    """Through pickle, and through a JSON result, which keeps ``args`` only."""
    for copy in (pickle.loads(pickle.dumps(error)), type(error)(*json.loads(json.dumps(error.args)))):
        assert (type(copy), copy.args, str(copy), copy.task_id) == (type(error), error.args, str(error), "id-1")
    assert AlreadyQueued(60).countdown == 60
    assert AlreadyQueued(60).message == str(AlreadyQueued(60))


@pytest.fixture(scope="module")
def working(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project whose worker has the tasks of `foreign_tasks`."""
    with project(redis.url, etcd.url, tmp_path_factory.mktemp("compat"), imports=["foreign_tasks"]) as one:
        one.worker("-P", "prefork", "-c", "3")
        yield one


@pytest.fixture(scope="module")
def tasks(working: Project) -> Iterator[dict[str, Any]]:
    """The same tasks where they are sent."""
    with warnings.catch_warnings(), client(working) as app:
        warnings.simplefilter("ignore", CompatWarning)
        made = make(app)
        app.finalize()
        yield made


def begun(working: Project, task: str) -> Any:
    """Wait until `task` runs."""
    return until(lambda: working.runs(task), f"the start of {task}")


class TestRuns:
    def test_people_see_what_is_said(self, working: Project) -> None:
        """A worker that nobody has told to show warnings says it, once for each task."""
        text = working.workers[0].output
        for task in ("singleton", "singleton_raises", "once", "once_contextual"):
            assert text.count(f"CompatWarning: task {task}: write @singleton_task(") == 1

    @pytest.mark.parametrize("task", ["singleton", "singleton_fails"])
    def test_a_singleton_may_be_queued_again_when_it_has_ended(
        self, working: Project, tasks: dict[str, Any], task: str
    ) -> None:
        """After success and after an error the mark is gone before the result is there."""
        first = tasks[task].delay(1)
        first.get(timeout=60, propagate=False)
        second = until(lambda: (again := tasks[task].delay(1)).id != first.id and again, "the end of the mark")
        second.get(timeout=60, propagate=False)
        assert [run.how for run in working.runs(task)] == ["returned" if task == "singleton" else "ValueError"] * 2

    def test_while_it_runs_it_counts(self, working: Project, tasks: dict[str, Any]) -> None:
        """`raise_on_duplicate`, `once` and `graceful` refuse a second one while the first runs."""
        raises, once, graceful = (tasks[name] for name in ("singleton_raises", "once", "once_graceful"))
        firsts = [task.delay(1, 2.5) for task in (raises, once, graceful)]
        for task in (raises, once, graceful):
            begun(working, task.name)
        with pytest.raises(DuplicateTaskError):
            raises.delay(2)
        with pytest.raises(AlreadyQueued) as caught:
            once.delay(2)
        assert caught.value.countdown > 0
        assert graceful.delay(2).state == "REJECTED"
        assert [first.get(timeout=60) for first in firsts] == [1, 1, 1]
        assert len(working.runs("once")) == 1

    def test_a_mark_that_has_gone_lets_it_wait_not_run_beside(self, working: Project, tasks: dict[str, Any]) -> None:
        """Cleared by hand, as an expiry does: the next is published, and runs when the first has ended."""
        task = tasks["singleton_expires"]
        first = task.delay(1, 1.5)
        begun(working, "singleton_expires")
        task.release_lock([1])
        second = task.delay(2)
        assert second.id != first.id
        assert [result.get(timeout=60) for result in (first, second)] == [1, 2]
        runs = working.runs("singleton_expires")
        assert [run.number for run in runs] == [1, 2]
        assert overlaps(runs) == []

    @pytest.mark.parametrize("task", ["singleton_retries", "once_retries"])
    def test_its_own_retry_goes_through_and_counts(self, working: Project, tasks: dict[str, Any], task: str) -> None:
        """celery-singleton swallowed the retry; between the two runs the task is queued still."""
        first = tasks[task].delay(1)
        until(lambda: first.state == "RETRY", "its retry")
        if task == "singleton_retries":
            assert tasks[task].delay(1).id == first.id
        else:
            with pytest.raises(AlreadyQueued):
                tasks[task].delay(1)
        assert first.get(timeout=60) == 1
        assert len(working.runs(task)) == 2

    def test_unlock_before_run(self, working: Project, tasks: dict[str, Any]) -> None:
        """One may be queued while one runs, not two; and it runs afterwards."""
        task = tasks["once_early"]
        first = task.delay(1, 1.5)
        begun(working, "once_early")
        second = task.apply_async((2,))
        assert second.id != first.id
        assert [result.get(timeout=60) for result in (first, second)] == [1, 2]
        assert overlaps(working.runs("once_early")) == []

    def test_after_an_error_it_may_be_queued_again(self, working: Project, tasks: dict[str, Any]) -> None:
        """As celery-once does after a failure."""
        with pytest.raises(ValueError, match="1"):
            tasks["once_fails"].delay(1).get(timeout=60)
        until(lambda: tasks["once_fails"].apply_async((2,), once={"graceful": True}).id, "the end of the mark")

    def test_a_base_with_a_context(self, working: Project, tasks: dict[str, Any]) -> None:
        """A subclass of QueueOnce that puts a context around each body, as Flask projects have it."""
        task = tasks["once_contextual"]
        first = task.delay(1, 1.5)
        begun(working, "once_contextual")
        with pytest.raises(AlreadyQueued):
            task.delay(2)
        assert first.get(timeout=60) == 1
        until(lambda: task.apply_async((3,), once={"graceful": True}).id, "the end of the mark")
