"""`ClientTransport`: etcd over the channel of a project's own ``etcd3.Etcd3Client`` (python-etcd3 0.12).

The callable that gives the client is called in each process when etcd is first wanted there, never before a fork.
It is called once more when etcd refuses the client's token, which that package does not renew: a client made anew
has a new one. With a user name and password of our own we log in ourselves, and nobody need care. The client stays
its owner's: it is not closed here. What the client can do itself (one endpoint, no fail-over) is all there is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from celery_etcd_lock.etcd.grpc import GrpcCluster, GrpcTransport
from celery_etcd_lock.etcd.grpc_channel import Channel, failure
from celery_etcd_lock.etcd.grpc_member import Member
from celery_etcd_lock.exceptions import AuthRejected, ConfigError, EtcdLockError

__all__ = ["ClientTransport"]


class ClientTransport(GrpcTransport):
    """See `GrpcTransport`. `lend`: a callable that gives the client, or the dotted path of one.

    `ConfigError`, at the first request, where that callable does not give one that can be used.
    """

    def __init__(
        self,
        lend: str | Callable[[], Any],
        *,
        timeout: float = 5.0,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        cluster = _Lent(lend, timeout, username, password)
        self._use(cluster, [cluster.endpoints[0].url])


class _Lent(GrpcCluster):
    """The one member that the client talks to."""

    def __init__(
        self, lend: str | Callable[[], Any], timeout: float, username: str | None, password: str | None
    ) -> None:
        self._lend = lend
        self._name = lend if isinstance(lend, str) else getattr(lend, "__qualname__", type(lend).__name__)
        self._client: Any = None
        self._inherited: Any = None
        self._taken: Mapping[str, str] | None = None
        super().__init__([Member(f"the client of {self._name}", self._channel, lent=True)], timeout, username, password)

    @property
    def logs_in(self) -> bool:
        return True

    def authenticate(self, endpoint: Member, timeout: float) -> Mapping[str, str]:
        if self._username is not None:
            return super().authenticate(endpoint, timeout)
        refused = self._taken
        if refused is not None:
            self._client = self._borrowed()
            endpoint.forget()
        self._channel()
        self._taken = {**self.anonymous, **dict(self._client.metadata or ())}
        if self._taken == refused:
            raise AuthRejected(
                "etcd refuses its token: let it make a new client each time it is called, or set etcd's user name and "
                "password",
                16,
            )
        return self._taken

    def after_fork(self) -> None:
        self._inherited, self._client, self._taken = self._client or self._inherited, None, None
        self._headers = None
        super().after_fork()

    def _channel(self) -> Channel:
        if self._client is None:
            self._client = self._borrowed()
        return self._client.channel

    def _borrowed(self) -> Any:
        try:
            lend = _imported(self._lend) if isinstance(self._lend, str) else self._lend
            client = lend()
        except EtcdLockError:
            raise
        except Exception as error:
            meaning = None if isinstance(error, ValueError) else failure(self.endpoints[0].url, error)
            raise meaning or ConfigError(self._broken(error)) from error
        if not hasattr(client, "channel") or not hasattr(client, "metadata"):
            raise ConfigError(f"{self._name} gives a {type(client).__name__}, and not an etcd3.Etcd3Client")
        if client is self._inherited:
            raise ConfigError(
                f"{self._name} gives the client that the parent process has used, and gRPC does not survive a fork: "
                "let it make one in each process"
            )
        return client

    def _broken(self, error: Exception) -> str:
        if isinstance(error, TypeError) and "Descriptors cannot" in str(error):
            return (
                f"{self._name}: python-etcd3 cannot be imported beside protobuf 4 or later (here: {_protobuf()}), "
                "which does not take its generated messages: set PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python in "
                'the environment of the worker, or leave the client out and set etcd_lock_transport="grpc"'
            )
        return f"{self._name} gives no etcd3.Etcd3Client: {type(error).__name__}: {error}"


def _imported(path: str) -> Callable[[], Any]:
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module:
        raise ConfigError(f"{path!r} is no dotted path: write it like proj.etcd.client")
    found: Any = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise ConfigError(
            f"{path} is a {type(found).__name__}, made when its module was imported, perhaps before a fork: write a "
            "function that gives it"
        )
    return found  # type: ignore[no-any-return]


def _protobuf() -> str:
    try:
        return version("protobuf")
    except PackageNotFoundError:
        return "unknown"
