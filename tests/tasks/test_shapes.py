"""All the ways to write a singleton task, and the ways not to."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery, Task, group, shared_task

import celery_etcd_lock
from celery_etcd_lock import ConfigError, Conflict, LockContended, LockLost, SingletonTask, current_lock, singleton_task

if TYPE_CHECKING:
    AnyTask = Task[Any, Any]
else:
    AnyTask = Task


@pytest.fixture
def app() -> Iterator[Any]:
    made: Any = Celery("shapes", broker="memory://", backend="cache+memory://", set_as_current=True)
    made.conf.update(etcd_lock_endpoints="memory://shapes", task_always_eager=True, task_eager_propagates=True)
    yield made
    made.close()


class TestBase:
    def test_as_the_base_of_a_task(self, app: Any) -> None:
        """`@app.task(base=SingletonTask, bind=True)` gives a task that has a lock of its own name."""

        @app.task(base=SingletonTask, bind=True, unique_on="x", name="n")
        def f(self: Any, x: int, y: int = 2) -> tuple[int, bool]:
            return x + y, self.lock.is_held()

        assert f.delay(1).get() == (3, True)
        assert f.lock_name((1, 5)) == f.lock_name((), {"x": 1}) == "/celery/locks/n/x=1"

    def test_in_a_class(self, app: Any) -> None:
        """A class-based task subclasses it."""

        class Sync(SingletonTask):
            name = "sync"
            unique_on = "account"

            def run(self, account: int, full: bool = False) -> int:
                return account

        task = app.register_task(Sync())
        assert task.delay(7).get() == 7
        assert task.lock_name((7,)) == "/celery/locks/sync/account=7"

    def test_keeps_the_apps_own_task_class(self) -> None:
        """A project's `task_cls` (Django's, for one) stays a base, by the decorator and by `base=`."""

        class Own(AnyTask):
            def mine(self) -> str:
                return "mine"

        app: Any = Celery("own", task_cls=Own, set_as_current=False)

        @app.task(base=SingletonTask, name="a")
        def a() -> None: ...

        @singleton_task(app=app, name="b")
        def b() -> None: ...

        for task in (app.tasks["a"], app.tasks["b"]):
            assert isinstance(task, SingletonTask)
            assert isinstance(task, Own)
            assert task.mine() == "mine"

    def test_composes_with_a_base_that_has_a_call_of_its_own(self, app: Any) -> None:
        """A given `base` runs inside the lock."""
        calls: list[bool] = []

        class Timed(AnyTask):
            abstract = True

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                calls.append(current_lock.is_held())
                return super().__call__(*args, **kwargs)

        @singleton_task(app=app, base=Timed, name="timed")
        def timed(x: int) -> int:
            return x

        assert timed.delay(3).get() == 3
        assert calls == [True]

    def test_in_a_class_without_a_name(self, app: Any) -> None:
        """Celery names it, and its options are checked like any other's."""

        class Nameless(SingletonTask):
            unique_on = "account"

            def run(self, account: int, full: bool = False) -> int:
                return account

        task = app.register_task(Nameless())
        assert task.lock_name((7, True)) == f"/celery/locks/{task.name}/account=7"
        assert task.name.endswith("Nameless")

        class Wrong(Nameless):
            unique_on = "acount"

        with pytest.raises(ConfigError, match="account"):
            app.register_task(Wrong())

    def test_for_everything(self) -> None:
        """`task_cls=SingletonTask` makes every task one, and leaves Celery's own alone."""
        app: Any = Celery("all", task_cls=SingletonTask, set_as_current=False)

        @app.task(name="mine")
        def mine() -> None: ...

        assert isinstance(app.tasks["mine"], SingletonTask)
        assert isinstance(app.tasks["celery.backend_cleanup"], SingletonTask)
        assert app.tasks["celery.backend_cleanup"]._key_rule is None


class TestDecorator:
    def test_with_and_without_parentheses(self, app: Any) -> None:
        """Both make a shared task that the current app has."""

        @singleton_task
        def bare(x: int) -> int:
            """Doc."""
            return x

        @singleton_task()
        def called(x: int) -> int:
            return x

        assert bare.delay(1).get() == called.delay(x=2).get() - 1 == 1
        assert isinstance(app.tasks[bare.name], SingletonTask)
        assert (bare.__name__, bare.__doc__, bare.__module__) == ("bare", "Doc.", __name__)

    def test_takes_celerys_options(self, app: Any) -> None:
        """Every option of `@app.task` goes through."""

        @singleton_task(bind=True, name="opt", max_retries=7, acks_late=True, autoretry_for=(KeyError,), unique_on="x")
        def opt(self: Any, x: int) -> str:
            return str(self.name)

        assert (opt.max_retries, opt.acks_late, opt.throws) == (7, True, (LockContended,))
        assert opt.lock_name((1,)) == "/celery/locks/opt/x=1"
        assert opt.delay(1).get() == "opt"

    def test_is_on_every_app(self, app: Any) -> None:
        """A second app gets a locked copy, and one that is bound to an app stays there."""

        @singleton_task(name="everywhere")
        def everywhere() -> None: ...

        @singleton_task(name="here", app=app)
        def here() -> None: ...

        other = Celery("other", set_as_current=False)
        assert isinstance(other.tasks["everywhere"], SingletonTask)
        assert "here" not in other.tasks
        assert isinstance(app.tasks["here"], SingletonTask)

    def test_above_another_decorator_is_refused(self, app: Any) -> None:
        """`@singleton_task` over `@app.task` or `@shared_task` prints the line to write instead."""
        for decorator in (app.task, shared_task):
            with pytest.raises(TypeError, match=r"above .*f.*write one line, @singleton_task"):

                @singleton_task
                @decorator
                def f() -> None: ...

    def test_below_another_decorator_is_refused(self) -> None:
        """`@app.task` over `@singleton_task` would lose its options in silence."""
        app: Any = Celery("below", set_as_current=True)
        with pytest.raises(TypeError, match=r"below .*g.*write one line, @singleton_task"):

            @app.task(rate_limit="1/s")
            @singleton_task
            def g() -> None: ...

        code = (
            "from celery import Celery, shared_task\nfrom celery_etcd_lock import singleton_task\n"
            "app = Celery('x')\n@shared_task\n@singleton_task\ndef f(): ...\napp.finalize()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "TypeError" in done.stderr


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"unique_on": "acount"}, "account"),
            ({"unique_on": []}, "unique_on"),
            ({"unique_on": "account", "lock_key": "all"}, "lock_key"),
            ({"lock_key": "{acount}"}, "account"),
            ({"on_conflict": "skipp"}, "skip"),
            ({"on_conflict": lambda: None}, "on_conflict"),
            ({"on_lost": "abourt"}, "abort"),
            ({"on_unavailable": print}, "on_unavailable"),
            ({"unique_queued": "until_begin"}, "until_start.*until_end"),
            ({"lock_mode": "shred"}, "lock_mode.*shared"),
            ({"lock_mode": ["shared"]}, "lock_mode"),
            ({"lock_limit": 0}, "lock_limit"),
            ({"lock_limit": True}, "lock_limit"),
            ({"lock_limit": "3"}, "lock_limit"),
            ({"lock_mode": "shared", "lock_limit": 3}, "lock_mode and lock_limit"),
            ({"on_duplicate": "rais"}, "perhaps 'raise'"),
        ],
    )
    def test_what_cannot_be_meant_is_refused_when_the_task_is_made(
        self, app: Any, options: dict[str, Any], says: str
    ) -> None:
        """A ConfigError names the task and what to write instead."""
        with pytest.raises(ConfigError, match=says) as refused:

            @app.task(base=SingletonTask, name="wrong", lazy=False, **options)
            def wrong(account: int) -> None: ...

        assert "wrong" in str(refused.value)

    def test_a_coroutine_or_generator_is_refused(self, app: Any) -> None:
        """Celery would not run its body, and the lock would be gone before anybody did."""

        async def coroutine() -> None: ...

        def generator() -> Iterator[int]:
            yield 1

        for function in (coroutine, generator):
            with pytest.raises(ConfigError, match="plain function"):
                app.task(base=SingletonTask, name=function.__name__, lazy=False)(function)

    @pytest.mark.parametrize(("option", "right"), [("unique_one", "unique_on"), ("lock_expiry", "etcd_lock_ttl")])
    def test_a_near_miss_is_a_warning(self, app: Any, option: str, right: str) -> None:
        """An option that is nearly one of ours, or a peer's, does nothing, and is said."""
        with pytest.warns(UserWarning, match=f"{option}.*{right}"):

            @app.task(base=SingletonTask, name="near", lazy=False, **{option: 1})
            def near() -> None: ...

    def test_by_annotations(self) -> None:
        """Celery's `task_annotations` set options, too."""
        app: Any = Celery("annotated", set_as_current=False)
        app.conf.task_annotations = {"annotated": {"on_conflict": "skip", "lock_limit": 3}}

        @app.task(base=SingletonTask, name="annotated")
        def annotated() -> None: ...

        assert app.tasks["annotated"].on_conflict == Conflict.skip()
        assert app.tasks["annotated"]._mode.limit == 3

    def test_map_starmap_and_chunks_point_to_group(self, app: Any) -> None:
        """They would call the function unlocked."""

        @app.task(base=SingletonTask, name="m")
        def m(x: int) -> int:
            return x

        for call in (lambda: m.map([1]), lambda: m.starmap([(1,)]), lambda: m.chunks([(1,)], 1)):
            with pytest.raises(TypeError, match="group"):
                call()
        assert group(m.s(1), m.s(2)).apply().get() == [1, 2]


class TestLock:
    def test_is_never_none(self, app: Any) -> None:
        """Direct and eager calls get a stand-in with growing tokens."""
        tokens = []

        @app.task(base=SingletonTask, bind=True, name="t")
        def t(self: Any) -> None:
            self.lock.assert_held()
            tokens.append(self.lock.fencing_token)
            assert self.lock is self.lock

        t()
        t.delay()
        t.apply()
        assert tokens == sorted(set(tokens))

    def test_current_lock_outside_of_a_task_is_an_error(self) -> None:
        """There is no lock where no task runs."""
        with pytest.raises(RuntimeError, match="no task runs"):
            current_lock.is_held()

    def test_current_lock_outside_of_a_task_can_be_looked_at(self) -> None:
        """As pytest-celery does with every object of the process."""
        assert not isinstance(current_lock, int)
        assert "unbound" in repr(current_lock)

    def test_current_lock_of_another_kind_of_task_is_an_error(self, app: Any) -> None:
        """A task whose author forgot the decorator is not told that it holds a lock."""

        @app.task(name="plain")
        def plain() -> None:
            current_lock.assert_held()

        with pytest.raises(RuntimeError, match="plain is no singleton task"):
            plain.delay()

    def test_eager_runs_lock_when_told_to(self, app: Any) -> None:
        """`etcd_lock_eager` locks them; a task that calls itself, or another, calls a function."""
        app.conf.etcd_lock_eager = True
        seen = []

        @app.task(base=SingletonTask, bind=True, name="outer", on_conflict="fail")
        def outer(self: Any, deep: bool = False) -> str:
            seen.append(self.lock.key)
            if not deep:
                outer(deep=True)
                with pytest.raises(LockContended):
                    outer.apply().get()
            return str(self.request.id)

        result = outer.apply()
        assert result.get() == result.id, "the body sees its own request"
        assert seen[0].startswith("/celery/locks/outer/-/write/")


def test_errors_survive_pickle_and_json() -> None:
    """What can end a task comes out of every result backend as it went in."""
    for error in (
        LockContended("/a", "w1 (pid 3)", "2026-01-01T00:00:00Z"),
        celery_etcd_lock.LockTimeout("/a", "", ""),
        LockLost("gone"),
        celery_etcd_lock.EtcdUnavailable("none", True),
        celery_etcd_lock.DuplicateTaskError("t", "id"),
        celery_etcd_lock.UnstableKeyError("x"),
    ):
        for copy in (pickle.loads(pickle.dumps(error)), type(error)(*error.args)):
            assert (type(copy), copy.args, str(copy)) == (type(error), error.args, str(error))
    assert "lost" in str(LockLost()) or "certain" in str(LockLost())
