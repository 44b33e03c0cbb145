"""`GrpcTransport`: etcd over gRPC, with the extra ``[grpc]``. A tenth less time for a lock and unlock.

One request is one call on a member's channel; all watches of a process share one stream to each member, and so do
all renewals. The modules beside this one, from the ground up: `grpc_messages` (values and protobuf), `grpc_channel`
(gRPC's own part), `grpc_member` (one member's calls and streams), `cluster` (which member, how long, as whom).

gRPC's library does not bear a fork once it is in use: a call in the child may then hang, past its timeout. So in a
child of a process that had used it every call is a `ConfigError`, unless GRPC_ENABLE_FORK_SUPPORT=1 in the
environment tells gRPC to prepare for forks; then the child starts over, with channels of its own. (That works
while the parent is idle; it takes up to a second a fork.) Celery's prefork pool uses it in the children only.
"""

from __future__ import annotations

import functools
import os
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from celery_etcd_lock.etcd import grpc_messages as codec
from celery_etcd_lock.etcd.api import (
    TLS,
    Delete,
    DeleteReply,
    Header,
    LeaseKeys,
    LeaseReply,
    Range,
    RangeReply,
    Status,
    Txn,
    TxnReply,
    Watch,
    WatchReply,
)
from celery_etcd_lock.etcd.cluster import Attempt, Cluster, checked
from celery_etcd_lock.etcd.gateway_codec import NoAnswer, TokenRefused
from celery_etcd_lock.etcd.grpc_channel import Channel, open_channel, ready
from celery_etcd_lock.etcd.grpc_member import Member, Subscription
from celery_etcd_lock.etcd.grpc_messages import Message, messages
from celery_etcd_lock.exceptions import AuthRejected, ConfigError, EtcdUnavailable

__all__ = ["GrpcCluster", "GrpcTransport", "GrpcWatch"]


class GrpcCluster(Cluster[Member]):
    """See `Cluster`."""

    anonymous: Mapping[str, str] = {"hasleader": "true"}  # a member that has lost its leader says so

    def __init__(self, members: Sequence[Member], timeout: float, username: str | None, password: str | None) -> None:
        ready()
        super().__init__(members, timeout, username, password)

    @classmethod
    def at(
        cls, urls: Sequence[str], timeout: float, username: str | None, password: str | None, tls: TLS | None
    ) -> GrpcCluster:
        """The cluster of the members at `urls`."""
        different, context = checked(urls, tls)
        if tls and tls.cert_reqs == "none":
            raise ConfigError('gRPC cannot do without checking certificates: name their CA, or use the "gateway"')
        members = [Member(url, functools.partial(_connect, url, tls or TLS()), context=context) for url in different]
        return cls(members, timeout, username, password)

    def authenticate(self, endpoint: Member, timeout: float) -> Mapping[str, str]:
        request = messages.AuthenticateRequest(name=self._username, password=self._password)
        reply = self.calling("authenticate", request)(endpoint, self.anonymous, timeout)
        return {**self.anonymous, "token": reply.token}

    def calling(self, name: str, message: Message | bytes) -> Attempt[Member, Message]:
        """The attempt that sends `message` and returns what comes back."""
        body = message if isinstance(message, bytes) else message.SerializeToString()

        def call(endpoint: Member, headers: Mapping[str, str], timeout: float) -> Message:
            self.count_request()
            return endpoint.call(name, body, headers, timeout)

        return call

    def renewing(self, lease: int) -> Attempt[Member, Message]:
        """The attempt that renews `lease`."""

        def renew(endpoint: Member, headers: Mapping[str, str], timeout: float) -> Message:
            self.count_request()
            return endpoint.renew(lease, headers, timeout)

        return renew


def _connect(url: str, tls: TLS) -> Channel:
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    target = parts.netloc if parts.port else f"{parts.netloc}:{443 if secure else 80}"
    return open_channel(target, _pem(tls) if secure else None)


def _pem(tls: TLS) -> tuple[bytes | None, bytes | None, bytes | None]:
    """What gRPC wants of `tls`: the system's CAs have to be read for it, else it takes a list of its own."""
    paths = ssl.get_default_verify_paths()
    system = [Path(paths.cafile or ""), Path(paths.capath or "", "ca-certificates.crt")]
    ca_certs = tls.ca_certs or next((path for path in system if path.is_file()), None)
    return _read(ca_certs), _read(tls.keyfile or tls.certfile), _read(tls.certfile)


def _read(path: Path | str | None) -> bytes | None:
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise ConfigError(f"etcd's TLS file {path} cannot be read: {error.strerror}") from error


class GrpcTransport:
    """The cluster at `endpoints`, URLs; see `api.Transport`. Opens no socket before the first call.

    `timeout` is what a call without one may take, in seconds. `ConfigError` for URLs, TLS files or credentials that
    cannot be meant, where grpcio is not installed, and under eventlet. After `close` every call is an
    `EtcdUnavailable`.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        timeout: float = 5.0,
        username: str | None = None,
        password: str | None = None,
        tls: TLS | None = None,
    ) -> None:
        self._use(GrpcCluster.at(endpoints, timeout, username, password, tls), endpoints)

    def _use(self, cluster: GrpcCluster, endpoints: Sequence[str]) -> None:
        self._cluster = cluster
        self._endpoints = tuple(endpoints)

    def __repr__(self) -> str:
        return f"<GrpcTransport {','.join(self._endpoints)}>"

    @property
    def endpoints(self) -> tuple[str, ...]:
        return self._endpoints

    @property
    def requests(self) -> int:
        """Requests sent so far: attempts, log-ins, renewals and watches among them."""
        return self._cluster.requests

    def range(self, request: Range, *, timeout: float | None = None) -> RangeReply:
        return codec.range_in(*self._call("range", codec.range_out(request), timeout))

    def txn(self, request: Txn, *, timeout: float | None = None) -> TxnReply:
        return codec.txn_in(*self._call("txn", codec.txn_out(request), timeout))

    def delete(self, request: Delete, *, timeout: float | None = None) -> DeleteReply:
        return codec.delete_in(*self._call("delete", codec.delete_out(request), timeout))

    def lease_grant(self, ttl: int, *, timeout: float | None = None) -> LeaseReply:
        return codec.lease_in(*self._call("lease_grant", messages.LeaseGrantRequest(TTL=ttl), timeout))

    def lease_renew(self, lease: int, *, timeout: float | None = None) -> LeaseReply:
        reply, unanswered = self._cluster.everywhere(self._cluster.renewing(lease), timeout)
        return codec.lease_in(reply, codec.header_in(reply, unanswered))

    def lease_revoke(self, lease: int, *, timeout: float | None = None) -> None:
        self._call("lease_revoke", messages.LeaseRevokeRequest(ID=lease), timeout)

    def lease_time_to_live(self, lease: int, *, keys: bool = False, timeout: float | None = None) -> LeaseKeys:
        request = messages.LeaseTimeToLiveRequest(ID=lease, keys=keys)
        return codec.lease_keys_in(*self._call("lease_time_to_live", request, timeout))

    def watch(self, request: Watch) -> GrpcWatch:
        return GrpcWatch(self._cluster, request)

    def status(self, *, timeout: float | None = None) -> tuple[Status, ...]:
        total = self._cluster.timeout if timeout is None else timeout
        attempt = self._cluster.calling("status", messages.StatusRequest())
        found: list[Status] = []
        failures: dict[Member, NoAnswer] = {}
        for endpoint in self._cluster.endpoints:
            try:
                reply = self._cluster.on_one(endpoint, attempt, total / len(self._cluster.endpoints))
            except NoAnswer as failure:
                failures[endpoint] = failure
            else:
                found.append(codec.status_in(reply, endpoint.url))
        if not found:
            raise self._cluster.nobody(failures, total, unanswered=False)
        return tuple(found)

    def close(self) -> None:
        self._cluster.close()

    def _call(self, name: str, message: Message | bytes, timeout: float | None) -> tuple[Message, Header]:
        reply, unanswered = self._cluster.everywhere(self._cluster.calling(name, message), timeout)
        return reply, codec.header_in(reply, unanswered)


class GrpcWatch:
    """See `api.WatchStream`. It also ends when another call finds that its member no longer answers."""

    def __init__(self, cluster: GrpcCluster, request: Watch) -> None:
        self._cluster = cluster
        self._request = request
        self._pid = os.getpid()
        self._reading = threading.Lock()
        self._closed = False
        self._over = False
        self._url = ""
        self._subscription: Subscription | None = None
        self._confirmed = False

    def __iter__(self) -> Iterator[WatchReply]:
        return self

    def __next__(self) -> WatchReply:
        if os.getpid() != self._pid:
            raise StopIteration
        with self._reading:
            if self._over or self._quit:
                raise StopIteration
            try:
                reply = self._next() if self._confirmed else self._first()
            except BaseException as error:
                self._over = True
                self._release()
                if self._quit and isinstance(error, Exception):
                    raise StopIteration from None
                raise
        if self._quit:
            raise StopIteration
        return reply

    def close(self) -> None:
        self._closed = True
        if os.getpid() == self._pid:
            # Without a subscription it is about to have one, if that: whoever iterates looks at `_closed` then.
            self._release()

    @property
    def _quit(self) -> bool:
        return self._closed or self._cluster.closed

    def _first(self) -> WatchReply:
        try:
            reply, _ = self._cluster.everywhere(self._open)
        except EtcdUnavailable as error:
            raise EtcdUnavailable(str(error)) from error  # nothing that could be carried out late
        self._confirmed = True
        return reply

    def _open(self, endpoint: Member, headers: Mapping[str, str], timeout: float) -> WatchReply:
        self._release()
        self._cluster.count_request()
        self._url = endpoint.url
        self._subscription = subscription = endpoint.watch(self._request, headers)
        if self._quit:
            raise EtcdUnavailable("the watch was closed")
        try:
            return codec.watch_in(subscription.get(timeout))
        except AuthRejected as error:
            # etcd says "permission denied" to a watch whose token is old: a new one will show
            raise TokenRefused(str(error), error.code) from error

    def _next(self) -> WatchReply:
        subscription = self._subscription
        if subscription is None:  # closed by another thread
            raise EtcdUnavailable("the watch was closed")
        try:
            return codec.watch_in(subscription.get())
        except NoAnswer as failure:
            raise EtcdUnavailable(f"the watch on {self._url} ended: {failure.why}") from failure
        except TokenRefused as error:
            raise EtcdUnavailable(f"the watch on {self._url} ended: {error}") from error

    def _release(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.close()
