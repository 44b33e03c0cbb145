"""The settings on ``app.conf``: read once, here only; frozen, and checked when they are made.

They may be set in every way that Celery's own can be: on ``app.conf``, to `Celery`'s constructor, in a module or
object for ``config_from_object``, under its namespace (Django's ``CELERY_ETCD_LOCK_TTL``), or in upper case without
one. None is as good as not set. All that is wrong is said at once, in one `ConfigError`, under the names in use.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeAlias, get_args
from weakref import WeakKeyDictionary

from celery_etcd_lock.etcd import TLS, Transport, connect
from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.tasks.conflict import Conflict, nearest

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["DEFAULT_ENDPOINTS", "ENDPOINTS_VARIABLE", "ON_LOST", "ON_UNAVAILABLE", "Settings"]

DEFAULT_ENDPOINTS: Final = ("http://127.0.0.1:2379",)
ENDPOINTS_VARIABLE: Final = "CELERY_ETCD_LOCK_ENDPOINTS"

OnLost: TypeAlias = Literal["abort", "retry", "warn"]
OnUnavailable: TypeAlias = Literal["retry", "fail", "run"]
ON_LOST: Final[tuple[str, ...]] = get_args(OnLost)
ON_UNAVAILABLE: Final[tuple[str, ...]] = get_args(OnUnavailable)

_SHORTEST_TTL: Final = 2
_RENEWALS: Final = 3
_MEANT: Final = {
    "url": "endpoints", "urls": "endpoints", "host": "endpoints", "hosts": "endpoints", "servers": "endpoints",
    "expiry": "ttl", "expire": "ttl", "expires": "ttl", "lease": "ttl", "lease_ttl": "ttl", "user": "username",
    "prefix": "namespace", "key_prefix": "namespace", "ssl": "use_ssl", "tls": "use_ssl", "ca_certs": "use_ssl",
    "conflict": "on_conflict", "lost": "on_lost", "unavailable": "on_unavailable",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """One app's settings, under their names without ``etcd_lock_``.

    Takes what users write (``on_conflict="skip"``, ``endpoints="http://a:2379,http://b:2379"``) and holds what it
    means. `ConfigError`, with a line for each thing that cannot be meant.
    """

    _: KW_ONLY
    endpoints: tuple[str, ...] = DEFAULT_ENDPOINTS
    transport: Literal["gateway", "grpc"] = "gateway"
    """`from_app`: where it is not set and `client` is, ``"grpc"``."""
    client: str | Callable[[], Any] | None = None
    """What gives an ``etcd3.Etcd3Client``, or its dotted path: its channel and token are then used."""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    use_ssl: TLS | None = None
    namespace: str = "celery"
    ttl: int = 30
    """Seconds for which a dead process holds a lock."""
    timeout: float = 5
    """Seconds for one request to etcd, over all endpoints tried."""
    on_conflict: Conflict = Conflict.retry()  # noqa: RUF009 it is frozen
    on_lost: OnLost = "abort"
    on_unavailable: OnUnavailable = "retry"
    enabled: bool | Literal["observe"] = True
    eager: bool = False
    hide_arguments: bool = False
    queued_ttl: int = 86400
    """Seconds."""
    done_ttl: int = 3600
    """Seconds."""
    beat_scheduler: str | Callable[..., Any] | None = None
    """None: what Celery's ``beat_scheduler`` names, unless that is ours."""
    beat_name: str = "default"
    beat_ttl: int = 15
    """Seconds. `from_app`: where it is not set, three timeouts if those are longer."""
    default_endpoints: bool = field(default=False, init=False)
    """Whether nobody has said where etcd is."""
    spelt: InitVar[Mapping[str, str] | None] = None
    """How the user wrote the names of these settings, for the messages."""
    problems: InitVar[Iterable[str]] = ()
    """What has been found wrong already."""

    _apps: ClassVar[WeakKeyDictionary[Celery, Settings]] = WeakKeyDictionary()

    def __post_init__(self, spelt: Mapping[str, str] | None, problems: Iterable[str]) -> None:
        names = {name: f"etcd_lock_{name}" for name in _CHECKS} | dict(spelt or {})
        object.__setattr__(self, "default_endpoints", self.endpoints is DEFAULT_ENDPOINTS)
        found = list(problems)
        for name, check in _CHECKS.items():
            try:
                object.__setattr__(self, name, check(names[name], getattr(self, name)))
            except ConfigError as problem:
                found.append(str(problem))
        if found or (found := list(_contradictions(self, names))):
            raise ConfigError("\n".join(found))

    @classmethod
    def from_app(cls, app: Celery) -> Settings:
        """The settings of `app`, read at the first call and kept: see `forget`. `ConfigError`, at every call."""
        app = _itself(app)
        settings = cls._apps.get(app)
        if settings is None:
            settings = cls._apps[app] = cls._read(app)
        return settings

    @classmethod
    def forget(cls, app: Celery) -> None:
        """Let the next `from_app` read the configuration anew."""
        cls._apps.pop(_itself(app), None)

    @classmethod
    def _read(cls, app: Celery) -> Settings:
        conf: Any = app.conf
        conf.get("etcd_lock_endpoints")  # a first access loads what is lazy
        names = _Names(conf.prefix, {key for key in conf.keys() if isinstance(key, str)})  # noqa: SIM118
        spelt = {name: names.in_use(name) for name in _CHECKS}
        # Under a namespace Celery knows by itself which of the spellings comes first.
        asked = {name: f"etcd_lock_{name}" if conf.prefix else key for name, key in spelt.items()}
        given = {name: value for name, key in asked.items() if (value := conf.get(key)) is not None}
        if "endpoints" not in given and (endpoints := os.environ.get(ENDPOINTS_VARIABLE)):
            given["endpoints"], spelt["endpoints"] = endpoints, f"{ENDPOINTS_VARIABLE} (in the environment)"
        if given.get("client") is not None:
            given.setdefault("transport", "grpc")
        if "beat_ttl" not in given and _is_number(given.get("timeout")):
            given["beat_ttl"] = max(cls.beat_ttl, math.ceil(_RENEWALS * given["timeout"]))
        return cls(**given, spelt=spelt, problems=tuple(names.misspelt(conf)))

    def check_here(self) -> None:
        """`ConfigError` if gRPC is wanted and cannot be used in this process, or its client cannot be imported.

        Not done when settings are read: that may be while the very module of the client's function is imported.
        """
        if self.transport != "grpc" or not self.enabled or self.endpoints[0].startswith("memory://"):
            return
        from celery_etcd_lock.etcd.grpc_channel import ready
        from celery_etcd_lock.etcd.grpc_client import imported

        ready()
        if isinstance(self.client, str):
            imported(self.client)

    def connect(self) -> Transport:
        """A transport to this etcd; opens no socket yet."""
        return connect(**self.connection)

    @property
    def connection(self) -> dict[str, Any]:
        """What `etcd.connect` takes."""
        return {
            "endpoints": () if self.client and self.default_endpoints else self.endpoints,
            "timeout": self.timeout,
            "username": self.username,
            "password": self.password,
            "tls": self.use_ssl,
            "transport": self.transport,
            "client": self.client,
        }


@dataclass(frozen=True)
class _Names:
    """How settings are spelt in an app whose configuration has the namespace `prefix`, and holds `keys`."""

    prefix: str | None
    keys: set[str]

    def in_use(self, name: str) -> str:
        """The spelling under which `name` is set, or would be."""
        spellings = [f"etcd_lock_{name}"]
        if self.prefix:
            # Celery looks under both, with the prefix first, and in the prefix's case.
            spellings.insert(0, self._prefixed(name))
        else:
            spellings.append(f"ETCD_LOCK_{name.upper()}")
        return next((each for each in spellings if each in self.keys), spellings[0])

    def misspelt(self, conf: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with each key that is meant for us and is not read."""
        read = {self.in_use(name) for name in _CHECKS}
        prefixes = {"", "celery_", (self.prefix or "").lower()}
        for key in sorted(self.keys - read):
            match = re.fullmatch(rf"({'|'.join(map(re.escape, prefixes))})(etcd_?locks?_?)(\w*)", key, re.IGNORECASE)
            if match is None or _is_code(conf.get(key)):
                continue
            before, stem, rest = (part.lower() for part in match.groups())
            ours = not self.prefix or before == self.prefix.lower() or key.islower()
            if rest in _CHECKS and stem == "etcd_lock_":
                used = self.in_use(rest)
                if used not in self.keys:
                    yield f"{key} is not read: write {self._as_in(key, rest)}{self._why(before)}"
                elif not self.prefix and not before and conf.get(used) != conf.get(key):
                    yield f"{key} and {used} are both set, and differ: leave one out"
            elif ours or nearest(rest, _CHECKS):
                right = _MEANT.get(rest) or nearest(rest, _CHECKS)
                known = ", ".join(self._as_in(key, name) for name in _CHECKS)
                yield f"{key} is no setting: " + (
                    f"did you mean {self._as_in(key, right)}?" if right else f"they are {known}"
                )

    def _prefixed(self, name: str) -> str:
        full = f"{self.prefix}etcd_lock_{name}"
        return full.upper() if self.prefix and self.prefix.isupper() else full.lower()

    def _as_in(self, key: str, name: str) -> str:
        """`name` as whoever wrote `key` would write it."""
        if self.prefix and not (key.islower() and not key.startswith(self.prefix)):
            return self._prefixed(name)
        return f"etcd_lock_{name}".upper() if key.isupper() else f"etcd_lock_{name}"

    def _why(self, before: str) -> str:
        if self.prefix:
            return f", as the configuration is read with namespace={self.prefix.rstrip('_')!r}"
        return ', or read the configuration with namespace="CELERY"' if before else ""


def _is_code(value: object) -> bool:
    """A module of settings may import things, and define functions, whose names begin like ours."""
    return inspect.ismodule(value) or inspect.isroutine(value) or inspect.isclass(value)


# -- one setting by itself: each takes its name, for messages, and its value; returns what it means


def _endpoints(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        urls = [value] if "@" in value else value.split(",")
    elif isinstance(value, (list, tuple)) and all(isinstance(url, str) for url in value):
        urls = list(value)
    else:
        raise ConfigError(f"{name} is of type {_type(value)}: write a URL, as a string, or a list of them")
    urls = [url.strip() for url in urls if url.strip()]
    if any("@" in url for url in urls):
        # Nothing of the URL goes into the message: what is a password in it cannot be told for sure.
        raise ConfigError(
            f"{name} has a user or password inside a URL, where Celery would show it: write the URL as "
            "http://HOST:2379, and set etcd_lock_username and etcd_lock_password"
        )
    if not urls:
        raise ConfigError(f"{name} is empty: write a URL, like {DEFAULT_ENDPOINTS[0]}")
    in_memory = [url for url in urls if url.startswith("memory://")]
    if in_memory:
        if len(urls) > 1:
            raise ConfigError(f"{name}: {in_memory[0]} stands by itself, for tests: leave out the other URLs")
        return tuple(urls)
    from celery_etcd_lock.etcd.gateway_http import checked_url

    return tuple(_said_of(name, checked_url, url) for url in urls)


def _use_ssl(name: str, value: object) -> TLS | None:
    if value is None or value is False:
        return None
    if isinstance(value, TLS):
        tls = value
    elif value is True:
        tls = TLS()
    elif isinstance(value, Mapping):
        tls = TLS(**{key: _tls_value(name, key, item) for key, item in value.items() if item is not None})
    else:
        raise ConfigError(f'{name} is of type {_type(value)}: write True, or a dict like {{"ca_certs": "ca.pem"}}')
    from celery_etcd_lock.etcd.gateway_http import tls_context

    _said_of(name, tls_context, tls)
    return tls


def _tls_value(name: str, key: object, value: object) -> Any:
    keys = ("ca_certs", "certfile", "keyfile", "cert_reqs")
    if key not in keys:
        bare = str(key).removeprefix("ssl_")
        right = {"ca": "ca_certs", "cafile": "ca_certs", "cert": "certfile", "key": "keyfile"}.get(bare)
        right = right or nearest(bare, keys)
        raise ConfigError(f"{name} has no key {key!r}: write {right or ', '.join(keys)}")
    if key == "cert_reqs":
        text = value.name if isinstance(value, ssl.VerifyMode) else str(value)
        return _one_of("required", "optional", "none")(f'{name}["cert_reqs"]', text.lower().removeprefix("cert_"))
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f'{name}["{key}"] is of type {_type(value)}: write the path of a file')
    return os.fspath(value)


def _said_of(name: str, check: Callable[[Any], Any], value: object) -> Any:
    try:
        return check(value)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _number(least: float, *, whole: bool, why: str = "") -> Callable[[str, object], Any]:
    kind = "whole seconds" if whole else "seconds"

    def check(name: str, value: Any) -> float:
        if isinstance(value, str):
            hint = f", without the quotes: {value}" if re.fullmatch(r"\d+", value) else ""
            raise ConfigError(f"{name} is {value!r}, a string: write a number of {kind}{hint}")
        if not _is_number(value) or (whole and value != int(value)):
            raise ConfigError(f"{name} is {value!r}: write a number of {kind}")
        if value < least:
            raise ConfigError(f"{name} is {value!r}: write {least} seconds or more{why}")
        return int(value) if whole else float(value)

    return check


def _one_of(*choices: object) -> Callable[[str, object], Any]:
    def check(name: str, value: object) -> object:
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        right = nearest(value, [each for each in choices if isinstance(each, str)]) if isinstance(value, str) else None
        hint = f"did you mean {right!r}?" if right else f"write {' or '.join(map(repr, choices))}"
        raise ConfigError(f"{name} is {value!r}: {hint}")

    return check


def _transport(name: str, value: object) -> object:
    if value == "grpc":
        missing = [module for module in ("grpc", "google.protobuf") if not _installed(module)]
        if missing:
            raise ConfigError(
                f"{name} is 'grpc', and {missing[0]} is not installed: pip install celery-etcd-lock[grpc]"
            )
    return _one_of("gateway", "grpc")(name, value)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _client(name: str, value: object) -> str | Callable[[], Any] | None:
    if value is None or (isinstance(value, str) and re.fullmatch(r"\w+([.:]\w+)+", value)):
        return value
    if hasattr(value, "channel"):
        raise ConfigError(f"{name} is a client, and gRPC does not survive a fork: write a function that makes one")
    if not callable(value):
        raise ConfigError(f"{name} is {value!r}: write a function that gives an etcd3.Etcd3Client, or its dotted path")
    return value


def _secret(name: str, value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        what = "empty" if isinstance(value, str) else f"of type {_type(value)}"
        raise ConfigError(f"{name} is {what}: write a string, or leave it out")
    return value


def _part(name: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", value):
        raise ConfigError(f"{name} is {value!r}: write one word, of letters, digits, '.', '_' and '-' (no '/')")
    return value


def _scheduler(name: str, value: object) -> str | Callable[..., Any] | None:
    if value is None or callable(value) or (isinstance(value, str) and value):
        return value
    raise ConfigError(f"{name} is {value!r}: write a scheduler's class, or its dotted path")


def _conflict(name: str, value: object) -> Conflict:
    return Conflict.parse(value, name)


_CHECKS: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "endpoints": _endpoints,
    "transport": _transport,
    "client": _client,
    "username": _secret,
    "password": _secret,
    "use_ssl": _use_ssl,
    "namespace": _part,
    "ttl": _number(_SHORTEST_TTL, whole=True, why=": etcd itself grants no shorter lease"),
    "timeout": _number(0.01, whole=False),
    "on_conflict": _conflict,
    "on_lost": _one_of(*ON_LOST),
    "on_unavailable": _one_of(*ON_UNAVAILABLE),
    "enabled": _one_of(True, False, "observe"),
    "eager": _one_of(True, False),
    "hide_arguments": _one_of(True, False),
    "queued_ttl": _number(_SHORTEST_TTL, whole=True),
    "done_ttl": _number(_SHORTEST_TTL, whole=True),
    "beat_scheduler": _scheduler,
    "beat_name": _part,
    "beat_ttl": _number(_SHORTEST_TTL, whole=True),
}


# -- settings together


def _contradictions(settings: Settings, names: Mapping[str, str]) -> Iterator[str]:
    for one, other in (("username", "password"), ("password", "username")):
        if getattr(settings, one) and not getattr(settings, other):
            yield f"{names[one]} is set without {names[other]}: set both, or neither"
    plain = next((url for url in settings.endpoints if url.startswith("http://")), None)
    if settings.use_ssl and plain and not settings.client:
        where = "the default of " if settings.default_endpoints else ""
        yield (
            f"{names['use_ssl']} is set, and {where}{names['endpoints']} has {plain}, which is without TLS: "
            f"write https{plain[4:]}"
        )
    if settings.client:
        if settings.transport != "grpc":
            yield f"{names['client']} is set, and {names['transport']} is {settings.transport!r}: write 'grpc'"
        doubled = [name for name in ("username", "use_ssl") if getattr(settings, name)]
        if not settings.default_endpoints and not settings.endpoints[0].startswith("memory://"):
            doubled.append("endpoints")
        for name in doubled:
            yield f"{names['client']} and {names[name]} are both set: the client has its own, leave one out"
    if settings.transport == "grpc" and settings.use_ssl and settings.use_ssl.cert_reqs == "none":
        yield f"{names['use_ssl']} has cert_reqs 'none', which gRPC cannot do: name the CA, or use the 'gateway'"
    if settings.beat_ttl < _RENEWALS * settings.timeout:
        yield (
            f"{names['beat_ttl']} is {settings.beat_ttl}: write {math.ceil(_RENEWALS * settings.timeout)} or more, the "
            f"time for three renewals of {names['timeout']} ({settings.timeout:g} seconds) each"
        )


def _itself(app: Celery) -> Celery:
    """The app behind ``celery.current_app``, which is a proxy."""
    real = getattr(app, "_get_current_object", None)
    return real() if real else app


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _type(value: object) -> str:
    return type(value).__name__
