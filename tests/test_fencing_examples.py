"""The examples of docs/fencing.md, as they stand there: run, and then met by a holder that was frozen and goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_etcd_lock import LockLost
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Put, Range
from celery_etcd_lock.locks import HeldLock, Mutex, Session
from celery_etcd_lock.testing import EtcdServer
from tests.servers import RedisNotFound, RedisServer, skip_or_fail

_TEXT = (Path(__file__).resolve().parent.parent / "docs" / "fencing.md").read_text()
_EXAMPLES = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.+?)^```", _TEXT, re.MULTILINE | re.DOTALL))


def example(title: str, **given: Any) -> dict[str, Any]:
    """What the example under that heading leaves behind."""
    names = dict(given)
    exec(compile(_EXAMPLES[title], f"docs/fencing.md: {title}", "exec"), names)
    return names


@pytest.fixture
def frozen_and_next(etcd: EtcdServer, prefix: str) -> Iterator[tuple[HeldLock, HeldLock]]:
    """A holder that does not know that its lease has ended, as one that was frozen, and the next one."""
    transport = connect(etcd.url)
    frozen = Session(transport, ttl=30, background=False)
    held = Mutex(frozen, prefix + "a").acquire()
    transport.lease_revoke(frozen.lease)
    with Session(transport, ttl=30) as session, Mutex(session, prefix + "a").acquire(timeout=10) as following:
        assert held.is_held(), "it has not heard of it"
        assert following.fencing_token > held.fencing_token
        yield held, following
    transport.close()


def test_every_example_is_tested() -> None:
    """There are three, and each has a test below."""
    assert list(_EXAMPLES) == ["Something in the same etcd", "A row in a SQL database", "A key in Redis"]


def test_in_etcd(etcd: EtcdServer, frozen_and_next: tuple[HeldLock, HeldLock], prefix: str) -> None:
    """The transaction of the frozen holder is refused even before the next one has written anything."""
    frozen, following = frozen_and_next
    names = example("Something in the same etcd", etcd_url=etcd.url)
    client, publish, key = names["etcd"], names["publish"], prefix + "config"
    assert client.range(Range("/config/routes")).kvs[0].value == b"v1"
    with pytest.raises(LockLost):
        publish(key, b"late", frozen)
    publish(key, b"next", following)
    publish(key, b"next again", following)
    with pytest.raises(LockLost):
        publish(key, b"late", frozen)
    assert client.range(Range(key)).kvs[0].value == b"next again"
    unfenced = client.txn(names["Txn"]([], [Put(key, b"late")]))
    assert unfenced.succeeded, "control: without the condition nothing refuses it"
    client.close()


def test_in_sql(etcd: EtcdServer, frozen_and_next: tuple[HeldLock, HeldLock], tmp_path: Path) -> None:
    """The UPDATE with the older token changes no row, from the moment the next holder has claimed it."""
    frozen, following = frozen_and_next
    # The example's own lock is another, with tokens of the same etcd: its balance is written by the latest of all.
    names = example("A row in a SQL database", etcd_url=etcd.url, db_path=tmp_path / "bank")
    database, claim, set_balance = names["db"], names["claim"], names["set_balance"]

    def row() -> Any:
        return database.execute("SELECT balance, token FROM account WHERE id = 7").fetchone()

    assert row() == (100, names["held"].fencing_token)
    with database:
        database.execute("UPDATE account SET token = 0, balance = 0")
    set_balance(7, 1, frozen.fencing_token)
    set_balance(7, 2, frozen.fencing_token)
    claim(7, following.fencing_token)
    for attempt in (lambda: set_balance(7, 3, frozen.fencing_token), lambda: claim(7, frozen.fencing_token)):
        with pytest.raises(LockLost):
            attempt()
    assert row() == (2, following.fencing_token)
    set_balance(7, 4, following.fencing_token)
    with pytest.raises(LockLost):
        set_balance(7, 5, frozen.fencing_token)
    assert row() == (4, following.fencing_token)
    with database:
        late = database.execute("UPDATE account SET balance = 5 WHERE id = 7")
    assert late.rowcount == 1, "control: without the token nothing refuses it"
    database.close()


def test_in_redis(etcd: EtcdServer, frozen_and_next: tuple[HeldLock, HeldLock]) -> None:
    """The script refuses the older token."""
    frozen, following = frozen_and_next
    try:
        server = RedisServer()
    except RedisNotFound as missing:
        skip_or_fail(missing)
    with server:
        names = example("A key in Redis", etcd_url=etcd.url, redis_url=server.url)
        client, set_value = names["client"], names["set_value"]
        assert client.hget("report", "value") == b"v1"
        set_value("a", "first", frozen.fencing_token)
        set_value("a", "next", following.fencing_token)
        with pytest.raises(LockLost):
            set_value("a", "late", frozen.fencing_token)
        assert client.hgetall("a") == {b"token": b"%d" % following.fencing_token, b"value": b"next"}
        set_value("a", "next again", following.fencing_token)
        client.close()
