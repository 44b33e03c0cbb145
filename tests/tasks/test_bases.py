"""Singleton tasks of all descents: bases, mixins, classes of the project's own, Django's, models for arguments."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery, Task, signals
from celery.contrib.testing.worker import start_worker

from celery_etcd_lock import ConfigError, Conflict, LockContended, SingletonTask, singleton_task
from celery_etcd_lock.testing import held_elsewhere, memory_locks

if TYPE_CHECKING:
    AnyTask = Task[Any, Any]
else:
    AnyTask = Task

BOUND = 60
"""Seconds, several times what anything here takes."""


class Own(AnyTask):
    """A project's own task class; `test_task_cls` names it by its path."""

    abstract = True

    def mine(self) -> str:
        return "mine"


def is_locked(task: Any) -> bool:
    """Whether it is held, and no stand-in."""
    return task.lock.is_held() and bool(task.lock.key)


@contextmanager
def as_it_is_logged() -> Iterator[None]:
    """A worker in this process does not set up logging anew, for all later tests."""

    def leave_it(**_: Any) -> None: ...

    signals.setup_logging.connect(leave_it)
    try:
        yield
    finally:
        signals.setup_logging.disconnect(leave_it)


@pytest.fixture
def app() -> Iterator[Any]:
    made: Any = Celery("bases", broker="memory://", backend="cache+memory://", set_as_current=True)
    made.conf.update(etcd_lock_endpoints="http://127.0.0.1:9", task_always_eager=True, etcd_lock_eager=True)
    with memory_locks():
        yield made
    made.close()


class TestBases:
    def test_a_base_with_everything(self, app: Any) -> None:
        """A project's base keeps its hooks: `__init__` once, `__call__` inside the lock, the others around it."""
        seen: list[Any] = []

        class Base(SingletonTask):
            abstract = True
            on_conflict = Conflict.skip(result="skipped")

            def __init__(self) -> None:
                seen.append("made")

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                seen.append(("call", is_locked(self)))
                try:
                    return super().__call__(*args, **kwargs)
                finally:
                    seen.append(("called", is_locked(self)))

            def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
                seen.append("before")

            def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
                seen.append(("failure", type(exc).__name__))

            def after_return(self, *_args: Any) -> None:
                seen.append("after")

        @app.task(base=Base, name="based", bind=True)
        def based(self: Any, x: int) -> int:
            seen.append(("body", is_locked(self)))
            return 1 // x

        assert based.delay(1).get() == 1
        call = [("call", True), ("body", True), ("called", True)]
        assert seen == ["made", "before", *call, "after"]
        seen.clear()
        with pytest.raises(ZeroDivisionError):
            based.delay(0).get()
        assert seen == ["before", *call, ("failure", "ZeroDivisionError"), "after"]
        with held_elsewhere(based, 1):
            assert based.delay(1).get() == "skipped"

    def test_a_mixin_in_front_or_behind(self, app: Any) -> None:
        """Either way its `__call__` runs inside the lock, and the body does, once."""
        held: dict[str, list[bool]] = {}

        class Timed:
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                task: Any = self
                held.setdefault(task.name, []).append(is_locked(task))
                return super().__call__(*args, **kwargs)  # type: ignore[misc]

        class Behind(SingletonTask, Timed, AnyTask):  # type: ignore[misc,unused-ignore]
            abstract = True

        class InFront(Timed, SingletonTask):
            abstract = True

        for base in (Behind, InFront):

            @app.task(base=base, name=base.__name__, bind=True)
            def body(self: Any) -> bool:
                # In an eager run of Celery 5.4 `Task.__call__` gives the body a request of its own, without an id.
                held[self.name].append(is_locked(self) or self.request.id is None)
                return True

            assert app.tasks[base.__name__].delay().get() is True
        assert held == {"Behind": [True, True], "InFront": [True, True]}

    def test_a_call_that_goes_past_ours(self, app: Any) -> None:
        """As Flask's documentation has it, ``self.run`` in place of ``super().__call__``: the body is locked."""

        class InContext(SingletonTask):
            abstract = True

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return self.run(*args, **kwargs)

        @app.task(base=InContext, name="in_context", bind=True, on_conflict="fail")
        def in_context(self: Any, deep: bool = False) -> tuple[bool, str]:
            return is_locked(self), self.request.id if deep else in_context(deep=True)[1]

        result = in_context.apply(task_id="mine")
        assert result.get() == (True, "mine")
        assert in_context()[0] is False, "a function call"
        with held_elsewhere(in_context), pytest.raises(LockContended):
            in_context.delay().get()

        class Deeper(InContext):
            abstract = True

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return super().__call__(*args, **kwargs)

        @app.task(base=Deeper, name="deeper", bind=True)
        def deeper(self: Any, x: int) -> tuple[bool, int, str]:
            return is_locked(self), (0 if x == 0 else deeper(x - 1)[1] + 1), self.request.id

        assert deeper.apply((3,), task_id="deep").get() == (True, 3, "deep")

    def test_options_are_inherited(self, app: Any) -> None:
        """From abstract bases, through several generations, the nearest first; and a wrong one is named by the task."""

        class Base(SingletonTask):
            abstract = True
            unique_on = "x"
            on_conflict = "skip"

        class Second(Base):
            abstract = True
            on_conflict = "fail"
            lock_limit = 2

        @app.task(base=Second, name="second")
        def second(x: int, y: int = 0) -> None: ...

        @app.task(base=Second, name="third", on_conflict="wait", unique_on=["y"], lock_limit=None)
        def third(x: int, y: int = 0) -> None: ...

        class Classy(Base):
            name = "classy"
            lock_at_least_for = 0.5

            def run(self, x: int) -> int:
                return x

        classy = app.register_task(Classy())
        assert (second.on_conflict, second._mode.limit) == (Conflict.fail(), 2)
        assert second.lock_name((1, 2)) == "/celery/locks/second/x=1"
        assert (third.on_conflict, third._mode.limit) == (Conflict.wait(), 0)
        assert third.lock_name((1, 2)) == "/celery/locks/third/y=2"
        assert (classy.on_conflict, classy.lock_at_least_for) == (Conflict.skip(), 0.5)
        assert Base.on_conflict == "skip", "a task's options are not its base's"
        with pytest.raises(ConfigError, match=r"task fourth: unique_on names 'x'.*no parameter"):

            @app.task(base=Second, name="fourth", lazy=False)
            def fourth(y: int) -> None: ...

    def test_a_task_made_of_another(self, app: Any) -> None:
        """A class-based task of which another is made: each has its own name, parameters and lock."""

        class First(SingletonTask):
            name = "first"
            unique_on = "a"

            def run(self, a: int, b: int = 0) -> str:
                return self.lock.name

        class Other(First):
            name = "other"
            unique_on = "c"

            def run(self, c: int) -> str:  # type: ignore[override]
                return self.lock.name

        first, other = (app.register_task(each()) for each in (First, Other))
        assert first.delay(1, 2).get() == "/celery/locks/first/a=1"
        assert other.delay(3).get() == "/celery/locks/other/c=3"

    @pytest.mark.parametrize("task_cls", [Own, f"{__name__}:Own"], ids=["class", "path"])
    def test_task_cls(self, task_cls: Any) -> None:
        """The app's own task class, as a class or by its path, stays a base in every shape; plain tasks are plain."""
        app: Any = Celery("task-cls", task_cls=task_cls, set_as_current=False)

        @app.task(base=SingletonTask, name="by_base")
        def by_base() -> None: ...

        @singleton_task(app=app, name="by_decorator")
        def by_decorator() -> None: ...

        name = f"shared-{type(task_cls).__name__}"

        @singleton_task(name=name)
        def shared() -> None: ...

        @app.task(name="plain")
        def plain() -> None: ...

        for each in ("by_base", "by_decorator", name):
            assert isinstance(app.tasks[each], SingletonTask), each
            assert app.tasks[each].mine() == "mine", each
        assert not isinstance(app.tasks["plain"], SingletonTask)
        assert app.tasks["plain"].mine() == "mine"


class TestAnnotations:
    def test_for_all(self, app: Any) -> None:
        """``"*"`` is for every task, one by name is over that; plain tasks and Celery's own do not mind."""
        app.conf.task_annotations = {
            "*": {"on_conflict": "skip", "lock_at_least_for": 1},
            "named": {"on_conflict": Conflict.wait(timeout=3), "unique_on": "x", "lock_at_most_for": 9},
        }

        @app.task(base=SingletonTask, name="named", on_conflict="fail")
        def named(x: int, y: int = 0) -> None: ...

        @app.task(base=SingletonTask, name="unnamed", on_conflict="fail")
        def unnamed(x: int) -> None: ...

        @app.task(name="plain")
        def plain() -> str:
            return "ran"

        assert unnamed.on_conflict == Conflict.skip()
        assert (unnamed.lock_at_least_for, named.lock_at_least_for, named.lock_at_most_for) == (1, 1, 9)
        assert named.lock_name((1, 2)) == "/celery/locks/named/x=1"
        assert plain.delay().get() == "ran"

    def test_by_a_class(self, app: Any) -> None:
        """An object with ``annotate`` chooses by the task, for class-based ones too."""

        class Chooses:
            def annotate(self, task: Any) -> dict[str, Any]:
                return {"on_conflict": "skip", "lock_limit": 3 if task.name.endswith("two") else None}

        app.conf.task_annotations = [Chooses()]

        class Soft(SingletonTask):
            abstract = True

            def run(self) -> None: ...

        class One(Soft):
            name = "soft.one"

        class Two(Soft):
            name = "soft.two"

        one, two = (app.register_task(each()) for each in (One, Two))
        assert (one.on_conflict, one._mode.limit) == (Conflict.skip(), 0)
        assert (two.on_conflict, two._mode.limit) == (Conflict.skip(), 3)

    @pytest.mark.parametrize(
        ("annotations", "says"),
        [
            ({"*": {"on_conflict": "skipp"}}, "task noted: on_conflict.*'skip'"),
            ({"noted": {"unique_on": "y"}}, "task noted: unique_on names 'y'"),
            ({"noted": {"lock_at_least_for": 9, "lock_at_most_for": 3}}, "task noted: .*contradict"),
            ({"noted": {"lock_mode": "shared", "lock_limit": 3}}, "task noted: lock_mode and lock_limit"),
        ],
    )
    def test_a_wrong_one_names_the_task(self, app: Any, annotations: Any, says: str) -> None:
        """When the task is made."""
        app.conf.task_annotations = annotations
        with pytest.raises(ConfigError, match=says):

            @app.task(base=SingletonTask, name="noted", lazy=False)
            def noted(x: int) -> None: ...

    def test_a_near_miss_is_a_warning(self, app: Any) -> None:
        """As of an option of the task's."""
        app.conf.task_annotations = {"*": {"unique_onn": "x"}}
        with pytest.warns(UserWarning, match="task noted: unique_onn.*write unique_on"):

            @app.task(base=SingletonTask, name="noted", lazy=False)
            def noted(x: int) -> None: ...


pydantic = pytest.importorskip("pydantic")


class Line(pydantic.BaseModel):  # type: ignore[misc,name-defined,unused-ignore]
    sku: str
    count: int = 1


class Order(pydantic.BaseModel):  # type: ignore[misc,name-defined,unused-ignore]
    id: int
    by: str = "post"
    lines: tuple[Line, ...] = ()


@pytest.mark.skipif(not hasattr(Task, "_dump_pydantic_arguments"), reason="models are sent from Celery 5.7 on")
def test_pydantic(app: Any) -> None:
    """The key is one where it is sent and in the worker: models, nested ones, defaults, by position and by name.

    ``"{order.id}"`` means the field, though the worker has a dict; a function for the key gets the dict.
    """
    app.conf.task_always_eager = False

    def task(name: str, **options: Any) -> Any:
        @app.task(base=SingletonTask, bind=True, name=name, pydantic=True, **options)
        def ships(self: Any, order: Order, note: Line = Line(sku="none"), by: str = "x") -> str:  # noqa: B008
            assert isinstance(order, Order)
            return str(self.lock.name)

        return app.tasks[name]

    whole, short = task("whole"), task("short", pydantic_dump_kwargs={"exclude_defaults": True})
    by_field = task("by_field", lock_key="{order.id}-{order[by]}")
    by_call = task("by_call", lock_key=lambda order, note, by: order["id"])
    orders = [Order(id=1), Order(id=2, by="air", lines=(Line(sku="a"), Line(sku="b", count=3)))]
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        *[((order,), {}) for order in orders],
        ((), {"order": orders[1], "by": "y"}),
        ((orders[0].model_dump(mode="json"),), {"note": Line(sku="n", count=2)}),
    ]
    calls = [(each, args, kwargs) for each in (whole, short) for args, kwargs in ways]
    calls += [(each, (orders[1],), {}) for each in (by_field, by_call)]
    with as_it_is_logged(), start_worker(app, perform_ping_check=False, pool="solo"):
        sent = [(call, call[0].apply_async(*call[1:])) for call in calls]
        for (each, args, kwargs), result in sent:
            assert result.get(timeout=BOUND) == each.lock_name(args, kwargs), (each.name, args, kwargs)
    assert whole.lock_name((orders[0],)) != whole.lock_name((orders[1],))
    assert by_field.lock_name((orders[1],)) == "/celery/locks/by_field/2-air"
    assert by_call.lock_name((orders[1],)) == "/celery/locks/by_call/2"


def test_django(tmp_path: Path) -> None:
    """With a settings module of its own: its task class stays, and what is sent on commit is sent on commit, locked."""
    pytest.importorskip("django")
    (tmp_path / "shop_settings.py").write_text(
        textwrap.dedent("""
        SECRET_KEY = "x"
        USE_TZ = True
        DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
        CELERY_BROKER_URL = "memory://"
        CELERY_RESULT_BACKEND = "cache+memory://"
        CELERY_TASK_ALWAYS_EAGER = True
        CELERY_ETCD_LOCK_ENDPOINTS = "memory://django"
        CELERY_ETCD_LOCK_NAMESPACE = "shop"
        CELERY_ETCD_LOCK_EAGER = True
        CELERY_ETCD_LOCK_ON_CONFLICT = "skip"
        """)
    )
    (tmp_path / "shop.py").write_text(
        textwrap.dedent("""
        import os
        os.environ["DJANGO_SETTINGS_MODULE"] = "shop_settings"
        import django
        from celery import Celery, shared_task
        from celery.contrib.django.task import DjangoTask
        from celery_etcd_lock import SingletonTask, singleton_task
        from celery_etcd_lock.testing import held_elsewhere

        app = Celery("shop")
        app.config_from_object("django.conf:settings", namespace="CELERY")
        django.setup()
        from django.db import transaction
        ran = []

        @singleton_task(bind=True)
        def by_decorator(self, x):
            ran.append((x, self.lock.name))

        @shared_task(base=SingletonTask, bind=True)
        def by_shared(self, x):
            ran.append((x, self.lock.name))

        @app.task(base=SingletonTask, bind=True)
        def by_app(self, x):
            ran.append((x, self.lock.name))

        class Classy(SingletonTask, DjangoTask):
            name = "classy"
            def run(self, x):
                ran.append((x, self.lock.name))
        classy = app.register_task(Classy())

        for task in (by_decorator, by_shared, by_app, classy):
            real = app.tasks[task.name]
            assert isinstance(real, SingletonTask) and isinstance(real, DjangoTask), type(real).__mro__
            ran.clear()
            with transaction.atomic():
                task.delay_on_commit(1)
                task.apply_async_on_commit((2,), on_conflict="fail")
                assert ran == []
            assert ran == [(x, f"/shop/locks/{task.name}/x={x}") for x in (1, 2)], ran
            with held_elsewhere(task, 1), transaction.atomic():
                task.delay_on_commit(1)
            assert len(ran) == 2, ran
        print("all well")
        """)
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "shop.py")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "all well\n", done.stderr


ROOT = Path(__file__).resolve().parents[2]
