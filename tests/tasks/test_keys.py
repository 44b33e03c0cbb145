"""Lock names: the public layout, what is one call and what are two, and what has no name."""

from __future__ import annotations

import collections
import dataclasses
import enum
import hashlib
import inspect
import io
import json
import math
import re
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import unquote
from uuid import UUID

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kombu.utils import json as kombu_json

from celery_etcd_lock.exceptions import ConfigError, UnstableKeyError
from celery_etcd_lock.tasks.canonical import canonical
from celery_etcd_lock.tasks.keys import KeyRule, lock_name

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call(*args: Any, **kwargs: Any) -> Call:
    return args, kwargs


def sync(account_id: Any, full: Any = False) -> None:
    """The usual task."""


def anything(*args: Any, **kwargs: Any) -> None:
    """A task of no certain arguments."""


def rule_of(function: Callable[..., Any] = sync, **options: Any) -> KeyRule:
    return KeyRule.make("proj.sync", inspect.signature(function), **options)


def key_of(function: Callable[..., Any], given: Call, **options: Any) -> str:
    return rule_of(function, **options).key(*given)


def key_for(value: object) -> str:
    return key_of(sync, call(value))


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Mode(str, enum.Enum):
    FAST = "fast"


class SafeString(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "not the content"


class Kilo(float):
    def __repr__(self) -> str:
        return "a kilo"


class Moment(datetime):
    pass


class Money:
    """Says itself what it is in JSON."""

    def __json__(self) -> object:
        return {"amount": 5}


class Model:
    """As pydantic's."""

    def model_dump(self, mode: str) -> dict[str, Any]:
        assert mode == "json"
        return {"amount": 5}


class Foo:
    pass


class Named:
    def __str__(self) -> str:
        return "a name"


@dataclasses.dataclass
class Range:
    low: Any
    high: Any = None


class Pair(NamedTuple):
    left: Any
    right: Any


ID = UUID("12345678-1234-5678-1234-567812345678")
LONG = "x" * 200


class TestLayout:
    """Public and golden: a rolling deploy mixes versions, so no line here may ever change."""

    @pytest.mark.parametrize(
        ("function", "given", "name"),
        [
            (sync, call(42), "/celery/locks/proj.sync/account_id=42"),
            (sync, call(account_id=42, full=False), "/celery/locks/proj.sync/account_id=42"),
            (sync, call(42, True), "/celery/locks/proj.sync/account_id=42,full=true"),
            (sync, call("42"), "/celery/locks/proj.sync/account_id=%2242%22"),
            (sync, call("1_y-2"), "/celery/locks/proj.sync/account_id=1_y-2"),
            (sync, call("eu.west:9"), "/celery/locks/proj.sync/account_id=eu.west:9"),
            (sync, call(""), "/celery/locks/proj.sync/account_id=%22%22"),
            (sync, call("null"), "/celery/locks/proj.sync/account_id=%22null%22"),
            (sync, call("1e5"), "/celery/locks/proj.sync/account_id=%221e5%22"),
            (sync, call("-"), "/celery/locks/proj.sync/account_id=%22-%22"),
            (sync, call(None), "/celery/locks/proj.sync/account_id=null"),
            (sync, call(1.5), "/celery/locks/proj.sync/account_id=1.5"),
            (sync, call(math.nan), "/celery/locks/proj.sync/account_id=NaN"),
            (sync, call(-math.inf), "/celery/locks/proj.sync/account_id=-Infinity"),
            (sync, call("a/b%c\n"), "/celery/locks/proj.sync/account_id=%22a%2Fb%25c%5Cn%22"),
            (sync, call("é😀"), "/celery/locks/proj.sync/account_id=%22%C3%A9%F0%9F%98%80%22"),
            (sync, call("\ud800"), "/celery/locks/proj.sync/account_id=%22%ED%A0%80%22"),
            (sync, call([1, "a"]), "/celery/locks/proj.sync/account_id=%5B1,%22a%22%5D"),
            (sync, call({"b": 1, "a": None}), "/celery/locks/proj.sync/account_id=%7B%22a%22:null,%22b%22:1%7D"),
            (sync, call({"$a": 1}), "/celery/locks/proj.sync/account_id=%7B%22%24%24a%22:1%7D"),
            (sync, call(b"a"), "/celery/locks/proj.sync/account_id=%7B%22%24bytes%22:%22YQ==%22%7D"),
            (sync, call({2, 1}), "/celery/locks/proj.sync/account_id=%7B%22%24set%22:%5B1,2%5D%7D"),
            (sync, call(ID), f"/celery/locks/proj.sync/account_id={ID}"),
            (sync, call(Decimal("1.50")), "/celery/locks/proj.sync/account_id=%221.50%22"),
            (sync, call(date(2024, 2, 1)), "/celery/locks/proj.sync/account_id=2024-02-01"),
            (sync, call(datetime(2024, 2, 1, 8)), "/celery/locks/proj.sync/account_id=2024-02-01T08:00:00"),  # noqa: DTZ001
            (
                sync,
                call(LONG),
                "/celery/locks/proj.sync/sha256-c9349e78c6329c1902d06de223ceb64ec353a9fae9bbfc1e686f567c0bddc3d9",
            ),
            (anything, call(), "/celery/locks/proj.sync/-"),
            (anything, call(1, z=2, b="x"), "/celery/locks/proj.sync/%2Aargs=%5B1%5D,b=x,z=2"),
            (anything, call(args=1), "/celery/locks/proj.sync/%2A%2Aargs=1"),
            (anything, call(**{"a=b,c": 1}), "/celery/locks/proj.sync/%22a=b,c%22=1"),
            (sync, call(), "/celery/locks/proj.sync/%2A=%5B%5D"),
            (sync, call(1, 2, 3, x=4), "/celery/locks/proj.sync/%2A=%5B1,2,3%5D,x=4"),
        ],
    )
    def test_from_arguments(self, function: Callable[..., Any], given: Call, name: str) -> None:
        """The names that calls have."""
        assert rule_of(function).lock_name("celery", *given) == name

    @pytest.mark.parametrize(
        ("lock_key", "name"),
        [
            ("all", "/celery/locks/proj.sync/all"),
            ("import:{account_id}", "/celery/locks/proj.sync/import:42"),
            ("{account_id:05d}-{full}", "/celery/locks/proj.sync/00042-False"),
            ("a b/{{{account_id}}}", "/celery/locks/proj.sync/a%20b%2F%7B42%7D"),
            ("/import:{account_id}", "/celery/locks/@shared/import:42"),
            ("//x", "/celery/locks/@shared/%2Fx"),
            (LONG, "/celery/locks/proj.sync/sha256-aa20c23e3201834050679e1d88941b9a6fed0557c9a705cb2c315e2e63fd486d"),
            (
                "/" + LONG,
                "/celery/locks/@shared/sha256-aa20c23e3201834050679e1d88941b9a6fed0557c9a705cb2c315e2e63fd486d",
            ),
            (lambda account_id, full: (account_id, full), "/celery/locks/proj.sync/%5B42,false%5D"),
            (lambda full, account_id: f"/{account_id}.{full}", "/celery/locks/@shared/42.False"),
        ],
    )
    def test_from_lock_key(self, lock_key: Any, name: str) -> None:
        """The names that authors make."""
        assert rule_of(lock_key=lock_key).lock_name("celery", *call(42)) == name

    def test_by_hand(self) -> None:
        """`lock_name` by itself gives the same, for whoever takes a task's lock from elsewhere."""
        assert lock_name("celery", "proj.sync", "account_id=42") == "/celery/locks/proj.sync/account_id=42"
        assert lock_name("celery", "proj.sync", "/import") == "/celery/locks/@shared/import"
        assert lock_name("my app", "a/b@c", "d/e") == "/my%20app/locks/a%2Fb%40c/d%2Fe"

    @pytest.mark.parametrize("parts", [("", "t", "k"), ("n", "", "k"), ("n", "t", ""), ("n", "t", "/")])
    def test_no_part_is_empty(self, parts: tuple[str, str, str]) -> None:
        """An empty part would be a path that holds other locks."""
        with pytest.raises(ConfigError, match="cannot be empty"):
            lock_name(*parts)

    def test_a_shared_key_is_no_task_s(self) -> None:
        """A task whose name looks like the place of shared keys has another place."""
        assert lock_name("celery", "@shared", "x") != lock_name("celery", "any", "/x")

    @given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1))
    def test_every_name_has_four_parts(self, namespace: str, task: str, key: str) -> None:
        """Whatever is in the parts, no lock's name is the parent of another's, and a shell takes it unquoted."""
        assume(key != "/")
        name = lock_name(namespace, task, key)
        assert re.fullmatch(r"/[^/]+/locks/[^/]+/[^/]+", name)
        assert re.fullmatch(r"[A-Za-z0-9_.~@+=:,%/-]+", name)


class TestSame:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (call(1), call(account_id=1)),
            (call(1), call(1, False)),
            (call(1), call(full=False, account_id=1)),
            (call({"a": 1, "b": 2}), call({"b": 2, "a": 1})),
            (call((1, (2,))), call([1, [2]])),
            (call(Pair(1, 2)), call([1, 2])),
            (call({2: "x", None: 0, True: 1, 1.5: 2}), call({"2": "x", "null": 0, "true": 1, "1.5": 2})),
            (call({ID: 1}), call({str(ID): 1})),
            (call(collections.OrderedDict(a=1)), call({"a": 1})),
            (call(Color.RED), call("red")),
            (call(Level.HIGH), call(3)),
            (call(Mode.FAST), call("fast")),
            (call({Mode.FAST: Color.RED}), call({"fast": "red"})),
            (call(SafeString("x")), call("x")),
            (call(Kilo(1000)), call(1000.0)),
            (call(ID), call(str(ID))),
            (call(Decimal("1.50")), call("1.50")),
            (call(date(2024, 2, 1)), call("2024-02-01")),
            (call(time(8, 30)), call("08:30:00")),
            (call(datetime(2024, 2, 1, tzinfo=timezone.utc)), call("2024-02-01T00:00:00+00:00")),
            (call(Moment(2024, 2, 1, tzinfo=timezone.utc)), call("2024-02-01T00:00:00+00:00")),
            (call(math.nan), call(-math.nan)),
            (call(bytearray(b"a")), call(b"a")),
            (call(memoryview(b"abcd")[::2]), call(b"ac")),
            (call(frozenset({1, "1"})), call({"1", 1})),
            (call(Money()), call({"amount": 5})),
            (call(Model()), call({"amount": 5})),
            (call(Range(Color.RED)), call({"low": "red", "high": None})),
            (call("\ud83d\ude00"), call("😀")),
            (call({"__type__": "uuid", "__value__": {"hex": ID.hex}}), call(ID)),
        ],
    )
    def test_one_lock(self, one: Call, other: Call) -> None:
        """Calls that mean the same have the same key."""
        assert key_of(sync, one) == key_of(sync, other)
        hidden = rule_of()
        assert hidden.key(*one, hide_arguments=True) == hidden.key(*other, hide_arguments=True)

    def test_before_and_after_a_parameter_was_added(self) -> None:
        """A rolling deploy that adds a parameter with a default, or moves it, keeps excluding."""

        def before(x: Any) -> None: ...

        def after(x: Any, y: Any = (1, 2)) -> None: ...

        def moved(*, y: Any = None, x: Any) -> None: ...

        def loose(**kwargs: Any) -> None: ...

        assert key_of(before, call(1)) == key_of(after, call(1)) == key_of(moved, call(x=1)) == "x=1"
        assert key_of(after, call(1, [1, 2])) == "x=1"
        assert key_of(loose, call(y=3, x=1)) == key_of(after, call(1, 3)) == "x=1,y=3"

    def test_a_default_without_a_stable_form(self) -> None:
        """A sentinel as the default is recognised by itself."""
        sentinel = object()

        def task(x: Any, y: Any = sentinel) -> None: ...

        assert key_of(task, call(1, y=sentinel)) == key_of(task, call(1)) == "x=1"

    def test_a_bound_task_s_self_is_no_argument(self) -> None:
        """`bound` drops the first parameter of a function that is to be bound."""

        def task(self: Any, x: Any) -> None: ...

        assert key_of(task, call(1), bound=True) == "x=1"

    def test_registered_types(self) -> None:
        """A type that a project taught to Celery's JSON is equal to itself after the journey."""

        @dataclasses.dataclass(frozen=True)
        class Point:
            x: int

        kombu_json.register_type(Point, "point", lambda point: point.x, Point)
        try:
            returned = kombu_json.loads(kombu_json.dumps(Point(1)))
            assert returned == Point(1)
            assert key_for(returned) == key_for(Point(1)) == key_for({"__type__": "point", "__value__": 1})
            assert key_for(Point(2)) != key_for(Point(1))
        finally:
            for registry in ("_encoders", "_decoders"):
                types = getattr(kombu_json, registry)
                types.pop(Point, None) or types.pop("point", None)

    def test_django_s_lazy_strings(self) -> None:
        """A lazy translation is its text, as in Celery's JSON."""
        functional = pytest.importorskip("django.utils.functional")
        assert key_for(functional.lazystr("hello")) == key_for("hello")

    def test_pydantic_s_models(self) -> None:
        """A model is what Celery publishes of it."""
        pydantic = pytest.importorskip("pydantic")
        model = pydantic.create_model("Order", id=(int, ...), day=(date, ...))(id=1, day="2024-02-01")
        assert key_for(model) == key_for({"id": 1, "day": "2024-02-01"})


class TestDifferent:
    @pytest.mark.parametrize(
        "values",
        [
            [1, "1", True, 1.0, "true", "True", "1.0", [1], {"1": 1}, b"1", {1}],
            [0, False, None, "", 0.0, -0.0, "null", [], {}, b"", set(), "-"],
            ["a,b", ["a", "b"], "a", "a,full=true", 'a",full="b'],
            [Decimal("1.0"), Decimal("1.00"), 1.0],
            [date(2024, 2, 1), datetime(2024, 2, 1)],  # noqa: DTZ001
            [{"$set": [1]}, {1}, {"$$set": [1]}],
            [{"$bytes": "YQ=="}, b"a", "a", "YQ=="],
            [{"$int": "f" * 600}, int("f" * 600, 16), int("f" * 601, 16)],
            ["é", "e\u0301", "É"],
            ["\ud83d", "\ude00", "😀", "\ude00\ud83d"],
            [math.nan, math.inf, -math.inf, "NaN", "nan"],
            [{"__type__": "no such", "__value__": 1}, {"__type__": "uuid", "__value__": 1}],
            [{ID, str(ID)}, {ID}],
            [LONG, LONG + "x", f"sha256-{'0' * 64}"],
        ],
    )
    def test_several_locks(self, values: list[object]) -> None:
        """Values that are not the same have keys of their own, readable or hashed."""
        assert len({key_for(value) for value in values}) == len(values)
        rule = rule_of()
        assert len({rule.key((value,), {}, hide_arguments=True) for value in values}) == len(values)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (call("1_y-2"), call(1, "y-2")),
            (call("1,full=2"), call("1", 2)),
            (call("1,full=true"), call(1, True)),
        ],
    )
    def test_one_argument_is_not_two(self, one: Call, other: Call) -> None:
        """What joins arguments in a key is no part of a value."""
        assert key_of(sync, one) != key_of(sync, other)

    def test_extras_and_parameters_of_the_same_name(self) -> None:
        """A keyword extra may bear the name of a parameter, and is still another thing."""

        def task(x: Any, /, *args: Any, **more: Any) -> None: ...

        calls = [call(1), call(1, x=2), call(2, x=1), call(1, 2), call(1, args=[2]), call(1, **{"*args": [2]})]
        assert len({key_of(task, each) for each in calls}) == len(calls)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet='a1,="{}[]$*-%/.é😀\ud83d\ude00 '),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("a$1_", max_size=3), inner, max_size=3),
    max_leaves=6,
)
values = (
    plain
    | st.dictionaries(st.integers() | st.booleans() | st.none(), plain, max_size=2)
    | st.tuples(plain, plain)
    | st.binary(max_size=4)
    | st.uuids()
    | st.decimals()
    | st.dates()
    | st.times()
    | st.datetimes(timezones=st.just(timezone(timedelta(hours=2))) | st.none())
    | st.sampled_from([Level.HIGH, Mode.FAST, SafeString("x"), Pair(1, [b"\xff"])])
)
names = st.text("ab*,=\"'é-", min_size=1, max_size=3)
calls = st.tuples(st.lists(values, max_size=2), st.dictionaries(names, values, max_size=3))


def read_back(key: str) -> dict[str, Any]:
    """What a readable key says: the canonical arguments by name. The proof that no two sets of them share a key."""
    arguments: dict[str, Any] = {}
    decoder = json.JSONDecoder()
    at = 0 if key != "-" else 1
    while at < len(key):
        if key[at] == '"':
            name, at = decoder.raw_decode(key, at)
        else:
            name, at = key[at : key.index("=", at)], key.index("=", at)
        assert key[at] == "="
        at += 1
        if key[at] in '"[{':
            value, at = decoder.raw_decode(key, at)
        else:
            bare = key[at:].partition(",")[0]
            at += len(bare)
            try:
                value = json.loads(bare)
            except ValueError:
                value = bare
        assert name not in arguments
        arguments[name] = value
        assert at == len(key) or key[at] == ","
        at += 1
    return arguments


def exactly(value: Any) -> str:
    """Equal only for values equal in type too, and for NaN."""
    return json.dumps(value, sort_keys=True)


class TestInjective:
    @given(calls)
    @example((["1_y-2"], {}))
    @example(([], {"*": [1], "args": 2, "**args": 3}))
    def test_a_readable_key_can_be_read_back(self, given: tuple[list[Any], dict[str, Any]]) -> None:
        """From the key alone, the canonical arguments come back, so different ones have different keys."""
        args, kwargs = given
        try:
            key = key_of(anything, (tuple(args), kwargs))
            expected = {f"**{name}" if name[0] == "*" else name: canonical(kwargs[name]) for name in kwargs}
            expected = {f"**{name}" if name in ("args", "kwargs") else name: each for name, each in expected.items()}
        except UnstableKeyError:
            assume(False)
        if args:
            expected["*args"] = canonical(args)
        if key.startswith("sha256-"):
            text = json.dumps(expected, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            assert key == f"sha256-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
        else:
            assert exactly(read_back(key)) == exactly(expected)
            name = lock_name("n", "t", key)
            assert unquote(name.removeprefix("/n/locks/t/"), errors="surrogatepass") == key
            assert len(name.removeprefix("/n/locks/t/")) <= 120

    @given(plain, plain)
    def test_json_values_differ_as_json_does(self, one: Any, other: Any) -> None:
        """Among plain JSON values, one key means one JSON text."""
        same = exactly(json.loads(json.dumps(one))) == exactly(json.loads(json.dumps(other)))
        assert (key_for(one) == key_for(other)) == same

    @given(values)
    def test_the_key_survives_celery_s_json(self, value: Any) -> None:
        """A value has the same key at publish and in the worker, to which JSON has brought it."""
        try:
            key = key_for(value)
        except UnstableKeyError:
            assume(False)
        returned = kombu_json.loads(kombu_json.dumps(value))
        assert key_for(returned) == key


def nested() -> list[Any]:
    endless: list[Any] = []
    endless.append({"again": endless})
    return endless


class TestUnstable:
    @pytest.mark.parametrize(
        ("value", "said"),
        [
            (Foo(), "account_id is of type test_keys.Foo: no stable key"),
            ({"when": [Foo()]}, 'account_id["when"][0] is of type test_keys.Foo'),
            (Range(low=[Foo()]), "account_id.low[0] is of type test_keys.Foo"),
            ((1, {2: Foo()}), 'account_id[1]["2"] is of type test_keys.Foo'),
            ({Foo()}, "account_id{…} is of type test_keys.Foo"),
            (object, "account_id is of type type"),
            (sync, "account_id is of type function: no stable key for a lock can be made of it. Pass its name"),
            (
                (i for i in "a"),
                "account_id is of type generator: no stable key for a lock can be made of it. Pass a list",
            ),
            (range(3), "Pass a list"),
            (
                io.StringIO(),
                "account_id is of type _io.StringIO: no stable key for a lock can be made of it. Pass its path",
            ),
            (ValueError("x"), "account_id is of type ValueError"),
            (timedelta(1), "account_id is of type datetime.timedelta"),
            ({1: 0, "1": 0}, 'account_id is of type dict and has several keys that are "1" in JSON'),
            ({(1, 2): 0}, "account_id is of type tuple and is the key of a dict"),
            (nested(), "account_id[0]"),
            (nested(), "contains itself, or is nested too deeply"),
        ],
    )
    def test_says_which_argument(self, value: object, said: str) -> None:
        """The message names task, parameter, the way inside it, type, and what to write instead."""
        with pytest.raises(UnstableKeyError) as raised:
            key_for(value)
        message = str(raised.value).replace(f"{__name__}.", "test_keys.")
        assert message.startswith("task proj.sync: ")
        assert said in message
        assert "unique_on=[...]" in message
        assert "lock_key=" in message
        assert len(message) < 400

    def test_a_model_of_the_database(self) -> None:
        """Django's models are to be passed by their primary key."""
        row = type("Account", (), {"_meta": object(), "pk": property(lambda self: 5)})()
        with pytest.raises(UnstableKeyError, match=r"Pass its primary key \(\.pk\)"):
            key_for(row)

    def test_extras_are_named(self) -> None:
        """Among extras, the message says which."""
        with pytest.raises(UnstableKeyError, match=r"\*args\[1\] is of type"):
            key_of(anything, call(1, Foo()))
        with pytest.raises(UnstableKeyError, match="when is of type"):
            key_of(anything, call(when=Foo()))
        with pytest.raises(UnstableKeyError, match=r"the positional arguments\[2\] is of type"):
            key_of(sync, call(1, 2, Foo()))

    def test_an_argument_that_does_not_count_may_be_anything(self) -> None:
        """What `unique_on` leaves out is not looked at."""
        assert key_of(sync, call(1, Foo()), unique_on="account_id") == "account_id=1"

    def test_deep_but_finite(self) -> None:
        """Ordinary depth is no trouble; depth beyond reason is an error of ours, not Python's."""
        deep: list[Any] = []
        for _ in range(50):
            deep = [deep]
        assert key_for(deep).startswith("sha256-")
        for _ in range(5000):
            deep = [deep]
        with pytest.raises(UnstableKeyError, match="nested too deeply"):
            key_for(deep)


class TestHidden:
    def test_no_value_is_in_the_name(self) -> None:
        """`hide_arguments` hashes what comes from arguments, and nothing else."""
        secret = call("hunter2")
        for options in ({}, {"lock_key": "import:{account_id}"}, {"lock_key": lambda account_id, full: account_id}):
            key = rule_of(**options).key(*secret, hide_arguments=True)
            assert re.fullmatch(r"sha256-[0-9a-f]{64}", key)
        assert rule_of(lock_key="/x{account_id}").key(*secret, hide_arguments=True).startswith("/sha256-")
        assert rule_of(lock_key="all").key(*secret, hide_arguments=True) == "all"
        assert rule_of(anything).key((), {}, hide_arguments=True) == "-"

    def test_a_key_that_looks_hashed_is_hashed(self) -> None:
        """Nobody writes by hand what the hash of something else could be."""
        looks = f"sha256-{'0' * 64}"
        assert key_of(sync, call(1), lock_key=looks) != looks
        assert key_of(sync, call(1), lock_key=f"/{looks}") != f"/{looks}"


class TestUniqueOn:
    @pytest.mark.parametrize(
        ("unique_on", "key"),
        [
            ("a", "a=1"),
            (["a"], "a=1"),
            (("b", "a"), "a=1,b=2"),
            ({"c"}, "c=3"),
            ("args", "*args=[7]"),
            ("more", "d=4,e=5"),
            (["e", "a"], "a=1,e=5"),
            ("absent", "-"),
        ],
    )
    def test_what_counts(self, unique_on: Any, key: str) -> None:
        """Only the named parameters are in the key; extras by their own names or all together."""

        def task(a: Any, b: Any = None, *args: Any, c: Any = None, **more: Any) -> None: ...

        assert key_of(task, call(1, 2, 7, c=3, d=4, e=5), unique_on=unique_on) == key

    def test_its_default_is_as_good_as_none(self) -> None:
        """A parameter at its default leaves the key."""
        assert key_of(sync, call(1, full=False), unique_on="full") == "-"

    @pytest.mark.parametrize(
        ("unique_on", "said"),
        [
            ("acount_id", "unique_on names 'acount_id', which is no parameter of the task: did you mean 'account_id'?"),
            (
                ["account_id", "xyz"],
                "unique_on names 'xyz', which is no parameter of the task: they are 'account_id', 'full'",
            ),
            ("account_id.pk", 'write lock_key="{account_id.pk}"'),
            ([], 'unique_on is empty: for one lock for the whole task write lock_key="all"'),
            ("", "unique_on is empty"),
            (lambda account_id: account_id, "unique_on is of type function: a function goes to lock_key="),
            (5, "unique_on is of type int: write a parameter's name, or a list of them"),
            ([5], "unique_on is of type list: write a parameter's name, or a list of them"),
        ],
    )
    def test_refused_when_made(self, unique_on: Any, said: str) -> None:
        """What names nothing is said when the task is made, with the nearest right name."""
        with pytest.raises(ConfigError) as raised:
            rule_of(unique_on=unique_on)
        assert str(raised.value).startswith("task proj.sync: ")
        assert said in str(raised.value)

    def test_a_task_without_parameters(self) -> None:
        """There is nothing to name."""

        def task() -> None: ...

        with pytest.raises(ConfigError, match="it takes none"):
            rule_of(task, unique_on="x")


class TestLockKey:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("x", "x"),
            (5, "5"),
            (None, "None"),
            (True, "True"),
            ((1, 2), "[1,2]"),
            ([1, 2], "[1,2]"),
            (Color.RED, "red"),
            (Mode.FAST, "fast"),
            (Level.HIGH, "3"),
            (ID, str(ID)),
            (date(2024, 2, 1), "2024-02-01"),
            (Named(), "a name"),
            (SafeString("x"), "x"),
        ],
    )
    def test_formats_equal_values_alike(self, value: object, text: str) -> None:
        """A field is written the same at publish and in the worker."""
        assert key_of(sync, call(value), lock_key="{account_id}") == text

    def test_formats_as_python_does(self) -> None:
        """Defaults, attributes, items, conversions, specs, extras."""

        def task(when: Any, order: Any = (7,), *args: Any, **more: Any) -> None: ...

        template = "{when:%Y-%m}/{when.year}/{order[0]:>{more[width]}}/{args[0]!r}/{region}"
        given = call(date(2024, 2, 1), [5], "x", width=3, region="eu")
        assert key_of(task, given, lock_key=template) == "2024-02/2024/  5/'x'/eu"

    @pytest.mark.parametrize("template", ["{account_id}", "{account_id!s}", "{account_id!r}", "x{account_id.inner}"])
    def test_an_address_is_no_key(self, template: str) -> None:
        """What would be another text in another process has no key."""
        value = Foo()
        value.inner = Foo()  # type: ignore[attr-defined]
        with pytest.raises(UnstableKeyError) as raised:
            key_of(sync, call(value), lock_key=template)
        assert "task proj.sync: " in str(raised.value)
        assert "account_id" in str(raised.value)
        assert "Foo" in str(raised.value)

    def test_text_may_look_like_an_address(self) -> None:
        """A string is a string."""
        assert key_of(sync, call("<Foo object at 0x1>"), lock_key="{account_id}") == "<Foo object at 0x1>"

    @pytest.mark.parametrize("template", ["{account_id.pk}", "{account_id[x]}", "{account_id:%Y}"])
    def test_a_call_for_which_it_cannot_be_made(self, template: str) -> None:
        """The call is refused, and the message says why."""
        with pytest.raises(UnstableKeyError, match=r"task proj\.sync: lock_key=.*account_id"):
            key_of(sync, call("x"), lock_key=template)

    @pytest.mark.parametrize("lock_key", ["{account_id}", "/{account_id}", lambda account_id, full: account_id])
    def test_an_empty_key_is_none(self, lock_key: Any) -> None:
        """A key that comes out empty is refused at the call."""
        with pytest.raises(UnstableKeyError, match="cannot be empty"):
            key_of(sync, call(""), lock_key=lock_key)

    def test_a_callable_that_gives_none(self) -> None:
        """A forgotten return is said."""
        with pytest.raises(UnstableKeyError, match="lock_key gives None"):
            key_of(sync, call(1), lock_key=lambda account_id, full: None)

    def test_a_callable_that_gives_an_object(self) -> None:
        """What it gives must be stable too."""
        with pytest.raises(UnstableKeyError, match="what lock_key gives is of type"):
            key_of(sync, call(1), lock_key=lambda account_id, full: Foo())

    def test_a_callable_is_called_with_the_task_s_parameters(self) -> None:
        """By name, defaults included; positionally where the task has positional extras."""

        def task(a: Any, /, b: Any, *args: Any, c: Any = 3, **more: Any) -> None: ...

        def key(*args: Any, **kwargs: Any) -> object:
            return [list(args), kwargs]

        assert key_of(task, call(1, 2, 9, d=4), lock_key=key) == '[[1,2,9],{"c":3,"d":4}]'
        assert key_of(sync, call(1), lock_key=key) == '[[],{"account_id":1,"full":false}]'

    @pytest.mark.parametrize(
        ("lock_key", "said"),
        [
            ("{acount_id}", "names 'acount_id', which is no parameter of the task: did you mean 'account_id'?"),
            ("{account_id:{wdth}}", "names 'wdth'"),
            ("{}", "name the parameter, as in {account_id}"),
            ("{0}", "name the parameter, as in {account_id}"),
            ("{account_id", "is no format string"),
            ("", "lock_key='' is empty: for one lock for the whole task write lock_key=\"all\""),
            ("/", 'write lock_key="all"'),
            (5, "lock_key is of type int: write a string"),
            (["account_id"], "lock_key is of type list: write unique_on=['account_id']"),
            (
                lambda account_id: "x",
                "lock_key is a function of (account_id), and is called with the parameters of the task",
            ),
            (lambda acc, full: "x", "(account_id, full)"),
        ],
    )
    def test_refused_when_made(self, lock_key: Any, said: str) -> None:
        """What cannot work for any call is said when the task is made."""
        with pytest.raises(ConfigError) as raised:
            rule_of(lock_key=lock_key)
        assert str(raised.value).startswith("task proj.sync: ")
        assert "lock_key" in str(raised.value)
        assert said in str(raised.value)

    def test_contradicts_unique_on(self) -> None:
        """Two answers to one question are refused."""
        with pytest.raises(ConfigError, match="unique_on and lock_key contradict each other"):
            rule_of(unique_on="account_id", lock_key="all")

    @pytest.mark.parametrize("options", [{"unique_on": "account_id"}, {"lock_key": "/x:{account_id}"}])
    def test_arguments_that_do_not_fit(self, options: dict[str, Any]) -> None:
        """A call that the body will refuse gets a key all the same: with typing=False Celery lets it through."""
        assert rule_of(**options).key((1, 2, 3), {"x": 4}) == "*=[1,2,3],x=4"
        assert rule_of(**options).key((), {}) == "*=[]"
