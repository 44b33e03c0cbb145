"""Options for one call: on a publish, on a signature, in a header; and the ones that cannot be meant."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.beat import Scheduler
from kombu.utils.json import dumps, loads

from celery_etcd_lock import ConfigError, Conflict, LockContended, SingletonTask
from celery_etcd_lock.testing import EtcdServer, held_elsewhere, memory_locks
from tests.servers import RedisServer
from tests.tasks.shaped_tasks import make
from tests.workers import Project, project, until

BOUND = 120
"""Seconds, several times what anything here takes."""

GIVEN: dict[str, Any] = {
    "on_conflict": Conflict.retry(countdown=0.2), "on_lost": "warn", "on_unavailable": "run", "lock_at_least_for": 0,
    "lock_at_most_for": 60, "on_duplicate": "raise",
}  # fmt: skip
TRAVELS: dict[str, Any] = {**GIVEN, "on_conflict": {"name": "retry", "countdown": 0.2}}


@pytest.fixture(scope="module")
def running(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    settings: dict[str, Any] = {"imports": ["shaped_tasks"]}
    with project(redis.url, etcd.url, tmp_path_factory.mktemp("calls"), **settings) as made:
        made.app.conf.update(etcd_lock_namespace=made.queue, etcd_lock_endpoints=etcd.url)
        make(made.app)
        made.worker("-P", "threads", "-c", "4")
        yield made


def task_of(running: Project, name: str) -> Any:
    return running.app.tasks[name]


class TestOnTheWay:
    def test_all_of_them_stay_on_the_message(self, running: Project) -> None:
        """Through being put back because of a holder, and through the task's own retry, every one of them holds."""
        told = task_of(running, "told")
        with held_elsewhere(told, key="stays"):
            sent = told.apply_async((), {"key": "stays", "retry": True}, **GIVEN)
            until(lambda: running.workers[0].output.count(f"told[{sent.id}] retry") >= 2, "two waits", seconds=BOUND)
        header = sent.get(timeout=BOUND)
        assert header["retries"] == 1
        assert {key: header[key] for key in TRAVELS} == TRAVELS

    def test_by_name(self, running: Project) -> None:
        """``send_task`` carries them in the header; without, the task's own hold."""
        headers = {"etcd_lock": {"on_conflict": {"name": "skip", "result": 9}}}
        with held_elsewhere(task_of(running, "fails"), 0, key="named"):
            sent, plain = (
                running.app.send_task("fails", (0,), {"key": "named"}, headers=each) for each in (headers, None)
            )
            assert sent.get(timeout=BOUND) == 9
            with pytest.raises(LockContended):
                plain.get(timeout=BOUND)

    def test_in_every_place_of_a_canvas(self, running: Project) -> None:
        """A signature's options hold for it, in chains, groups and chords, and for nobody else."""
        fails, plain, total = (task_of(running, name) for name in ("fails", "plain", "total"))
        skips = fails.si(0, key="canvas").set(on_conflict=Conflict.skip(result=5, chain="continue"))
        with held_elsewhere(fails, 0, key="canvas"):
            assert chain(plain.s(1), skips, plain.s()).delay().get(timeout=BOUND) == 5
            assert group(plain.s(1), skips).delay().get(timeout=BOUND) == [1, 5]
            assert chord([plain.s(1), skips, skips.clone()], total.s()).delay().get(timeout=BOUND) == 11
            body = skips.clone().set(on_conflict="skip")
            assert chord([plain.s(1), plain.s(2)], body).delay().get(timeout=BOUND) is None
            with pytest.raises(LockContended):
                chain(plain.s(1), fails.si(0, key="canvas")).delay().get(timeout=BOUND)

    def test_by_beat(self, running: Project) -> None:
        """An entry's options hold for what it sends."""
        fails = task_of(running, "fails")
        entry = {"task": "fails", "args": (0,), "kwargs": {"key": "beat"}, "schedule": 60,
                 "options": {"on_conflict": Conflict.skip(result="beat's")}}  # fmt: skip
        scheduler = Scheduler(running.app, lazy=True)
        scheduler.update_from_dict({"x": entry})
        with held_elsewhere(fails, 0, key="beat"):
            assert scheduler.apply_async(scheduler.schedule["x"]).get(timeout=BOUND) == "beat's"

    @pytest.mark.parametrize(
        ("header", "says"),
        [
            ({"on_conflict": "skipp"}, "task fails: .*did you mean 'skip'"),
            ({"on_conflict": {"name": "retry", "backof": 1}}, "task fails: .*did you mean 'backoff'"),
            ({"on_conflict": 3}, "task fails: on_conflict"),
            ({"lock_at_least_for": "3"}, "task fails: lock_at_least_for.*seconds"),
            ({"lock_at_least_for": 9, "lock_at_most_for": 3}, "task fails: .*contradict"),
            ({"on_lst": "warn"}, "task fails: .*did you mean 'on_lost'"),
            ({"unique_on": "key"}, "task fails: .*goes to the task itself"),
            ("skip", "etcd_lock is 'skip': write a dict"),
        ],
    )
    def test_what_a_foreign_publisher_gets_wrong_is_a_failure(self, running: Project, header: Any, says: str) -> None:
        """FAILURE with a ConfigError that says what to write; the body does not run, the worker does."""
        sent = running.app.send_task("fails", (0,), {"key": "bad"}, headers={"etcd_lock": header})
        with pytest.raises(ConfigError, match=says):
            sent.get(timeout=BOUND)
        assert [run for run in running.runs() if run.id == sent.id] == []

    def test_waits_that_nobody_can_have_had_are_none(self, running: Project) -> None:
        """Nonsense in place of our own figures does no harm."""
        for nonsense in ({"count": "x"}, {"seconds": float("inf")}, {"times": 1e400}, {"count": -5, "at": -1.0}):
            sent = running.app.send_task("fails", (3, 0.0), {"key": "odd"}, headers={"etcd_lock": nonsense})
            assert sent.get(timeout=BOUND) == 3

    def test_headers_handed_on_are_not_anothers(self, running: Project) -> None:
        """A body that gives its own headers to another task does not give it its options, whoever wrote them."""
        for written in ({"lock_at_most_for": 50}, {"lock_at_most_for": 50, "count": 3}):
            sent = running.app.send_task("hands_on", (), {"key": "mine"}, headers={"etcd_lock": written, "x-mine": 1})
            theirs = running.app.AsyncResult(sent.get(timeout=BOUND)).get(timeout=BOUND)
            assert "lock_at_most_for" not in theirs
            assert theirs["of"] != sent.id
            assert not theirs.get("count")


@pytest.fixture
def app() -> Iterator[Any]:
    made: Any = Celery("calls", broker="memory://", backend="cache+memory://", set_as_current=True)
    made.conf.update(etcd_lock_endpoints="http://127.0.0.1:9", etcd_lock_eager=True)
    with memory_locks():
        yield made
    made.close()


@pytest.fixture
def eager(app: Any) -> Any:
    @app.task(base=SingletonTask, name="eager", on_conflict="fail", lock_at_least_for=20)
    def eager(x: int = 0) -> int:
        return x

    return eager


class TestWhereItIsSent:
    def test_eager(self, eager: Any) -> None:
        """`apply` takes them too; and a lock that is to stay taken does."""
        assert eager.apply((1,)).get() == 1
        assert eager.apply((1,), on_conflict="skip").get() is None
        assert eager.apply((1,), on_conflict=Conflict.skip(result=2)).get() == 2
        assert eager.s(1).set(on_conflict={"name": "skip", "result": 3}).apply().get() == 3
        with pytest.raises(LockContended):
            eager.apply((1,), throw=True)
        assert eager.apply((2,), lock_at_least_for=0).get() == eager.apply((2,)).get() == 2

    def test_none_is_what_the_settings_say(self, app: Any, eager: Any) -> None:
        """An option that is given as None counts as not set on the task either."""
        app.conf.etcd_lock_on_conflict = Conflict.skip(result="settings")
        with held_elsewhere(eager, 1):
            assert eager.apply((1,), on_conflict=None).get() == "settings"
        assert eager.apply((3,), lock_at_least_for=None).get() == eager.apply((3,)).get() == 3

    @pytest.mark.parametrize(
        "publish",
        [
            lambda task, options: task.apply_async((), **options),
            lambda task, options: task.s().set(**options).delay(),
            lambda task, options: task.apply((), **options),
            lambda task, options: task.apply_async((), headers={"etcd_lock": options}),
        ],
        ids=["apply_async", "set", "apply", "headers"],
    )
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"on_conflict": "skipp"}, "on_conflict.*did you mean 'skip'"),
            ({"on_conflict": Conflict.skip}, "Conflict.skip()"),
            ({"on_lost": "abourt"}, "on_lost='abourt'.*'abort'"),
            ({"on_unavailable": "wait"}, "on_unavailable='wait': write one of 'retry', 'fail', 'run'"),
            ({"on_duplicate": "skip"}, "on_duplicate='skip': write one of 'return', 'raise'"),
            ({"lock_at_least_for": -1}, "lock_at_least_for=-1: write seconds"),
            ({"lock_at_most_for": 0}, "lock_at_most_for=0: write more than 0"),
            ({"lock_at_most_for": 5}, "lock_at_least_for=20 is longer than lock_at_most_for=5"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(
        self, eager: Any, publish: Callable[..., Any], options: dict[str, Any], says: str
    ) -> None:
        """`ConfigError` where it is sent, with the task, the option and what to write."""
        with pytest.raises(ConfigError, match=f"task eager: .*{says}"):
            publish(eager, options)

    def test_a_near_miss_is_a_warning(self, eager: Any) -> None:
        """Celery would pass on in silence what is nearly one of ours, or one of the task's."""
        with pytest.warns(UserWarning, match="task eager: on_conflit .*does nothing: write on_conflict"):
            eager.apply_async((1,), on_conflit="skip")
        with pytest.warns(UserWarning, match="task eager: unique_on .*options of the task"):
            eager.s(1).set(unique_on="x").delay()

    def test_nothing_is_said_of_celerys_own(self, eager: Any) -> None:
        """Options of Celery's and of the broker's, and stamps of any name, pass unnoticed."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            eager.apply_async(
                (1,), countdown=1, expires=9, priority=1, link=[], link_error=eager.s(), shadow="x", retry=False,
                time_limit=9, soft_time_limit=8, ignore_result=True, delivery_mode=1, routing_key="celery",
            )  # fmt: skip
            sig = eager.s(1)
            sig.stamp(on_lst="me")
            sig.delay()

    def test_where_they_can_do_nothing_is_said(self, app: Any) -> None:
        """Given to ``send_task``, or to a group for its plain members, they would be lost in silence."""

        @app.task(name="plain")
        def plain() -> None: ...

        with pytest.warns(UserWarning, match=r"on_conflict does nothing for elsewhere.*headers=\{\"etcd_lock\""):
            app.send_task("elsewhere", on_conflict="skip")
        with pytest.warns(UserWarning, match="on_lost does nothing for plain"):
            plain.apply_async(on_lost="warn")

    def test_a_signature_with_a_policy_is_json(self, eager: Any) -> None:
        """As part of a message, and back again."""
        for policy in (Conflict.skip(result=[1]), Conflict.retry(countdown=3), Conflict.wait(), Conflict.coalesce()):
            options = loads(dumps(eager.s(1).set(on_conflict=policy)))["options"]
            assert Conflict.parse(options["on_conflict"]) == policy
            assert json.loads(json.dumps(options)) == options
