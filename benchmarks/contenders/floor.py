"""The floor: the bare requests on either wire, no library, nothing checked but that etcd did it.

Over gRPC that is grpcio's own call with bytes in and out; over the gateway a socket, on which HTTP is written by hand.
`guarded`: not Go's pair of requests but the very ones that this package sends.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from urllib.parse import urlsplit

from benchmarks.contenders.wire import Pair, block, grant, granted, grpc_pair, json_pair, number, revision_of

__all__ = ["over_gateway", "over_grpc"]

_VALUE = b"x" * 120
"""As long as what our own contender says of itself."""

_OWN_KEY = "/celery/sessions/01234567/12345-0123456789abcdef"
"""As long as a session's."""


class _Wire(Protocol):
    def pair(self, name: str) -> Pair: ...
    def txn(self, body: bytes) -> bytes: ...
    def delete(self, body: bytes) -> bytes: ...
    def range(self, body: bytes) -> bytes: ...
    def revision(self, reply: bytes) -> int: ...
    def await_delete(self, body: bytes) -> None: ...


def _taking(wire: _Wire, succeeded: bytes, *, guarded: bool) -> Callable[[str], Callable[[], object]]:
    """`take(name)` gives what gives it back; it waits where somebody has it, unless it is `guarded`."""
    pairs: dict[str, Pair] = {}
    delete = wire.txn if guarded else wire.delete

    def take(name: str) -> Callable[[], object]:
        pair = pairs.get(name) or pairs.setdefault(name, wire.pair(name))
        reply = wire.txn(pair.take)
        assert succeeded in reply
        if not guarded and pair.key not in reply:
            wire.await_delete(pair.watch)
            assert pair.key in wire.range(pair.look)
        revision = wire.revision(reply) if guarded else 0
        return lambda: delete(pair.give(revision))

    return take


class _Grpc:
    def __init__(self, url: str, ttl: int, *, guarded: bool) -> None:
        import grpc

        self._channel = grpc.insecure_channel(urlsplit(url).netloc)
        self.txn, self.delete, self.range = map(self._method, ("KV/Txn", "KV/DeleteRange", "KV/Range"))
        self.revision = revision_of
        self._lease = granted(self._method("Lease/LeaseGrant")(grant(ttl)))
        self._epoch = None
        if guarded:
            put = self._method("KV/Put")(block(1, _OWN_KEY.encode()) + number(3, self._lease))
            self._epoch = (_OWN_KEY, revision_of(put))

    def _method(self, path: str) -> Callable[[bytes], bytes]:
        call: Any = self._channel.unary_unary(f"/etcdserverpb.{path}")  # no serializer: bytes as they are
        return lambda body: bytes(call(body))

    def pair(self, name: str) -> Pair:
        return grpc_pair(name, self._lease, _VALUE, self._epoch)

    def await_delete(self, body: bytes) -> None:
        requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        requests.put(body)
        replies: Iterator[bytes] = self._channel.stream_stream("/etcdserverpb.Watch/Watch")(iter(requests.get, b""))
        next(replies)  # that it watches
        next(replies)
        requests.put(b"")


class _Gateway:
    def __init__(self, url: str, ttl: int, *, guarded: bool) -> None:
        self._parts = urlsplit(url)
        self._local = threading.local()
        self._lease = int(json.loads(self._post(b"/v3/lease/grant", b'{"TTL":%d}' % ttl))["ID"])
        self._epoch = None
        if guarded:
            pair = json_pair(_OWN_KEY.rpartition("/")[0], self._lease, b"")
            self._epoch = (f"{_OWN_KEY.rpartition('/')[0]}/{self._lease:x}", self.revision(self.txn(pair.take)))

    def _connect(self) -> socket.socket:
        sock = socket.create_connection((self._parts.hostname or "", self._parts.port or 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _send(self, sock: socket.socket, path: bytes, body: bytes) -> None:
        host = self._parts.netloc.encode()
        sock.sendall(b"POST %b HTTP/1.1\r\nHost: %b\r\nContent-Length: %d\r\n\r\n%b" % (path, host, len(body), body))

    def _post(self, path: bytes, body: bytes) -> bytes:
        sock: socket.socket | None = getattr(self._local, "sock", None)
        if sock is None:
            sock = self._local.sock = self._connect()
        self._send(sock, path, body)
        reply = b""
        while b"\r\n\r\n" not in reply:
            reply += sock.recv(65_536)
        headers, _, rest = reply.partition(b"\r\n\r\n")
        assert headers.startswith(b"HTTP/1.1 200"), reply
        length = int(headers.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
        while len(rest) < length:
            rest += sock.recv(65_536)
        return rest

    def txn(self, body: bytes) -> bytes:
        return self._post(b"/v3/kv/txn", body)

    def delete(self, body: bytes) -> bytes:
        return self._post(b"/v3/kv/deleterange", body)

    def range(self, body: bytes) -> bytes:
        return self._post(b"/v3/kv/range", body)

    def revision(self, reply: bytes) -> int:
        return int(reply.partition(b'"revision":"')[2].partition(b'"')[0])

    def pair(self, name: str) -> Pair:
        return json_pair(name, self._lease, _VALUE, self._epoch)

    def await_delete(self, body: bytes) -> None:
        with self._connect() as sock:
            self._send(sock, b"/v3/watch", body)
            seen = b""
            while b'"type":"DELETE"' not in seen:
                seen += sock.recv(65_536)


def over_grpc(url: str, ttl: int, *, guarded: bool = False) -> Callable[[str], Callable[[], object]]:
    """`take(name)` gives what gives it back."""
    return _taking(_Grpc(url, ttl, guarded=guarded), b"\x10\x01", guarded=guarded)


def over_gateway(url: str, ttl: int, *, guarded: bool = False) -> Callable[[str], Callable[[], object]]:
    """As `over_grpc`; a connection for each thread."""
    return _taking(_Gateway(url, ttl, guarded=guarded), b'"succeeded":true', guarded=guarded)
