"""`GatewayTransport`: etcd over its JSON gateway, which is plain HTTP/1.1. The default transport.

One request is one POST on a kept-alive connection; a watch is a POST whose answer goes on, one message a line,
on a connection of its own. The modules beside this one, from the ground up: `gateway_codec` (values and JSON),
`http1` (a request on a socket), `gateway_http` (one member's sockets), `cluster` (which member, how long, as whom).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence

from celery_etcd_lock.etcd import gateway_codec as codec
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
from celery_etcd_lock.etcd.gateway_codec import Json, NoAnswer, TokenRefused, judge
from celery_etcd_lock.etcd.gateway_http import Endpoint, Stream
from celery_etcd_lock.exceptions import AuthRejected, EtcdUnavailable

__all__ = ["GatewayTransport", "GatewayWatch"]


class GatewayCluster(Cluster[Endpoint]):
    """See `Cluster`."""

    # No more than these, and no User-Agent: etcd carries each header on, through a hop of its own.
    anonymous: Mapping[str, str] = {
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        # a member that has lost its leader says so, instead of letting us wait
        "Grpc-Metadata-hasleader": "true",
    }

    def __init__(
        self, urls: Sequence[str], timeout: float, username: str | None, password: str | None, tls: TLS | None
    ) -> None:
        different, context = checked(urls, tls)
        super().__init__([Endpoint(url, context) for url in different], timeout, username, password)

    def authenticate(self, endpoint: Endpoint, timeout: float) -> Mapping[str, str]:
        body = codec.dump({"name": self._username, "password": self._password})
        reply = self.posting("/v3/auth/authenticate", body)(endpoint, self.anonymous, timeout)
        return {**self.anonymous, "Authorization": str(reply.get("token", ""))}

    def posting(self, path: str, body: str) -> Attempt[Endpoint, Json]:
        """The attempt that sends `body` and returns what comes back."""

        def post(endpoint: Endpoint, headers: Mapping[str, str], timeout: float) -> Json:
            self.count_request()
            status, answer = endpoint.post(path, body, headers, timeout)
            return judge(endpoint.url, status, answer)

        return post


class GatewayTransport:
    """The cluster at `endpoints`, URLs; see `api.Transport`. Opens no socket before the first call.

    `timeout` is what a call without one may take, in seconds. `ConfigError` for URLs, TLS files or
    credentials that cannot be meant. After `close` every call is an `EtcdUnavailable`.
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
        self._cluster = GatewayCluster(endpoints, timeout, username, password, tls)
        self._endpoints = tuple(endpoints)

    def __repr__(self) -> str:
        return f"<GatewayTransport {','.join(self._endpoints)}>"

    @property
    def endpoints(self) -> tuple[str, ...]:
        return self._endpoints

    @property
    def requests(self) -> int:
        """POSTs sent so far: attempts, log-ins and watches among them."""
        return self._cluster.requests

    def range(self, request: Range, *, timeout: float | None = None) -> RangeReply:
        reply, header = self._call("/v3/kv/range", codec.range_out(request), timeout)
        return codec.range_in(reply, header)

    def txn(self, request: Txn, *, timeout: float | None = None) -> TxnReply:
        reply, header = self._call("/v3/kv/txn", codec.txn_out(request), timeout)
        return codec.txn_in(reply, header)

    def delete(self, request: Delete, *, timeout: float | None = None) -> DeleteReply:
        reply, header = self._call("/v3/kv/deleterange", codec.delete_out(request), timeout)
        return codec.delete_in(reply, header)

    def lease_grant(self, ttl: int, *, timeout: float | None = None) -> LeaseReply:
        reply, header = self._call("/v3/lease/grant", codec.dump({"TTL": ttl}), timeout)
        return codec.lease_in(reply, header)

    def lease_renew(self, lease: int, *, timeout: float | None = None) -> LeaseReply:
        reply, header = self._call("/v3/lease/keepalive", codec.dump({"ID": lease}), timeout)
        return codec.lease_in(reply, header)

    def lease_revoke(self, lease: int, *, timeout: float | None = None) -> None:
        self._call("/v3/lease/revoke", codec.dump({"ID": lease}), timeout)

    def lease_time_to_live(self, lease: int, *, keys: bool = False, timeout: float | None = None) -> LeaseKeys:
        reply, header = self._call("/v3/lease/timetolive", codec.dump({"ID": lease, "keys": keys}), timeout)
        return codec.lease_keys_in(reply, header)

    def watch(self, request: Watch) -> GatewayWatch:
        return GatewayWatch(self._cluster, request)

    def status(self, *, timeout: float | None = None) -> tuple[Status, ...]:
        total = self._cluster.timeout if timeout is None else timeout
        attempt = self._cluster.posting("/v3/maintenance/status", "{}")
        found: list[Status] = []
        failures: dict[Endpoint, NoAnswer] = {}
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

    def _call(self, path: str, body: str, timeout: float | None) -> tuple[Json, Header]:
        reply, unanswered = self._cluster.everywhere(self._cluster.posting(path, body), timeout)
        reply = reply.get("result", reply)  # what is a stream in gRPC comes wrapped
        return reply, codec.header_in(reply, unanswered)


class GatewayWatch:
    """See `api.WatchStream`. It also ends when another call finds that its member no longer answers."""

    def __init__(self, cluster: GatewayCluster, request: Watch) -> None:
        self._cluster = cluster
        self._body = codec.watch_out(request)
        self._pid = os.getpid()
        self._reading = threading.Lock()
        self._closed = False
        self._over = False
        self._stream: Stream | None = None
        self._messages: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[WatchReply]:
        return self

    def __next__(self) -> WatchReply:
        if os.getpid() != self._pid:
            raise StopIteration
        with self._reading:
            if self._over or self._quit:
                self._release()
                raise StopIteration
            try:
                reply = self._next() if self._messages else self._first()
            except BaseException as error:
                self._over = True
                self._release()
                if self._quit and isinstance(error, Exception):
                    raise StopIteration from None
                raise
        if self._quit:
            self._release_unless_read()
            raise StopIteration
        return reply

    def close(self) -> None:
        self._closed = True
        stream = self._stream
        # Without a stream it is about to connect, if that: whoever iterates looks at `_closed` afterwards.
        if stream is not None and os.getpid() == self._pid:
            stream.shutdown("closed")
            self._release_unless_read()

    @property
    def _quit(self) -> bool:
        return self._closed or self._cluster.closed

    def _first(self) -> WatchReply:
        try:
            return self._cluster.everywhere(self._open)[0]
        except EtcdUnavailable as error:
            raise EtcdUnavailable(str(error)) from error  # nothing that could be carried out late

    def _open(self, endpoint: Endpoint, headers: Mapping[str, str], timeout: float) -> WatchReply:
        self._release()
        self._cluster.count_request()
        self._stream = Stream(endpoint, timeout)
        if self._quit:
            raise EtcdUnavailable("the watch was closed")
        self._messages = self._stream.lines("/v3/watch", self._body, headers)
        try:
            return self._read(self._messages, endpoint.url)
        except AuthRejected as error:
            # etcd 3.5.1 says "permission denied" to a watch whose token is old: a new one will show
            raise TokenRefused(str(error), error.code) from error

    def _next(self) -> WatchReply:
        assert self._stream
        assert self._messages
        url = self._stream.url
        try:
            return self._read(self._messages, url)
        except NoAnswer as failure:
            raise EtcdUnavailable(f"the watch on {url} ended: {failure.why}") from failure
        except TokenRefused as error:
            raise EtcdUnavailable(f"the watch on {url} ended: {error}") from error

    @staticmethod
    def _read(messages: Iterator[bytes], url: str) -> WatchReply:
        message = judge(url, 200, next(messages))
        return codec.watch_in(message.get("result", message))

    def _release(self) -> None:
        self._messages = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _release_unless_read(self) -> None:
        """Clean up; if another thread reads, it does so itself on its way out."""
        if self._reading.acquire(blocking=False):
            try:
                self._release()
            finally:
                self._reading.release()
