"""A gRPC channel to one etcd member: its calls and streams, and what its errors mean.

The only module that imports grpc. All that can go wrong on a channel comes out as what `gateway_codec` has for it:
`NoAnswer`, or etcd's own refusal. gRPC does not tell whether a call that ran out of time was sent. So a channel is
greeted before its first call: what fails in that was not sent, and what fails later may have been.
"""

from __future__ import annotations

import functools
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

try:
    import grpc
except ImportError:  # said by `ready`, to whoever wants it: without the extra, every module can still be imported
    grpc = None

from celery_etcd_lock.etcd.gateway_codec import NoAnswer, server_error
from celery_etcd_lock.etcd.grpc_messages import INSTALLED, Message, messages
from celery_etcd_lock.exceptions import AuthRejected, ConfigError, EtcdRejected

__all__ = ["LINK_ERRORS", "Channel", "Duplex", "Link", "failure", "not_connected", "open_channel", "ready", "use_here"]

_FORK_SUPPORT = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "").lower() in {"1", "true", "yes"}
"""Whether gRPC was told to prepare for forks; it looks once, when it is imported."""

_used_by: set[int] = set()
"""This process and those it was forked from, as far as they have opened channels."""

Channel: TypeAlias = Any
"""A `grpc.Channel`."""

_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),  # who tries again, and where, is the cluster's business
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 15_000),  # not more often than etcd allows by default, which is 5 s
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

LINK_ERRORS: Final[tuple[type[Exception], ...]] = (grpc.RpcError, ValueError) if grpc else ()
"""What a channel raises: `failure` says what it means. The ValueError: another thread has just closed it."""

_CALLS = {
    "range": ("KV/Range", "RangeResponse"),
    "txn": ("KV/Txn", "TxnResponse"),
    "delete": ("KV/DeleteRange", "DeleteRangeResponse"),
    "lease_grant": ("Lease/LeaseGrant", "LeaseGrantResponse"),
    "lease_revoke": ("Lease/LeaseRevoke", "LeaseRevokeResponse"),
    "lease_time_to_live": ("Lease/LeaseTimeToLive", "LeaseTimeToLiveResponse"),
    "status": ("Maintenance/Status", "StatusResponse"),
    "authenticate": ("Auth/Authenticate", "AuthenticateResponse"),
}


def ready() -> None:
    """`ConfigError` unless gRPC is installed and can be used in this process; under gevent, make it fit."""
    if grpc is None or not INSTALLED:
        raise ConfigError("etcd over gRPC needs grpcio and protobuf: pip install celery-etcd-lock[grpc]")
    eventlet, gevent = sys.modules.get("eventlet.patcher"), sys.modules.get("gevent.monkey")
    if eventlet and eventlet.is_monkey_patched("socket"):
        raise ConfigError('gRPC does not work under eventlet: set etcd_lock_transport="gateway", and no client')
    if gevent and gevent.is_module_patched("socket"):
        _speak_gevent()


@functools.cache
def _speak_gevent() -> None:
    from grpc.experimental.gevent import init_gevent

    init_gevent()


def use_here() -> None:
    """Before a channel is opened: `ConfigError` in a process forked from one that had used gRPC.

    There a call may hang, past its timeout.
    """
    if _used_by - {os.getpid()} and not _FORK_SUPPORT:
        raise ConfigError(
            "this process was forked from one that had used gRPC, which does not bear that: take the gateway, or "
            "spawn the process instead (GRPC_ENABLE_FORK_SUPPORT=1 lets gRPC try, if the parent was idle)"
        )
    _used_by.add(os.getpid())


def open_channel(target: str, tls: tuple[bytes | None, bytes | None, bytes | None] | None) -> Channel:
    """A channel to ``host:port``, with (CA's certificates, key, certificate) in PEM. Connects at the first call."""
    if tls is None:
        return grpc.insecure_channel(target, options=_OPTIONS)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(*tls), options=_OPTIONS)


class Link:
    """A channel, which is closed once it is retired and nobody is inside any more (``with link:``).

    Raises as `use_here`.
    """

    def __init__(self, connect: Callable[[], Channel]) -> None:
        use_here()
        self._channel = connect()
        self._unary: dict[str, Any] = {}
        self._lock = threading.RLock()
        self._under_way = 0
        self._retired = False
        self.greeted = False
        """Whether somebody has answered on it."""

    def greet(self, timeout: float) -> None:
        """Before the first call: make sure that somebody answers. What fails here, as `LINK_ERRORS`, had no effect."""
        try:
            self._channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=timeout)
        except grpc.RpcError as error:
            if error.code() in _SILENT:
                raise
        self.greeted = True  # or refused: that is an answer too

    def unary(self, name: str) -> Any:
        """Takes a request as bytes."""
        call = self._unary.get(name)
        if call is None:
            call = self._unary[name] = self._method(self._channel.unary_unary, *_CALLS[name], None)
        return call

    def duplex(self, path: str, reply: str) -> Any:
        return self._method(self._channel.stream_stream, path, reply, _serialized)

    @staticmethod
    def _method(kind: Callable[..., Any], path: str, reply: str, serializer: Callable[[Message], bytes] | None) -> Any:
        return kind(
            f"/etcdserverpb.{path}",
            request_serializer=serializer,
            response_deserializer=getattr(messages, reply).FromString,
        )

    def __enter__(self) -> Link:
        with self._lock:
            self._under_way += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._under_way -= 1
        if self._retired:
            self._close_unless_used()

    def retire(self) -> None:
        self._retired = True
        self._close_unless_used()

    def _close_unless_used(self) -> None:
        with self._lock:
            close = self._retired and not self._under_way
        if close:
            self._channel.close()


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()  # type: ignore[no-any-return]


class Duplex:
    """A stream in both directions: `send` from any thread, and a thread that takes what comes."""

    def __init__(
        self,
        link: Link,
        method: tuple[str, str],
        headers: Mapping[str, str],
        failure: Callable[[Link, Exception], Exception],
    ) -> None:
        self._link = link
        self._failure = failure
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        try:
            self._call = link.duplex(*method)(iter(self._outbox.get, None), metadata=tuple(headers.items()))
        except LINK_ERRORS as error:
            raise failure(link, error) from error
        self.send = self._outbox.put

    def take(self, received: Callable[[Message], None], ended: Callable[[Exception], None], name: str) -> None:
        """From now on, give each message to `received`, and what ended them to `ended`, once."""
        threading.Thread(target=self._read, args=(received, ended), name=name, daemon=True).start()

    def _read(self, received: Callable[[Message], None], ended: Callable[[Exception], None]) -> None:
        end: Exception = NoAnswer("the stream ended", sent=True, silent=True)
        try:
            with self._link:
                for message in self._call:
                    received(message)
        except LINK_ERRORS as error:
            end = self._failure(self._link, error)
        finally:
            self._outbox.put(None)
            ended(end)

    def end(self) -> None:
        self._outbox.put(None)
        self._call.cancel()


# -- what gRPC says

_NOT_CONNECTED = re.compile(r"failed to connect|failed to pick|dns resolution failed|errors resolving", re.IGNORECASE)
_REFUSED = re.compile(
    r"connection refused|domain name not found|name or service not known|network is unreachable|no route to host",
    re.IGNORECASE,
)
_UNTRUSTED = re.compile(r"certificate_verify_failed|hostname verification|peer name .* is not in", re.IGNORECASE)


_SILENT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED} if grpc else set()
"""Codes that gRPC gives by itself, when nobody answers."""


_BROKEN = {"UNAVAILABLE", "CANCELLED", "INTERNAL"}
_BROKEN_TOO = re.compile(r"stream removed|rst_stream|goaway|deserializ|message larger than max", re.IGNORECASE)
"""What gRPC says of a call that broke, with codes that are etcd's too: it may have been carried out."""


def not_connected(error: Exception) -> bool:
    """Whether there was no connection on which anything could be sent."""
    return isinstance(error, grpc.RpcError) and bool(_NOT_CONNECTED.search(error.details() or ""))


def failure(url: str, error: Exception) -> Exception | None:
    """What `error`, from a channel to the member at `url`, means; None if it is none of a channel's."""
    if isinstance(error, grpc.RpcError):
        return _meaning(url, error)
    return NoAnswer("closed", silent=True) if isinstance(error, ValueError) else None


def _meaning(url: str, error: Any) -> Exception:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return NoAnswer("no answer", sent=True, silent=True)
    if code is grpc.StatusCode.UNIMPLEMENTED or "http2 header with status" in details:
        why = f"not etcd's answer: {details[:120]}; is this etcd's client URL?"
        return NoAnswer(why, verdict=EtcdRejected(f"{url}: {why}", 12))
    if _NOT_CONNECTED.search(details):
        return _not_connected(url, details)
    if "etcdserver" not in details and (code.name in _BROKEN or _BROKEN_TOO.search(details)):
        return NoAnswer(f"the connection broke ({details[:120]})", sent=True, silent=True)
    return server_error(details, int(code.value[0]))


def _not_connected(url: str, details: str) -> NoAnswer:
    """Nothing was sent. A verdict where trying again would not help."""
    if refused := _REFUSED.search(details):
        return NoAnswer(refused[0].lower(), silent=True, refused=True)
    verdict: EtcdRejected
    if _UNTRUSTED.search(details):
        why = "its TLS certificate cannot be trusted: check ca_certs in etcd_lock_use_ssl, and the host name"
        verdict = AuthRejected(f"{url}: {why}", 16)
    elif alert := re.search(r"\w*ALERT\w*", details):
        why = f"it refuses our side of TLS ({alert[0]}): check certfile and keyfile in etcd_lock_use_ssl"
        verdict = AuthRejected(f"{url}: {why}", 16)
    elif "WRONG_VERSION_NUMBER" in details:
        why = "it does not speak TLS: is it http there?"
        verdict = EtcdRejected(f"{url}: {why}", 12)
    elif "http1.x" in details:
        why = "it speaks HTTP, and not gRPC: is this etcd's client URL?"
        verdict = EtcdRejected(f"{url}: {why}", 12)
    else:
        other = "http" if url.startswith("https") else "https"
        last = details.rpartition("last error: ")[2][:120]
        why = f"no connection ({last}; if it always ends so: is it {other} there?)"
        return NoAnswer(why, silent=True, unclear=True)
    return NoAnswer(why, unclear=True, verdict=verdict)
