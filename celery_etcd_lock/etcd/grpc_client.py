"""`ClientTransport`: etcd over the channel of a project's own ``etcd3.Etcd3Client`` (python-etcd3 0.12).

The callable that gives the client is called when etcd is first wanted: in each process, never before a fork. It is
called once more when etcd refuses the client's token, which that package does not renew: a client made anew has a new
one. The client stays its owner's: it is not closed here. What it can do itself (one endpoint, no fail-over, gRPC's own
pauses before it connects again) is all there is.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

from celery_etcd_lock.etcd.gateway_codec import NoAnswer
from celery_etcd_lock.etcd.grpc import GrpcCluster, GrpcTransport
from celery_etcd_lock.etcd.grpc_channel import LINK_ERRORS, Channel, failure, use_here
from celery_etcd_lock.etcd.grpc_member import Member
from celery_etcd_lock.exceptions import AuthRejected, ConfigError, EtcdLockError, PermissionDenied

__all__ = ["ClientTransport", "Lend", "imported"]

Lend: TypeAlias = Callable[[], Any]
"""Gives an ``etcd3.Etcd3Client``."""


class ClientTransport(GrpcTransport):
    """See `GrpcTransport`. `lend`: a callable that gives the client, or the dotted path of one.

    `ConfigError`, at the first request, where that callable does not give one that can be used.
    """

    def __init__(self, lend: str | Lend, *, timeout: float = 5.0) -> None:
        cluster = _Lent(lend, timeout)
        self._use(cluster, [cluster.endpoints[0].url])


class _Lent(GrpcCluster):
    """The one member that the client talks to."""

    def __init__(self, lend: str | Lend, timeout: float) -> None:
        self._lend = lend
        self._name = lend if isinstance(lend, str) else getattr(lend, "__qualname__", type(lend).__name__)
        self._inherited: Any = None
        self._client: Any = None
        self._taken: Mapping[str, str] | None = None
        self._making: Future[Any] | None = None
        super().__init__([Member(f"the client of {self._name}", self._channel, lent=True)], timeout, None, None)

    @property
    def logs_in(self) -> bool:
        return True

    def authenticate(self, endpoint: Member, timeout: float) -> Mapping[str, str]:
        refused = self._taken
        if self._client is None or refused is not None:
            self._client = self._borrow(timeout)
            endpoint.forget()
        self._taken = {**self.anonymous, **dict(self._client.metadata or ())}
        if self._taken == refused:
            raise AuthRejected(
                "etcd refuses its token, or wants one: give the client a user and password, and make a new client each "
                "time one is asked for",
                16,
            )
        return self._taken

    def _denied(self, endpoint: Member, error: PermissionDenied) -> PermissionDenied:
        return PermissionDenied(f"{endpoint.url}: permission denied to its user", error.code)

    def after_fork(self) -> None:
        self._inherited = self._client or self._inherited
        self._client = self._taken = self._headers = self._making = None
        super().after_fork()

    def _channel(self) -> Channel:
        return self._client.channel  # whoever opens a link has headers, and so there is a client

    def _borrow(self, timeout: float) -> Any:
        """A client. In a thread: making one may log in, for which etcd3 by default takes all the time it wants."""
        use_here()
        making = self._making
        if making is None:
            making = self._making = Future()
            threading.Thread(target=self._make, args=[making], name="etcd-lock-client", daemon=True).start()
        if not wait([making], timeout).done:
            raise NoAnswer("it takes too long to make its client", silent=True)
        self._making = None
        client = making.result()
        if not hasattr(client, "channel") or not hasattr(client, "metadata"):
            raise ConfigError(f"{self._name} gives {_kind(client)}, and not an etcd3.Etcd3Client")
        if client is self._inherited:
            raise ConfigError(
                f"{self._name} gives the client that the parent process has used, and gRPC does not survive a fork: "
                "let it make one in each process"
            )
        return client

    def _make(self, making: Future[Any]) -> None:
        try:
            making.set_result((imported(self._lend) if isinstance(self._lend, str) else self._lend)())
        except EtcdLockError as error:
            making.set_exception(error)
        except BaseException as error:  # noqa: BLE001 whatever it is, whoever waits for it shall have it
            making.set_exception(self._meaning(error))

    def _meaning(self, error: BaseException) -> BaseException:
        """What gRPC said, be it wrapped in the client's own error, is an answer; all else the project has to mend."""
        if isinstance(error, Exception) and not isinstance(error, ValueError):
            for said in (error, error.__cause__, error.__context__):
                if isinstance(said, LINK_ERRORS) and (meaning := failure(self.endpoints[0].url, said)):
                    meaning.__cause__ = error
                    return meaning
        broken = ConfigError(f"{self._name} gives no etcd3.Etcd3Client: {_reason(error)}")
        broken.__cause__ = error
        return broken


def imported(path: str) -> Lend:
    """The callable at the dotted `path`. `ConfigError`, which says why, if there is none."""
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(f"{path} cannot be imported: {_reason(error)}") from error
    if not callable(found):
        raise ConfigError(
            f"{path} is {_kind(found)}, made when its module was imported, perhaps before a fork: write a function "
            "that gives it"
        )
    return found  # type: ignore[no-any-return]


def _reason(error: BaseException) -> str:
    if isinstance(error, TypeError) and "Descriptors cannot" in str(error):
        return (
            f"python-etcd3 does not go with protobuf 4 or later (here: {_protobuf()}), which does not take its "
            "generated code: set PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python in the environment of the worker, "
            'or leave the client out and set etcd_lock_transport="grpc"'
        )
    if isinstance(error, ModuleNotFoundError) and error.name in {"etcd3", "six", "tenacity"}:
        return (
            f"there is no module {error.name!r}: pip install etcd3, or leave the client out and set "
            'etcd_lock_transport="grpc"'
        )
    return f"{type(error).__name__}: {error}"


def _kind(value: object) -> str:
    return f"a {type(value).__name__}" if value is not None else "nothing (None)"


def _protobuf() -> str:
    try:
        return version("protobuf")
    except PackageNotFoundError:
        return "unknown"
