"""etcd's JSON gateway: values to JSON and back, and what an answer that is no reply means. Opens no socket.

In that JSON, bytes are base64, 64-bit numbers are strings, and what is zero, false or empty is left out.
"""

from __future__ import annotations

import json
from binascii import a2b_base64, b2a_base64
from functools import lru_cache, partial
from typing import Any, TypeAlias

from celery_etcd_lock.etcd.api import (
    Compare,
    Delete,
    DeleteReply,
    Event,
    Header,
    KeyValue,
    LeaseKeys,
    LeaseReply,
    Operation,
    OperationReply,
    Put,
    PutReply,
    Range,
    RangeReply,
    Replies,
    Status,
    Txn,
    TxnReply,
    Watch,
    WatchReply,
)
from celery_etcd_lock.exceptions import (
    AuthRejected,
    Compacted,
    EtcdRejected,
    LeaseNotFound,
    NoSpace,
    PermissionDenied,
)

__all__ = ["Json", "NoAnswer", "TokenRefused", "dump", "judge", "server_error", "watch_ended"]

Json: TypeAlias = "dict[str, Any]"


class NoAnswer(Exception):
    """One attempt on one endpoint came to nothing; another one, there or elsewhere, may.

    `sent`: the request may have been carried out. `silent`: no HTTP answer came at all, whoever waits for
    that member may wait for ever. `hung_up`: instead of an answer it ended the connection, or said nothing in
    it. `refused`: nobody was there to talk to. `unclear`: it may be for TLS, or the lack of it, and a closer look
    would tell. `verdict`: what to raise when no endpoint does better, because trying again would not help.
    """

    def __init__(
        self,
        why: str,
        *,
        sent: bool = False,
        silent: bool = False,
        hung_up: bool = False,
        refused: bool = False,
        unclear: bool = False,
        verdict: EtcdRejected | None = None,
    ) -> None:
        super().__init__(why)
        self.why = why
        self.sent = sent
        self.silent = silent
        self.hung_up = hung_up
        self.refused = refused
        self.unclear = unclear
        self.verdict = verdict

    @property
    def hopeless(self) -> bool:
        """Whether the same attempt would surely fail the same way."""
        return self.refused or self.verdict is not None


class TokenRefused(AuthRejected):
    """etcd wants a (new) token. Nothing was done."""


# -- to JSON
#
# Written as text at once: through dictionaries and json it takes twice as long, and a lock is little else. What goes
# into it needs no escaping, being base64, numbers, and words of ours.

dump = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode

_KEPT = 256
"""Parts of transactions that are kept as text, the latest. Most of what is sent for a lock was sent for it before.
What holds a value is not kept (it may be large), nor what compares a create revision, which comes once. A mod revision
is a session's, and stays."""

_TARGETS = {"create": "create_revision", "mod": "mod_revision", "version": "version", "lease": "lease"}
_OPERATORS = {"==": "EQUAL", "!=": "NOT_EQUAL", "<": "LESS", ">": "GREATER"}


@lru_cache(maxsize=_KEPT)
def _text(text: str) -> str:
    return _bytes(text.encode("utf-8", "surrogateescape"))


def _bytes(value: bytes) -> str:
    return b2a_base64(value, newline=False).decode("ascii")


def _keys(key: str, range_end: str | None) -> str:
    if range_end is None:
        return f'"key":"{_text(key)}"'
    return f'"key":"{_text(key)}","range_end":"{_text(range_end)}"'


def range_out(request: Range) -> str:
    key, range_end, limit, revision, sort, descending, keys_only, count_only, max_create_revision = request
    out = _keys(key, range_end)
    if limit:
        out += f',"limit":{limit:d}'
    if revision:
        out += f',"revision":{revision:d}'
    if sort or descending:
        order = "DESCEND" if descending else "ASCEND"
        out += f',"sort_target":"{(sort or "key").upper()}","sort_order":"{order}"'
    if keys_only:
        out += ',"keys_only":true'
    if count_only:
        out += ',"count_only":true'
    if max_create_revision:
        out += f',"max_create_revision":{max_create_revision:d}'
    return f"{{{out}}}"


def delete_out(request: Delete) -> str:
    return f"{{{_keys(request.key, request.range_end)}}}"


def _compare_out(compare: Compare) -> str:
    key, target, operator, operand, range_end = compare
    if target == "value":
        if not isinstance(operand, bytes):
            raise TypeError(f"a value is compared with bytes, not {operand!r}")
        compared = f'"value":"{_bytes(operand)}"'
    else:
        if not isinstance(operand, int):
            raise TypeError(f"a {target} is compared with a number, not {operand!r}")
        compared = f'"{_TARGETS[target]}":{operand:d}'
    return f'{{{_keys(key, range_end)},"target":"{target.upper()}","result":"{_OPERATORS[operator]}",{compared}}}'


_kept_compare_out = lru_cache(maxsize=_KEPT)(_compare_out)


def _operation_out(operation: Operation) -> str:
    if not isinstance(operation, Put):
        return _kept_operation_out(operation)
    key, value, lease = operation
    return f'{{"request_put":{{"key":"{_text(key)}","value":"{_bytes(value)}","lease":{lease:d}}}}}'


@lru_cache(maxsize=_KEPT)
def _kept_operation_out(operation: Range | Delete) -> str:
    if isinstance(operation, Range):
        return f'{{"request_range":{range_out(operation)}}}'
    return f'{{"request_delete_range":{delete_out(operation)}}}'


def txn_out(request: Txn) -> str:
    compare, success, failure = request
    compared = [
        (_compare_out if each.operand and each.target != "mod" else _kept_compare_out)(each) for each in compare
    ]
    branches = f'"success":[{",".join(map(_operation_out, success))}]'
    if failure:
        branches += f',"failure":[{",".join(map(_operation_out, failure))}]'
    return f'{{"compare":[{",".join(compared)}],{branches}}}'


def watch_out(request: Watch) -> str:
    out = _keys(request.key, request.range_end)
    if request.start_revision:
        out += f',"start_revision":{request.start_revision:d}'
    if request.deletes_only:
        out += ',"filters":["NOPUT"]'
    return f'{{"create_request":{{{out}}}}}'


# -- from JSON


def text_in(encoded: str) -> str:
    return a2b_base64(encoded).decode("utf-8", "surrogateescape")


def header_in(reply: Json, unanswered: bool = False) -> Header:
    header = reply.get("header", {})
    return Header(
        int(header.get("revision", 0)),
        int(header.get("raft_term", 0)),
        int(header.get("member_id", 0)),
        int(header.get("cluster_id", 0)),
        unanswered,
    )


def _key_value_in(kv: Json) -> KeyValue:
    return KeyValue(
        text_in(kv.get("key", "")),
        a2b_base64(kv.get("value", "")),
        int(kv.get("create_revision", 0)),
        int(kv.get("mod_revision", 0)),
        int(kv.get("version", 0)),
        int(kv.get("lease", 0)),
    )


def range_in(reply: Json, header: Header) -> RangeReply:
    kvs = tuple(map(_key_value_in, reply.get("kvs", ())))
    return RangeReply(header, kvs, int(reply.get("count", 0)), bool(reply.get("more", False)))


def delete_in(reply: Json, header: Header) -> DeleteReply:
    return DeleteReply(header, int(reply.get("deleted", 0)))


def _operation_in(header: Header, reply: Json) -> OperationReply:
    if "response_put" in reply:
        return PutReply(header)
    if "response_range" in reply:
        return range_in(reply["response_range"], header)
    return delete_in(reply["response_delete_range"], header)


def txn_in(reply: Json, header: Header) -> TxnReply:
    responses = Replies(reply.get("responses", []), partial(_operation_in, header))
    return TxnReply(header, bool(reply.get("succeeded", False)), responses)


def lease_in(reply: Json, header: Header) -> LeaseReply:
    return LeaseReply(header, int(reply.get("ID", 0)), max(0, int(reply.get("TTL", 0))))


def lease_keys_in(reply: Json, header: Header) -> LeaseKeys:
    ttl = int(reply.get("TTL", 0))
    keys = tuple(map(text_in, reply.get("keys", ())))
    return LeaseKeys(header, int(reply.get("ID", 0)), ttl, int(reply.get("grantedTTL", 0)), keys)


def status_in(reply: Json, endpoint: str) -> Status:
    header = reply.get("header", {})
    return Status(
        endpoint=endpoint,
        version=reply.get("version", ""),
        db_size=int(reply.get("dbSize", 0)),
        db_size_in_use=int(reply.get("dbSizeInUse", 0)),
        leader=int(reply.get("leader", 0)),
        raft_term=int(reply.get("raftTerm", 0)),
        member_id=int(header.get("member_id", 0)),
        revision=int(header.get("revision", 0)),
        errors=tuple(reply.get("errors", ())),
        db_size_quota=int(reply.get("dbSizeQuota", 0)),
    )


def watch_in(result: Json) -> WatchReply:
    """One message of a watch. Raises what a canceled one means; `TokenRefused` and `NoAnswer` too."""
    if result.get("canceled"):
        raise watch_ended(result.get("cancel_reason", ""), int(result.get("compact_revision", 0)))
    events = tuple(
        Event("delete" if event.get("type") == "DELETE" else "put", _key_value_in(event["kv"]))
        for event in result.get("events", ())
    )
    return WatchReply(header_in(result), events)


# -- what else a server says

_CODES = {"Unauthenticated": 16, "PermissionDenied": 7, "InvalidArgument": 3, "OutOfRange": 11}
_NOT_DONE = ("no leader", "not a primary lessor", "too many requests", "proposal dropped", "not capable", "for learner")
_PERHAPS_DONE = ("timed out", "leader changed", "deadline exceeded", "context canceled", "RST_STREAM", "transport")
_WANTS_TOKEN = ("invalid auth token", "auth store is old", "user name is empty")


def _code_of(reason: str) -> int:
    name = reason.partition("code = ")[2].partition(" ")[0]
    return _CODES.get(name, 14)


def watch_ended(reason: str, compact_revision: int) -> Exception:
    """The exception for a watch that etcd has canceled for `reason`."""
    if compact_revision:
        return Compacted(f"what was watched from is compacted up to revision {compact_revision}", 11)
    return server_error(reason or "etcd canceled the watch", 14 if "code = " not in reason else _code_of(reason))


def server_error(message: str, code: int) -> Exception:
    """The exception for an error of etcd's own, by its message and gRPC code."""
    if "requested lease not found" in message:
        return LeaseNotFound(message, code)
    if "has been compacted" in message:
        return Compacted(message, code)
    if "database space exceeded" in message:
        return NoSpace(
            "etcd's database has reached its quota and takes no writes: `etcdctl compact <revision>`, "
            "then `etcdctl defrag --cluster`, then `etcdctl alarm disarm`"
        )
    if any(phrase in message for phrase in _NOT_DONE):
        return NoAnswer(message)
    if any(phrase in message for phrase in _WANTS_TOKEN) or code == 16:
        return TokenRefused(message, code)
    if "permission denied" in message or code == 7:
        return PermissionDenied(message, code)
    if "authentication failed" in message:
        return AuthRejected(message, code)
    if code in {1, 4, 14} or any(phrase in message for phrase in _PERHAPS_DONE):
        return NoAnswer(message, sent=True)
    return EtcdRejected(message, code)


def judge(url: str, status: int, body: bytes) -> Json:
    """The JSON object in an HTTP answer of the member at `url`, or raise what the answer means instead."""
    try:
        reply, _ = _read(body.decode().lstrip())
    except ValueError:
        reply = {}
    if not isinstance(reply, dict):
        reply = {}
    error = reply.get("error")
    if isinstance(error, dict):  # a stream's; its codes have other names
        reply = {"code": error.get("grpc_code", error.get("code", 2)), **error}
    if "message" in reply and "code" in reply:
        if reply["message"] != "Not Found":
            raise server_error(str(reply["message"]), int(reply["code"]))
    elif status == 200 and ("header" in reply or "result" in reply):
        return reply
    if not body:
        raise NoAnswer("an empty answer", sent=True, hung_up=True)
    raise _not_etcd(url, status, body)


_read = json.JSONDecoder().raw_decode
"""Of a text the value that it begins with: a stream's answer goes on behind it."""


def _not_etcd(url: str, status: int, body: bytes) -> NoAnswer:
    said = " ".join(body[:300].decode("utf-8", "replace").split())[:120]
    if "CommonName of client" in said:
        why = (
            "etcd's gateway takes no user from a client certificate's common name: use a certificate without one in "
            'etcd_lock_use_ssl, with etcd_lock_username and etcd_lock_password, or etcd_lock_transport="grpc"'
        )
        return NoAnswer(why, verdict=AuthRejected(f"{url}: {why}", 16))
    if status == 404:
        why = "no JSON gateway of etcd's (off by --enable-grpc-gateway=false, or older than 3.4, or not etcd at all)"
    elif status >= 500:
        return NoAnswer(f"HTTP {status}: {said}", sent=True)
    elif "HTTP request to an HTTPS server" in said:
        why = "it speaks TLS: write https:// in etcd_lock_endpoints"
    else:
        why = f"not etcd's answer, HTTP {status}: {said}; is this etcd's client URL?"
    return NoAnswer(why, verdict=EtcdRejected(f"{url}: {why}", 12))
