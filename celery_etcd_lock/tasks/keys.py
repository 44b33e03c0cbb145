"""From a task's name and arguments to the name of its lock. Pure, and the same at publish as in the worker.

**What is equal.** Two calls are one when they give every parameter the same value: by position or by keyword, in
any order, an argument that equals its default being as good as none. A value and what Celery's JSON serializer
makes of it and gives back in the worker are the same, whichever serializer carries it: a tuple is the list, a
key of a dict is a string (``1`` is ``"1"`` there), a UUID, Decimal, date, time or datetime is its string or
``isoformat()``, an Enum its value, a dataclass or pydantic model the dict of its fields. Otherwise types count:
``1``, ``"1"``, ``True`` and ``1.0`` are four values, ``Decimal("1.0")`` and ``Decimal("1.00")`` two, 0.0 and -0.0
two; every NaN is the same. Bytes and sets equal only bytes and sets. Strings are compared code point by code point,
without Unicode normalisation. A value without such a form is an `UnstableKeyError`.

**What it looks like.** ``/<namespace>/locks/<task>/<key>``, or ``/<namespace>/locks/@shared/<key>`` for a
`lock_key` with a leading ``/``; each part percent-encoded, in what a shell takes without quotes. The key is

* ``account_id=42,mode=full``: the arguments, sorted by name, their values as canonical JSON; a string goes without
  its quotes where nothing else looks like it. Positional extras are ``*args=[1,2]``, keyword extras go by their own
  names. ``-`` when there is nothing to tell;
* ``sha256-<64 hex digits>`` of ``{"account_id":42,"mode":"full"}`` where the above, encoded, has more than 120
  characters, or the arguments are to be hidden;
* or the text that `lock_key` gives, hashed under the same conditions.

The layout is public: other programs take these locks, and a rolling deploy mixes versions.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import re
import string
from _string import formatter_field_name_split  # type: ignore[import-not-found] # what string.Formatter takes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import quote

from celery_etcd_lock.exceptions import ConfigError, UnstableKeyError
from celery_etcd_lock.tasks.canonical import Unstable, canonical, code_points, encoded, type_name
from celery_etcd_lock.tasks.conflict import nearest

__all__ = ["KeyRule", "lock_name"]

_LONGEST = 120
_POSITIONAL, _NAMED, _EXTRAS, _NAMED_EXTRAS = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.VAR_KEYWORD,
)
_is_safe = re.compile(r"[A-Za-z0-9_.~@+=:,-]*").fullmatch
_is_hash = re.compile(r"sha256-[0-9a-f]{64}").fullmatch
_is_bare = re.compile(
    r"(?![-+]?[.0-9_]*(?:e[-+]?[0-9_]*)?$|true$|false$|null$|none$|[-+]?nan$|[-+]?inf(?:inity)?$)[a-z0-9_.:@+-]+",
    re.IGNORECASE,
).fullmatch
_has_address = re.compile(r" at 0x[0-9A-Fa-f]+").search


# -- names


def lock_name(namespace: str, task: str, key: str) -> str:
    """The name in etcd of the lock for `key`, as `KeyRule.key` gives it; with a leading ``/``, of no task's own.

    No lock's name is the beginning of another's path, and none has an empty part (`ConfigError`).
    """
    if key.startswith("/"):
        prefix, key = _prefix(namespace, None), key[1:]
    else:
        prefix = _prefix(namespace, task)
    if not key:
        raise ConfigError(f"{task}: a lock's key cannot be empty")
    return prefix + _encoded(key)


@functools.lru_cache(maxsize=4096)
def _prefix(namespace: str, task: str | None) -> str:
    if not namespace or task == "":
        raise ConfigError("a lock's namespace and its task's name cannot be empty")
    owner = "@shared" if task is None else _encoded(task).replace("@", "%40")
    return f"/{_encoded(namespace)}/locks/{owner}/"


def _encoded(text: str) -> str:
    return text if _is_safe(text) else quote(text, safe="@+=:,", errors="surrogatepass")


# -- keys


@dataclasses.dataclass(frozen=True, eq=False)
class KeyRule:
    """Which calls of one task are the same. Made by `make`, which checks it; asked once for each call."""

    task: str
    signature: inspect.Signature
    unique_on: frozenset[str] | None
    lock_key: str | Callable[..., object] | None
    _extras: str | None
    _named_extras: str | None
    _defaults: Mapping[str, Any]
    """By parameter; `inspect.Parameter.empty` where there is none."""
    _default_texts: Mapping[str, str]
    _required: frozenset[str] | None
    """The parameters without a default. None: a name does not say what each argument is, only `bind` does."""

    @classmethod
    def make(
        cls,
        task: str,
        signature: inspect.Signature,
        *,
        unique_on: str | Iterable[str] | None = None,
        lock_key: str | Callable[..., object] | None = None,
        bound: bool = False,
    ) -> KeyRule:
        """The rule for `task`; `bound`: its signature begins with the task itself.

        `ConfigError` if `unique_on` and `lock_key` contradict each other or the signature, or say nothing.
        """
        parameters = list(signature.parameters.values())[1 if bound else 0 :]
        by_kind = {each.kind: each.name for each in parameters}
        rule = cls(
            task,
            signature.replace(parameters=parameters),
            None if unique_on is None else _names(task, unique_on),
            lock_key,
            by_kind.get(_EXTRAS),
            by_kind.get(_NAMED_EXTRAS),
            {each.name: each.default for each in parameters},
            dict(_default_texts(parameters)),
            frozenset(each.name for each in parameters if each.default is inspect.Parameter.empty)
            if by_kind.keys() <= {_NAMED}
            else None,
        )
        rule._check()
        return rule

    def lock_name(
        self, namespace: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, hide_arguments: bool = False
    ) -> str:
        """The name of the lock that this call takes. `UnstableKeyError` if the arguments give none."""
        return lock_name(namespace, self.task, self.key(args, kwargs, hide_arguments=hide_arguments))

    def key(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, hide_arguments: bool = False) -> str:
        """The last part of the lock's name, not yet encoded; with a leading ``/`` it is no task's own.

        Arguments that do not fit the signature, which the body is going to refuse, are all in the key as they
        were given, whatever `unique_on` and `lock_key` say.
        """
        try:
            arguments = self._by_name(args, kwargs)
        except TypeError:
            given = {"*": self._text("the positional arguments", list(args)), **dict(self._flat(kwargs))}
            return _joined(given, hide=hide_arguments)
        if self.lock_key is None:
            return _joined(dict(self._telling(arguments)), hide=hide_arguments)
        return self._written(arguments, hide=hide_arguments)

    @property
    def counting(self) -> frozenset[str] | None:
        """The names of the arguments that a key is made of. None: of all of them."""
        if isinstance(self.lock_key, str):
            return frozenset(_field_names(self.lock_key))
        return self.unique_on if self.lock_key is None else None

    # -- from the arguments

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Each argument, defaults too. `TypeError` if they do not fit the signature."""
        if self._required is not None:  # else, and for what does not fit, the slow way
            given = {**dict(zip(self._defaults, args)), **kwargs}  # noqa: B905 too many: the next line sees it
            if len(given) == len(args) + len(kwargs) and self._required <= given.keys() <= self._defaults.keys():
                return {**self._defaults, **given}
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def _telling(self, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Name and canonical text of each argument that counts and is not its default."""
        wanted = self.unique_on
        for name, value in arguments.items():
            if name == self._named_extras:
                every = wanted is None or name in wanted
                yield from self._flat({key: value[key] for key in value if every or key in (wanted or ())})
            elif wanted is not None and name not in wanted:
                continue
            elif name == self._extras:
                if value:
                    yield f"*{name}", self._text(f"*{name}", value)
            elif value is not self._defaults[name]:
                text = self._text(name, value)
                if text != self._default_texts.get(name):
                    yield name, text

    def _flat(self, extras: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Keyword extras by their own names, marked where a parameter's name could be meant."""
        for name, value in ((str(name), value) for name, value in extras.items()):
            taken = name in self.signature.parameters or name.startswith("*")
            yield (f"**{name}" if taken else name), self._text(name, value)

    def _text(self, where: str, value: object) -> str:
        try:
            plain = canonical(value)
        except Unstable as error:
            raise self._unstable(where, error) from error.__cause__
        return str(plain) if type(plain) is int else encoded(plain)  # which takes an encoder to be made

    def _unstable(self, where: str, error: Unstable) -> UnstableKeyError:
        path = error.path if len(error.path) <= _LONGEST else error.path[:15] + "…"
        return UnstableKeyError(
            f"task {self.task}: {where}{path} is of type {type_name(error.value)}{error.why}: no stable key for "
            f"a lock can be made of it. {error.instead}, or name the parameters that count with unique_on=[...], or "
            'write the key yourself with lock_key="..."'
        )

    # -- from lock_key

    def _written(self, arguments: Mapping[str, Any], *, hide: bool) -> str:
        try:
            text, tells = (
                self._formatted(arguments) if isinstance(self.lock_key, str) else (self._called(arguments), True)
            )
        except Unstable as error:
            raise self._unstable("what lock_key gives", error) from error.__cause__
        mark, body = ("/", text[1:]) if text.startswith("/") else ("", text)
        if not body:
            raise UnstableKeyError(
                f"task {self.task}: lock_key gives {text!r} for this call: a lock's key cannot be empty"
            )
        return mark + _fitting(code_points(body), lambda: body, hide=hide and tells)

    def _formatted(self, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        assert isinstance(self.lock_key, str)
        fields = _Fields()
        named = {**arguments.get(self._named_extras or "", {}), **arguments}
        try:
            text = fields.vformat(self.lock_key, (), named)
        except Unstable as error:
            raise self._unstable(f"lock_key={self.lock_key!r}: {fields.last}", error) from error.__cause__
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise UnstableKeyError(
                f"task {self.task}: lock_key={self.lock_key!r} cannot be made for this call: "
                f"{{{fields.last}}}: {type(error).__name__}: {error}"
            ) from error
        return text, bool(fields.last)

    def _called(self, arguments: Mapping[str, Any]) -> str:
        assert callable(self.lock_key)
        args, kwargs = self._spread(arguments)
        result = self.lock_key(*args, **kwargs)
        if result is None:
            raise UnstableKeyError(f"task {self.task}: lock_key gives None for this call: let it return a string")
        plain = canonical(result)
        return plain if isinstance(plain, str) else encoded(plain)

    def _spread(self, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """By name where that is possible: a `lock_key` with its parameters in another order is not misled."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is _EXTRAS:
                args += arguments[name]
            elif parameter.kind is _NAMED_EXTRAS:
                kwargs |= arguments[name]
            elif parameter.kind is _POSITIONAL or (parameter.kind is _NAMED and self._extras):
                args.append(arguments[name])
            else:
                kwargs[name] = arguments[name]
        return args, kwargs

    # -- checked when made

    def _check(self) -> None:
        if self.unique_on is not None and self.lock_key is not None:
            self._refuse("unique_on and lock_key contradict each other: lock_key is the whole key. Leave one out")
        for name in sorted(self.unique_on or ()):
            self._check_name(name, "unique_on")
        if isinstance(self.lock_key, str):
            self._check_format(self.lock_key)
        elif callable(self.lock_key):
            self._check_callable(self.lock_key)
        elif self.lock_key is not None:
            hint = (
                f"write unique_on={self.lock_key!r}" if isinstance(self.lock_key, (list, tuple)) else "write a string"
            )
            self._refuse(
                f"lock_key is of type {type_name(self.lock_key)}: {hint}, or a function of the task's parameters"
            )

    def _check_name(self, name: str, option: str) -> None:
        names = list(self.signature.parameters)
        if name in names or (self._named_extras and name.isidentifier()):
            return
        head = re.split(r"[.\[]", name)[0]
        if option == "unique_on" and head != name and head in names:
            hint = f'unique_on takes whole parameters: write lock_key="{{{name}}}"'
        elif right := nearest(name, names):
            hint = f"did you mean {right!r}?"
        else:
            hint = f"they are {', '.join(map(repr, names))}" if names else "it takes none"
        self._refuse(f"{option} names {name!r}, which is no parameter of the task: {hint}")

    def _check_format(self, template: str) -> None:
        try:
            fields = list(_field_names(template))
        except ValueError as error:
            self._refuse(f"lock_key={template!r} is no format string: {error}")
        for field in fields:
            if not field or field.isdigit():
                self._refuse(
                    f"lock_key={template!r}: name the parameter, as in {{{next(iter(self.signature.parameters), 'x')}}}"
                )
            self._check_name(field, f"lock_key={template!r}")
        if template in ("", "/"):
            self._refuse(f'lock_key={template!r} is empty: for one lock for the whole task write lock_key="all"')

    def _check_callable(self, function: Callable[..., object]) -> None:
        try:
            takes = inspect.signature(function)
        except (TypeError, ValueError):
            return
        no_extras: dict[str, Any] = {self._extras or "": (), self._named_extras or "": {}}
        args, kwargs = self._spread({**dict.fromkeys(self.signature.parameters), **no_extras})
        try:
            takes.bind(*args, **kwargs)
        except TypeError as error:
            self._refuse(
                f"lock_key is a function of {_parameters(takes)}, and is called with the parameters of the task, "
                f"{_parameters(self.signature)}: {error}"
            )

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(f"task {self.task}: {what}")


class _Fields(string.Formatter):
    """str.format, that writes equal values alike: a tuple as the list, an Enum as its value, by `canonical`."""

    last = ""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self.last = field_name
        first, rest = formatter_field_name_split(field_name)
        value = self.get_value(first, args, kwargs)
        for is_attribute, name in rest:
            # In the worker a pydantic model is the dict that was made of it.
            by_item = not is_attribute or (isinstance(value, Mapping) and name in value)
            value = value[name] if by_item else getattr(value, name)
        return value, first

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return _no_address(value, super().convert_field(value, conversion)) if conversion else value

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, enum.Enum) and not isinstance(value, (str, int, float)):
            value = value.value
        if value is None or isinstance(value, (bool, str, int, float)):
            return format(canonical(value), format_spec)
        if format_spec:
            return _no_address(value, format(value, format_spec))
        try:
            plain = canonical(value)
        except Unstable:
            return _no_address(value, str(value))
        return plain if isinstance(plain, str) else encoded(plain)


def _no_address(value: object, text: str) -> str:
    if not isinstance(value, str) and _has_address(text):
        raise Unstable(value)
    return text


def _field_names(template: str) -> Iterator[str]:
    for _, field, spec, _ in string.Formatter().parse(template):
        if field is not None:
            yield re.split(r"[.\[]", field)[0]
            yield from _field_names(spec or "")


def _joined(texts: Mapping[str, str], *, hide: bool) -> str:
    """The key for canonical texts by name. Reads back unambiguously: `tests/tasks/test_keys.py` does it."""
    if not texts:
        return "-"
    pairs = sorted(texts.items())
    readable = ",".join(
        f"{name if name.lstrip('*').isidentifier() or name == '*' else encoded(name)}={_unquoted(text)}"
        for name, text in pairs
    )

    def whole() -> str:
        return "{" + ",".join(f"{encoded(name)}:{text}" for name, text in pairs) + "}"

    return _fitting(readable, whole, hide=hide)


def _unquoted(text: str) -> str:
    return text[1:-1] if text[0] == '"' and _is_bare(text[1:-1]) else text


def _fitting(readable: str, whole: Callable[[], str], *, hide: bool) -> str:
    if hide or _is_hash(readable) or len(readable) > _LONGEST or len(_encoded(readable)) > _LONGEST:
        import hashlib  # OpenSSL's binding, which takes a millisecond: few keys are so long

        return f"sha256-{hashlib.sha256(whole().encode('utf-8', 'surrogatepass')).hexdigest()}"
    return readable


def _names(task: str, unique_on: object) -> frozenset[str]:
    names = [unique_on] if isinstance(unique_on, str) else unique_on
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
        hint = "a function goes to lock_key=" if callable(unique_on) else "write a parameter's name, or a list of them"
        raise ConfigError(f"task {task}: unique_on is of type {type_name(unique_on)}: {hint}")
    if not any(names):
        raise ConfigError(f'task {task}: unique_on is empty: for one lock for the whole task write lock_key="all"')
    return frozenset(names)


def _default_texts(parameters: Iterable[inspect.Parameter]) -> Iterator[tuple[str, str]]:
    for each in parameters:
        if each.default is not inspect.Parameter.empty:
            with suppress(Unstable):
                yield each.name, encoded(canonical(each.default))


def _parameters(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})"
