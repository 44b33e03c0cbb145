"""The transport over a real `etcd3.Etcd3Client`. `test_client` runs this, where that package can be imported.

That is with protobuf in pure Python, so the contract suite is run on that too.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its generated code does is out of date
    import etcd3  # type: ignore[import-not-found,unused-ignore]

from google.protobuf.internal import api_implementation

from celery_etcd_lock.etcd.api import Put, Range, Txn, Watch
from celery_etcd_lock.etcd.grpc_client import ClientTransport
from celery_etcd_lock.exceptions import AuthRejected, EtcdUnavailable, LockContended
from celery_etcd_lock.locks import Mutex, RWLock, Semaphore, Session
from celery_etcd_lock.testing import EtcdServer
from tests.etcd.test_contract import *  # noqa: F403 - its tests, with the `store` below
from tests.etcd.test_contract import Store, compacting
from tests.etcd.test_gateway import etcdctl
from tests.workers import until


def lending(server: EtcdServer, made: list[Any] | None = None, **options: Any) -> Callable[[], Any]:
    """What a project writes: a function that makes a client."""
    parts = urlsplit(server.url)

    def lend() -> Any:
        client = etcd3.client(host=parts.hostname, port=parts.port, timeout=5, **options)
        if made is not None:
            made.append(client)
        return client

    return lend


@pytest.fixture  # type: ignore[no-redef] # in place of the suite's own
def store(etcd: EtcdServer, prefix: str) -> Iterator[Store]:
    """The contract suite's, on a lent channel."""
    transport = ClientTransport(lending(etcd))
    yield Store(transport, prefix, compacting(etcd.url))
    transport.close()


def test_in_pure_python() -> None:
    """As told: the positive control of this file."""
    assert api_implementation.Type() == "python"


def test_their_client_and_our_locks(etcd: EtcdServer, prefix: str) -> None:
    """Locks, watches and a crowd on the channel that the project goes on using, during our session and after it."""
    made: list[Any] = []
    counts = [0, 0]

    def come(session: Session) -> None:
        for _ in range(5):
            with Mutex(session, f"{prefix}lock").acquire(timeout=60):
                counts[0] += 1
                counts[1] = max(counts)
                time.sleep(0.005)
                counts[0] -= 1

    with Session.open(client=lending(etcd, made), ttl=5) as session, Session.open(etcd.url) as other:
        (client,) = made
        client.put(f"{prefix}theirs", "1")
        threads = [threading.Thread(target=come, args=[each]) for each in (session, session, other, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert counts == [0, 1]
        with (
            RWLock(session, f"{prefix}rw").read().acquire(),
            Semaphore(session, f"{prefix}s", limit=2).acquire() as held,
        ):
            assert held.is_held()
            assert client.get(held.key)[1].key.decode() == held.key
    deadline = time.monotonic() + 20
    while any(each.name in {"etcd-lock-watches", "etcd-lock-renewals"} for each in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert client.get(f"{prefix}theirs")[0] == b"1"  # and only now: whoever was the last could have closed it
    assert made == [client]
    client.close()


# -- user and password


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdServer]:
    """A server with a user; tokens live for two seconds."""
    with EtcdServer(extra_args=["--auth-token-ttl=2", "--bcrypt-cost=4"]) as server:
        etcdctl(server, "user", "add", "root:correct-horse")
        etcdctl(server, "user", "grant-role", "root", "root")
        etcdctl(server, "auth", "enable")
        yield server


ROOT: dict[str, Any] = {"user": "root", "password": "correct-horse"}


def test_a_mutex_held_longer_than_the_token_lives(guarded: EtcdServer, prefix: str) -> None:
    """The client is asked for once more, the lock stays ours, and its watch goes on; nobody else gets in meanwhile."""
    made: list[Any] = []
    with (
        Session.open(client=lending(guarded, made, **ROOT), ttl=3) as session,
        Session.open(guarded.url, username="root", password="correct-horse") as other,
    ):
        assert len(made) == 1
        stream = session.transport.watch(Watch(f"{prefix}news"))
        assert next(iter(stream)).events == ()
        with Mutex(session, f"{prefix}lock").acquire() as held:
            time.sleep(6)  # the tokens' two seconds, of which a look at them would make more; and two leases' time
            assert held.is_held()
            with pytest.raises(LockContended):
                Mutex(other, f"{prefix}lock").acquire(blocking=False)
        assert 1 < len(made) < 8
        other.transport.txn(Txn([], [Put(f"{prefix}news", b"")]))
        assert next(iter(stream)).events[0].kv.key == f"{prefix}news"
        with Mutex(other, f"{prefix}lock").acquire(timeout=20):
            waiting = threading.Thread(target=lambda: Mutex(session, f"{prefix}lock").acquire(timeout=60).release())
            waiting.start()
            time.sleep(3)  # as long as a token lives, and more
        waiting.join(60)
        assert not waiting.is_alive()
        assert not session.lost


def test_a_client_that_is_always_the_same(guarded: EtcdServer, prefix: str) -> None:
    """etcd3 renews no token: once it has ended, the error says what the function should do, and does not retry."""
    client = lending(guarded, **ROOT)()
    with closing(ClientTransport(lambda: client, timeout=60)) as transport:
        transport.range(Range(prefix))
        time.sleep(4)
        begun = time.monotonic()
        with pytest.raises(AuthRejected, match="make a new client each time"):
            transport.range(Range(prefix))
        assert time.monotonic() - begun < 20
    client.close()


def test_credentials_that_are_wrong(guarded: EtcdServer, etcd: EtcdServer, prefix: str) -> None:
    """A wrong password, none, and one where there are no users: `AuthRejected`, which does not repeat it."""
    wrong = lending(guarded, user="root", password="wrong-horse")
    for lend, says in ((wrong, "authentication failed"), (lending(guarded), "refuses its token"),
                       (lending(etcd, **ROOT), "authentication is not enabled")):  # fmt: skip
        with closing(ClientTransport(lend, timeout=60)) as transport:
            for _ in range(2):
                with pytest.raises(AuthRejected, match=says) as error:
                    transport.range(Range(prefix))
                assert "horse" not in str(error.value)


def test_a_server_that_hangs(prefix: str) -> None:
    """Making the client logs in, which hangs: our timeout holds all the same, and afterwards all is well."""
    with EtcdServer(extra_args=["--bcrypt-cost=4"]) as server:
        lend = lending(server)
        with closing(ClientTransport(lend, timeout=1)) as transport:
            transport.range(Range(prefix), timeout=20)
            server.pause()
            begun = time.monotonic()
            with pytest.raises(EtcdUnavailable):
                transport.range(Range(prefix))
            assert time.monotonic() - begun < 5
            server.resume()
            assert transport.range(Range(prefix), timeout=20).kvs == ()
            server.kill()
            with pytest.raises(EtcdUnavailable):
                transport.range(Range(prefix))
            server.start()
            until(
                lambda: answers(transport, prefix), "an answer: gRPC's channel pauses between two attempts to connect"
            )


def answers(transport: ClientTransport, prefix: str) -> bool:
    try:
        return transport.range(Range(prefix), timeout=20).kvs == ()
    except EtcdUnavailable:
        return False
