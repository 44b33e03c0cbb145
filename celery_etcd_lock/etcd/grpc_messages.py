"""etcd's protobuf messages, made at run time, and our values to them and back. Opens no socket.

Generated code is bound to the protobuf release that made it; a description that is read at run time works with
every one from 4.21 on. The pool is our own, so that another package's etcd messages are not in the way. Only
the fields that are used are described: protobuf passes over the others. Enums are numbers, as on the wire.
"""

from __future__ import annotations

from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, TypeAlias

try:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
except (
    ImportError
):  # said by `grpc_channel`, to whoever wants it: without the extra, every module can still be imported
    descriptor_pb2 = descriptor_pool = message_factory = None

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
from celery_etcd_lock.etcd.gateway_codec import watch_ended

__all__ = ["INSTALLED", "Message", "messages"]

INSTALLED = descriptor_pb2 is not None
"""Whether there is a protobuf."""

Message: TypeAlias = Any
"""A protobuf message; its class is made at run time, so no type checker knows it."""

_DESCRIPTION = """
ResponseHeader: cluster_id=1 uint64, member_id=2 uint64, revision=3 int64, raft_term=4 uint64
KeyValue: key=1 bytes, create_revision=2 int64, mod_revision=3 int64, version=4 int64, value=5 bytes, lease=6 int64
Event: type=1 int32, kv=2 KeyValue
RangeRequest: key=1 bytes, range_end=2 bytes, limit=3 int64, revision=4 int64, sort_order=5 int32, sort_target=6 int32,
  keys_only=8 bool, count_only=9 bool, max_create_revision=13 int64
RangeResponse: header=1 ResponseHeader, kvs=2 *KeyValue, more=3 bool, count=4 int64
PutRequest: key=1 bytes, value=2 bytes, lease=3 int64
PutResponse: header=1 ResponseHeader
DeleteRangeRequest: key=1 bytes, range_end=2 bytes
DeleteRangeResponse: header=1 ResponseHeader, deleted=2 int64
RequestOp: request_range=1|RangeRequest, request_put=2|PutRequest, request_delete_range=3|DeleteRangeRequest
ResponseOp: response_range=1|RangeResponse, response_put=2|PutResponse, response_delete_range=3|DeleteRangeResponse
Compare: result=1 int32, target=2 int32, key=3 bytes, version=4|int64, create_revision=5|int64, mod_revision=6|int64,
  value=7|bytes, lease=8|int64, range_end=64 bytes
TxnRequest: compare=1 *Compare, success=2 *RequestOp, failure=3 *RequestOp
TxnResponse: header=1 ResponseHeader, succeeded=2 bool, responses=3 *ResponseOp
LeaseGrantRequest: TTL=1 int64
LeaseGrantResponse: header=1 ResponseHeader, ID=2 int64, TTL=3 int64
LeaseRevokeRequest: ID=1 int64
LeaseRevokeResponse: header=1 ResponseHeader
LeaseKeepAliveRequest: ID=1 int64
LeaseKeepAliveResponse: header=1 ResponseHeader, ID=2 int64, TTL=3 int64
LeaseTimeToLiveRequest: ID=1 int64, keys=2 bool
LeaseTimeToLiveResponse: header=1 ResponseHeader, ID=2 int64, TTL=3 int64, grantedTTL=4 int64, keys=5 *bytes
WatchCreateRequest: key=1 bytes, range_end=2 bytes, start_revision=3 int64, filters=5 *int32, watch_id=7 int64
WatchCancelRequest: watch_id=1 int64
WatchRequest: create_request=1|WatchCreateRequest, cancel_request=2|WatchCancelRequest
WatchResponse: header=1 ResponseHeader, watch_id=2 int64, created=3 bool, canceled=4 bool, compact_revision=5 int64,
  cancel_reason=6 string, events=11 *Event
StatusRequest:
StatusResponse: header=1 ResponseHeader, version=2 string, dbSize=3 int64, leader=4 uint64, raftTerm=6 uint64,
  errors=8 *string, dbSizeInUse=9 int64, dbSizeQuota=12 int64
AuthenticateRequest: name=1 string, password=2 string
AuthenticateResponse: header=1 ResponseHeader, token=2 string
"""
"""Facts of etcd's API: name=number type; ``*`` many, ``|`` one of those with a bar."""


def _made() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="celery_etcd_lock.proto", package="etcd", syntax="proto3")
    for line in _DESCRIPTION.replace("\n  ", " ").strip().splitlines():
        name, _, fields = line.partition(":")
        message = file.message_type.add(name=name)
        for description in filter(None, fields.strip().split(", ")):
            _add_field(message, description)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    # protobuf 4.22 has the function, releases before it the class.
    make = getattr(message_factory, "GetMessageClass", None) or message_factory.MessageFactory(pool).GetPrototype
    names = [message.name for message in file.message_type]
    return SimpleNamespace(**{name: make(pool.FindMessageTypeByName(f"etcd.{name}")) for name in names})


def _add_field(message: Any, description: str) -> None:
    name, _, rest = description.partition("=")
    number, one_of, kind = rest.partition("|")
    if not one_of:
        number, _, kind = rest.partition(" ")
    scalar = getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind.strip('*').upper()}", None)
    field = message.field.add(name=name, number=int(number), label=3 if kind.startswith("*") else 1)
    if scalar is None:
        field.type, field.type_name = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE, f".etcd.{kind.strip('*')}"
    else:
        field.type = scalar
    if one_of:
        if not message.oneof_decl:
            message.oneof_decl.add(name="one_of")
        field.oneof_index = 0


messages: Any = _made() if INSTALLED else None
"""The classes, as attributes. Made once, here: those of two pools do not go together."""


# -- to messages

_TARGETS = {"version": 0, "create": 1, "mod": 2, "value": 3, "lease": 4}
_OPERANDS = {"create": "create_revision", "mod": "mod_revision"}
_OPERATORS = {"==": 0, ">": 1, "<": 2, "!=": 3}
_SORT_TARGETS = {"key": 0, "create": 2, "mod": 3}


_KEPT = 256
"""Parts of transactions that are kept as bytes, the latest. Most of what is sent for a lock was sent for it before.
What holds a value is not kept (it may be large), nor what compares a create revision, which comes once. A mod revision
is a session's, and stays."""


def text_out(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


Fields: TypeAlias = "dict[str, Any]"
"""What a message is made of, by name. protobuf makes the whole from them at once: a third of the time that it takes
to make each part as a message and put them together."""


def _keys(key: str, range_end: str | None) -> Fields:
    if range_end is None:
        return {"key": text_out(key)}
    return {"key": text_out(key), "range_end": text_out(range_end)}


def _range_fields(request: Range) -> Fields:
    key, range_end, limit, revision, sort, descending, keys_only, count_only, max_create_revision = request
    fields = _keys(key, range_end)
    if limit:
        fields["limit"] = limit
    if revision:
        fields["revision"] = revision
    if sort or descending:
        fields["sort_order"] = 2 if descending else 1
        fields["sort_target"] = _SORT_TARGETS[sort or "key"]
    if keys_only:
        fields["keys_only"] = True
    if count_only:
        fields["count_only"] = True
    if max_create_revision:
        fields["max_create_revision"] = max_create_revision
    return fields


def range_out(request: Range) -> Message:
    return messages.RangeRequest(**_range_fields(request))


def delete_out(request: Delete) -> Message:
    return messages.DeleteRangeRequest(**_keys(request.key, request.range_end))


def _compare_fields(compare: Compare) -> Fields:
    key, target, operator, operand, range_end = compare
    wanted: type = bytes if target == "value" else int
    if not isinstance(operand, wanted):
        what = "a value is compared with bytes" if wanted is bytes else f"a {target} is compared with a number"
        raise TypeError(f"{what}, not {operand!r}")
    fields = _keys(key, range_end)
    fields["target"], fields["result"] = _TARGETS[target], _OPERATORS[operator]
    fields[_OPERANDS.get(target, target)] = operand
    return fields


def _operation_fields(operation: Operation) -> Fields:
    if isinstance(operation, Put):
        key, value, lease = operation
        return {"request_put": {"key": text_out(key), "value": value, "lease": lease}}
    if isinstance(operation, Range):
        return {"request_range": _range_fields(operation)}
    return {"request_delete_range": _keys(operation.key, operation.range_end)}


def _compare_out(compare: Compare) -> bytes:
    return bytes(messages.TxnRequest(compare=[_compare_fields(compare)]).SerializeToString())


def _operation_out(operation: Operation, branch: str) -> bytes:
    return bytes(messages.TxnRequest(**{branch: [_operation_fields(operation)]}).SerializeToString())


_kept_compare_out = lru_cache(maxsize=_KEPT)(_compare_out)
_kept_operation_out = lru_cache(maxsize=_KEPT)(_operation_out)


def txn_out(request: Txn) -> bytes:
    """Serialized: the parts one behind the other, which is what the whole is in protobuf."""
    parts = [
        (_compare_out if each.operand and each.target != "mod" else _kept_compare_out)(each) for each in request.compare
    ]
    for branch, operations in (("success", request.success), ("failure", request.failure)):
        parts += [
            (_operation_out if isinstance(each, Put) else _kept_operation_out)(each, branch) for each in operations
        ]
    return b"".join(parts)


def watch_out(request: Watch, watch_id: int) -> Message:
    create = messages.WatchCreateRequest(
        **_keys(request.key, request.range_end),
        start_revision=request.start_revision,
        filters=[0] if request.deletes_only else [],
        watch_id=watch_id,
    )
    return messages.WatchRequest(create_request=create)


def watch_cancel_out(watch_id: int) -> Message:
    return messages.WatchRequest(cancel_request=messages.WatchCancelRequest(watch_id=watch_id))


# -- from messages


def text_in(encoded: bytes) -> str:
    return encoded.decode("utf-8", "surrogateescape")


def header_in(reply: Message, unanswered: bool = False) -> Header:
    header = reply.header
    return Header(header.revision, header.raft_term, header.member_id, header.cluster_id, unanswered)


def _key_value_in(kv: Message) -> KeyValue:
    return KeyValue(text_in(kv.key), kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def range_in(reply: Message, header: Header) -> RangeReply:
    return RangeReply(header, tuple(map(_key_value_in, reply.kvs)), reply.count, reply.more)


def delete_in(reply: Message, header: Header) -> DeleteReply:
    return DeleteReply(header, reply.deleted)


def _operation_in(header: Header, reply: Message) -> OperationReply:
    if reply.HasField("response_put"):
        return PutReply(header)
    if reply.HasField("response_range"):
        return range_in(reply.response_range, header)
    return delete_in(reply.response_delete_range, header)


def txn_in(reply: Message, header: Header) -> TxnReply:
    return TxnReply(header, reply.succeeded, Replies(reply.responses, partial(_operation_in, header)))


def lease_in(reply: Message, header: Header) -> LeaseReply:
    return LeaseReply(header, reply.ID, max(0, reply.TTL))


def lease_keys_in(reply: Message, header: Header) -> LeaseKeys:
    return LeaseKeys(header, reply.ID, reply.TTL, reply.grantedTTL, tuple(map(text_in, reply.keys)))


def status_in(reply: Message, endpoint: str) -> Status:
    return Status(
        endpoint=endpoint,
        version=reply.version,
        db_size=reply.dbSize,
        db_size_in_use=reply.dbSizeInUse,
        leader=reply.leader,
        raft_term=reply.raftTerm,
        member_id=reply.header.member_id,
        revision=reply.header.revision,
        errors=tuple(reply.errors),
        db_size_quota=reply.dbSizeQuota,
    )


def watch_in(reply: Message) -> WatchReply:
    """One message of a watch. Raises what a canceled one means; `TokenRefused` and `NoAnswer` too."""
    if reply.canceled:
        raise watch_ended(reply.cancel_reason, reply.compact_revision)
    events = tuple(Event("delete" if event.type else "put", _key_value_in(event.kv)) for event in reply.events)
    return WatchReply(header_in(reply), events)
