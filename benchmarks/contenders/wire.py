"""etcd's two requests for a lock, written by hand: what any client has to send, as protobuf and as the gateway's JSON.

`Pair` is Go's recipe and no more: a transaction (if my key is not there put it, and who is first?) and a delete.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

__all__ = ["Pair", "grant", "granted", "grpc_pair", "json_pair"]


@dataclass(frozen=True)
class Pair:
    """The bodies of the two requests, ready to be sent again and again."""

    take: bytes
    give: bytes


def number(field: int, value: int) -> bytes:
    """A varint field of protobuf's; nothing for 0, which is how protobuf writes it."""
    return _varint(field << 3) + _varint(value) if value else b""


def block(field: int, value: bytes) -> bytes:
    """A field of bytes, or a message."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def grant(ttl: int) -> bytes:
    """A LeaseGrantRequest."""
    return number(1, ttl)


def granted(reply: bytes) -> int:
    """The lease's id in a LeaseGrantResponse: its second field, behind the header."""
    at = 2 + reply[1] + 1
    value = shift = 0
    while True:
        value |= (reply[at] & 0x7F) << shift
        if reply[at] < 0x80:
            return value
        at, shift = at + 1, shift + 7


def grpc_pair(name: str, lease: int, value: bytes) -> Pair:
    """As protobuf: a TxnRequest and a DeleteRangeRequest."""
    prefix = name.encode() + b"/"
    key = prefix + b"%x" % lease
    absent = number(2, 1) + block(3, key) + b"\x28\x00"  # the create revision of key is 0
    put = block(2, block(1, key) + block(2, value) + number(3, lease))
    oldest = number(3, 1) + number(5, 1) + number(6, 2)  # limit 1, ascending by create revision
    owner = block(1, block(1, prefix) + block(2, name.encode() + b"0") + oldest)
    mine = block(1, block(1, key))
    take = block(1, absent) + block(2, put) + block(2, owner) + block(3, mine) + block(3, owner)
    return Pair(take, block(1, key))


def json_pair(name: str, lease: int, value: bytes) -> Pair:
    """As the gateway takes it: the bodies for /v3/kv/txn and /v3/kv/deleterange."""

    def text(raw: bytes) -> str:
        return base64.b64encode(raw).decode()

    prefix = name.encode() + b"/"
    key = text(prefix + b"%x" % lease)
    owner = {
        "request_range": {
            "key": text(prefix), "range_end": text(name.encode() + b"0"),
            "limit": 1, "sort_order": "ASCEND", "sort_target": "CREATE",
        }
    }  # fmt: skip
    take = {
        "compare": [{"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": 0}],
        "success": [{"request_put": {"key": key, "value": text(value), "lease": lease}}, owner],
        "failure": [{"request_range": {"key": key}}, owner],
    }
    return Pair(_compact(take), _compact({"key": key}))


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
