"""etcd's two requests for a lock, written by hand: what any client has to send, as protobuf and as the gateway's JSON.

The pair is Go's recipe and no more: a transaction (if my key is not there put it, and who is first?) and a delete. With
`epoch` it is what this package sends instead: the transaction also compares a key of the session's, asks who is there
before it puts, and for what a refusal would have to say; and the delete is one too, which compares the create revision.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Pair", "grant", "granted", "grpc_pair", "json_pair", "revision_of"]


@dataclass(frozen=True)
class Pair:
    """The bodies of the requests, ready to be sent again and again."""

    key: bytes
    """As it stands in a reply that names it."""
    take: bytes
    give: Callable[[int], bytes]
    """By the revision of the take."""
    look: bytes
    watch: bytes


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
    return _number_at(reply, 2 + reply[1] + 1)


def revision_of(reply: bytes) -> int:
    """The header's revision, in any reply over gRPC: its first field is the header, whose third it is."""
    at = 2
    while reply[at] != 0x18:
        at += 1
        while reply[at] & 0x80:
            at += 1
        at += 1
    return _number_at(reply, at + 1)


def _number_at(reply: bytes, at: int) -> int:
    value = shift = 0
    while True:
        value |= (reply[at] & 0x7F) << shift
        if reply[at] < 0x80:
            return value
        at, shift = at + 1, shift + 7


def grpc_pair(name: str, lease: int, value: bytes, epoch: tuple[str, int] | None = None) -> Pair:
    """As protobuf: a TxnRequest and a DeleteRangeRequest, or two TxnRequests. `epoch`: a key and its mod revision."""
    prefix = name.encode() + b"/"
    key = prefix + (b"%x" if epoch is None else b"write/%x") % lease
    span = block(1, prefix) + block(2, name.encode() + b"0")
    absent = number(2, 1) + block(3, key) + b"\x28\x00"  # the create revision of key is 0
    put = block(2, block(1, key) + block(2, value) + number(3, lease))
    mine, delete = block(1, block(1, key)), block(1, key)
    oldest = span + number(3, 1) + number(5, 1) + number(6, 2)  # limit 1, ascending by create revision
    watch = block(1, span + block(5, b"\x00"))  # no puts
    if epoch is None:
        owner = block(1, oldest)
        take = block(1, absent) + block(2, put) + block(2, owner) + block(3, mine) + block(3, owner)
        return Pair(key, take, lambda _: delete, oldest, watch)
    own = epoch[0].encode()
    same = number(2, 2) + block(3, own) + number(6, epoch[1])
    newest = block(1, span + number(3, 1) + number(5, 2) + number(6, 2) + number(8, 1))
    refused = block(3, block(1, block(1, own))) + block(3, mine)
    take = block(1, absent) + block(1, same) + block(2, newest) + block(2, put) + refused

    def give(revision: int) -> bytes:
        return block(1, number(2, 1) + block(3, key) + number(5, revision)) + block(2, block(3, delete))

    return Pair(key, take, give, oldest, watch)


def json_pair(name: str, lease: int, value: bytes, epoch: tuple[str, int] | None = None) -> Pair:
    """As the gateway takes it: the bodies for /v3/kv/txn and /v3/kv/deleterange (with `epoch` /v3/kv/txn again)."""

    def text(raw: bytes) -> str:
        return base64.b64encode(raw).decode()

    prefix = name.encode() + b"/"
    key = text(prefix + (b"%x" if epoch is None else b"write/%x") % lease)
    span = {"key": text(prefix), "range_end": text(name.encode() + b"0")}
    oldest = {**span, "limit": 1, "sort_order": "ASCEND", "sort_target": "CREATE"}
    absent = {"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": 0}
    put = {"request_put": {"key": key, "value": text(value), "lease": lease}}
    mine = {"request_range": {"key": key}}
    watch = _compact({"create_request": {**span, "filters": ["NOPUT"]}})
    if epoch is None:
        owner = {"request_range": oldest}
        take = {"compare": [absent], "success": [put, owner], "failure": [mine, owner]}
        delete = _compact({"key": key})
        return Pair(key.encode(), _compact(take), lambda _: delete, _compact(oldest), watch)
    own = text(epoch[0].encode())
    same = {"key": own, "target": "MOD", "result": "EQUAL", "mod_revision": epoch[1]}
    newest = {**span, "limit": 1, "sort_order": "DESCEND", "sort_target": "CREATE", "keys_only": True}
    take = {
        "compare": [absent, same],
        "success": [{"request_range": newest}, put],
        "failure": [{"request_range": {"key": own}}, mine],
    }
    first, last = _compact(
        {
            "compare": [{**absent, "create_revision": "@"}],
            "success": [{"request_delete_range": {"key": key}}],
        }
    ).split(b'"@"')
    return Pair(
        key.encode(), _compact(take), lambda revision: b"%b%d%b" % (first, revision, last), _compact(oldest), watch
    )


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
