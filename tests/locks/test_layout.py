"""The layout of what is in etcd: public, the same in every version, because a rolling deploy mixes them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable

import pytest

from celery_etcd_lock.etcd.api import Range, prefix_end
from celery_etcd_lock.locks import Election, Mutex, RWLock, Semaphore, Session
from celery_etcd_lock.locks.queue import contender_key, is_contender


@pytest.mark.parametrize(
    ("number", "key"), [(0, "/a/b/write/694d8b2"), (1, "/a/b/write/694d8b2-1"), (12, "/a/b/write/694d8b2-12")]
)
def test_the_keys_of_contenders(number: int, key: str) -> None:
    """The lock's name, the kind, the lease in hex, and a number from the second on."""
    assert contender_key("/a/b", "write", 0x694D8B2, number) == key
    assert is_contender(key, 0x694D8B2)
    assert not is_contender(key, 0x694D8B)


def test_what_is_in_etcd_while_a_lock_is_held(open_session: Callable[..., Session], prefix: str) -> None:
    """One contender that says who it is, and the session's own key, both on the session's lease."""
    session = open_session()
    with Mutex(session, prefix + "a").acquire() as held:
        (contender,) = session.transport.range(Range(prefix, prefix_end(prefix))).kvs
        (own,) = session.transport.range(Range(session.key)).kvs
    assert contender.key == held.key == f"{prefix}a/write/{session.lease:x}"
    assert contender.lease == own.lease == session.lease
    value = json.loads(contender.value)
    assert list(value) == ["host", "pid", "since", "nonce"]
    assert value["pid"] == os.getpid()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", value["since"])
    assert re.fullmatch(r"[0-9a-f]{12}", value["nonce"])
    assert re.fullmatch(rf"/celery/sessions/[0-9a-f]{{8}}/{os.getpid()}-{session.lease:x}", own.key)
    assert list(json.loads(own.value)) == ["host", "pid", "start"]


def test_the_folders_of_the_other_kinds(open_session: Callable[..., Session], prefix: str) -> None:
    """Readers and slots have folders of their own; a candidate is where a writer is, its value as proclaimed."""
    session = open_session()
    lease = f"{session.lease:x}"
    with RWLock(session, prefix + "a").read() as one, RWLock(session, prefix + "a").read() as two:
        assert (one.key, two.key) == (f"{prefix}a/read/{lease}", f"{prefix}a/read/{lease}-1")
    with RWLock(session, prefix + "a").write() as writer:
        assert writer.key == f"{prefix}a/write/{lease}"
    with Semaphore(session, prefix + "a", limit=2) as slot:
        assert slot.key == f"{prefix}a/slot/{lease}"
    with Election(session, prefix + "a").campaign("host-1") as leadership:
        assert leadership.key == f"{prefix}a/write/{lease}"
        assert session.transport.range(Range(leadership.key)).kvs[0].value == b"host-1"
