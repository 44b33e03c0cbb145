"""Plain JSON for the values of arguments: the same for equal values, different for others. Pure.

A value and what Celery's JSON serializer makes of it and gives back in the worker come out the same; `keys` says
what that means for each type.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from base64 import b64encode
from collections.abc import Iterable
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, TypeAlias
from uuid import UUID

from kombu.utils.json import JSONEncoder, object_hook

__all__ = ["Canonical", "Unstable", "canonical", "code_points", "encoded", "instead_of", "short", "type_name"]

Canonical: TypeAlias = "bool | int | float | str | list[Canonical] | dict[str, Canonical] | None"

_DEEPEST = 100
encoded = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


class Unstable(Exception):
    """`value` has no stable form; `path` leads to it from the argument."""

    def __init__(self, value: object, why: str = "", instead: str = "") -> None:
        super().__init__(value, why, instead)
        self.value = value
        self.why = f" and {why}" if why else ""
        self.instead = instead or instead_of(value)
        self.path = ""


def canonical(value: object, _depth: int = 0) -> Canonical:
    """Plain JSON for `value`: the same for equal values, different for others.

    What JSON does not have is a dict with a key in ``$``; such a key in a dict of the caller's gets one more.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return code_points(str.__str__(value))
    if isinstance(value, int):
        number = int.__int__(value)
        # Python refuses to write larger ones in decimal, from a limit on that can be set as low as 640 digits.
        return number if number.bit_length() <= 2000 else {"$int": f"{number:x}"}
    if isinstance(value, float):
        return float.__float__(value)
    if _depth > _DEEPEST:
        raise Unstable(value, "contains itself, or is nested too deeply", "Pass an id instead")
    _depth += 1
    if isinstance(value, (list, tuple)):
        return [_at(f"[{i}]", item, _depth) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return _members(value, _depth)
    kind = type(value)
    if kind in (datetime, date, time):
        return value.isoformat()  # type: ignore[attr-defined,no-any-return]
    if kind in (UUID, Decimal):
        return str(value)
    if kind in (bytes, bytearray, memoryview):
        return {"$bytes": b64encode(bytes(value)).decode()}  # type: ignore[call-overload]
    return _by_serializer(value, _depth)


def _by_serializer(value: object, depth: int) -> Canonical:
    """What Celery's own JSON makes of a type that is not plain; what Celery cannot carry, by its meaning."""
    try:
        encoded = JSONEncoder().default(value)
    except (TypeError, ValueError):
        return _by_meaning(value, depth)
    if not _is_envelope(encoded):
        return canonical(encoded, depth)
    decoded = _opened(encoded)
    if decoded is encoded or type(decoded) is type(value):
        payload = canonical(encoded["__value__"], depth)
        return {"$type": canonical(encoded["__type__"], depth), "$value": payload}
    return canonical(decoded, depth)


def _by_meaning(value: object, depth: int) -> Canonical:
    if isinstance(value, enum.Enum):
        return canonical(value.value, depth)
    if isinstance(value, (set, frozenset)):
        return {"$set": sorted((_at("{…}", item, depth) for item in value), key=encoded)}
    if isinstance(value, type):
        raise Unstable(value)
    if callable(dump := getattr(value, "model_dump", None)):
        try:
            return canonical(dump(mode="json"), depth)
        except (TypeError, ValueError) as error:
            raise Unstable(value, f"cannot be dumped: {error}") from error
    if dataclasses.is_dataclass(value):
        return {each.name: _at(f".{each.name}", getattr(value, each.name), depth) for each in dataclasses.fields(value)}
    raise Unstable(value)


def _members(members: dict[Any, Any], depth: int) -> Canonical:
    if _is_envelope(members) and (opened := _opened(members)) is not members:
        return canonical(opened, depth)
    result: dict[str, Canonical] = {}
    for key, value in members.items():
        plain = canonical(key, depth)
        if isinstance(plain, (list, dict)):
            raise Unstable(key, "is the key of a dict", "Use strings as keys")
        name = plain if isinstance(plain, str) else encoded(plain)
        name = "$" + name if name.startswith("$") else name
        if name in result:
            raise Unstable(members, f"has several keys that are {short(name)} in JSON", "Use strings as keys")
        result[name] = _at(f"[{short(name)}]", value, depth)
    return result


def _at(step: str, value: object, depth: int) -> Canonical:
    try:
        return canonical(value, depth)
    except Unstable as error:
        error.path = step + error.path
        raise


def _is_envelope(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"__type__", "__value__"}


def _opened(envelope: dict[str, Any]) -> object:
    """What the worker gets for a dict that looks like one of Celery's own envelopes; itself if it is none."""
    with suppress(Exception):
        return object_hook(envelope)
    return envelope


def code_points(text: str) -> str:
    """JSON makes one character of a surrogate pair, and so do we."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return str(json.loads(json.dumps(text)))
    return text


def short(name: str) -> str:
    return json.dumps(name if len(name) <= 40 else name[:39] + "…", ensure_ascii=False)


def type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def instead_of(value: object) -> str:
    """What to pass, for things that people do pass."""
    kind = type(value)
    if hasattr(kind, "_meta") and hasattr(kind, "pk"):
        return "Pass its primary key (.pk)"
    if hasattr(kind, "dtype"):
        return "Pass a plain number or list (.tolist())"
    if callable(value):
        return "Pass its name"
    if hasattr(kind, "read") or hasattr(kind, "__fspath__"):
        return "Pass its path, as a string"
    if isinstance(value, Iterable):
        return "Pass a list"
    return "Pass an id instead"
