"""The floor: the bare pair of requests on either wire, no library, nothing checked but that etcd did it.

Over gRPC that is grpcio's own call with bytes in and out; over the gateway a socket, on which HTTP is written by hand.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from benchmarks.contenders.wire import Pair, grant, granted, grpc_pair, json_pair

__all__ = ["over_gateway", "over_grpc"]

_VALUE = b"x" * 150
"""As long as what our own contender says of itself."""


def over_grpc(url: str, ttl: int) -> Callable[[str], Callable[[], object]]:
    """`take(name)` gives what gives it back."""
    import grpc

    channel = grpc.insecure_channel(urlsplit(url).netloc)

    def method(path: str) -> Callable[[bytes], bytes]:
        call: Any = channel.unary_unary(f"/etcdserverpb.{path}")  # no serializer: bytes as they are
        return lambda body: bytes(call(body))

    txn, delete = method("KV/Txn"), method("KV/DeleteRange")
    lease = granted(method("Lease/LeaseGrant")(grant(ttl)))
    pairs: dict[str, Pair] = {}

    def take(name: str) -> Callable[[], object]:
        pair = pairs.get(name) or pairs.setdefault(name, grpc_pair(name, lease, _VALUE))
        assert b"\x10\x01" in txn(pair.take)  # succeeded
        return lambda: delete(pair.give)

    return take


def over_gateway(url: str, ttl: int) -> Callable[[str], Callable[[], object]]:
    """As `over_grpc`; a connection for each thread."""
    parts = urlsplit(url)
    local = threading.local()

    def connection() -> socket.socket:
        sock: socket.socket | None = getattr(local, "sock", None)
        if sock is None:
            sock = local.sock = socket.create_connection((parts.hostname or "", parts.port or 0))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def post(path: bytes, body: bytes) -> bytes:
        sock = connection()
        head = b"POST %b HTTP/1.1\r\nHost: %b\r\nContent-Length: %d\r\n\r\n" % (path, parts.netloc.encode(), len(body))
        sock.sendall(head + body)
        reply = b""
        while b"\r\n\r\n" not in reply:
            reply += sock.recv(65_536)
        headers, _, rest = reply.partition(b"\r\n\r\n")
        assert headers.startswith(b"HTTP/1.1 200"), reply
        length = int(headers.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
        while len(rest) < length:
            rest += sock.recv(65_536)
        return rest

    lease = int(json.loads(post(b"/v3/lease/grant", b'{"TTL":%d}' % ttl))["ID"])
    pairs: dict[str, Pair] = {}

    def take(name: str) -> Callable[[], object]:
        pair = pairs.get(name) or pairs.setdefault(name, json_pair(name, lease, _VALUE))
        assert b'"succeeded":true' in post(b"/v3/kv/txn", pair.take)
        return lambda: post(b"/v3/kv/deleterange", pair.give)

    return take
