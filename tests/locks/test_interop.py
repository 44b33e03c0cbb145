"""Beside etcd's own tools on the same names: etcdctl lock, etcdctl elect, and the server's Lock and Election RPCs."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import urllib3

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.exceptions import LockContended
from celery_etcd_lock.locks import Election, Lock, Mutex, RWLock, Semaphore, Session
from celery_etcd_lock.testing import EtcdServer
from tests.contenders.driver import Waiting, keys
from tests.servers import skip_or_fail
from tests.workers import until


@pytest.fixture
def session(etcd: EtcdServer) -> Iterator[Session]:
    transport = connect(etcd.url)
    with Session(transport, ttl=30) as opened:
        yield opened
    transport.close()


@pytest.fixture
def etcdctl(etcd: EtcdServer, tmp_path: Path) -> Callable[..., Any]:
    """Runs etcdctl for the length of a ``with`` block, which gets what it prints, line by line."""
    program = etcd.etcdctl
    if program is None:
        skip_or_fail("there is no etcdctl on this machine")
    runs = 0

    @contextmanager
    def run(*arguments: str) -> Iterator[Callable[[], list[str]]]:
        nonlocal runs
        runs += 1
        printed = tmp_path / f"etcdctl-{runs}"
        environment = {**os.environ, "ETCDCTL_API": "3"}
        with printed.open("wb") as output:
            process = subprocess.Popen(
                [program, f"--endpoints={etcd.url}", *arguments], stdout=output, stderr=output, env=environment
            )
            try:
                yield lambda: printed.read_text().splitlines()
            finally:
                process.send_signal(signal.SIGINT)  # as somebody at a terminal ends it: it gives up its key
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    return run


@pytest.fixture
def rpc(etcd: EtcdServer) -> Iterator[Callable[..., Any]]:
    """Calls the server's JSON gateway; texts go and come as base64."""
    pool = urllib3.PoolManager()

    def call(path: str, **fields: Any) -> Any:
        body = {key: _b64(value) if isinstance(value, str) else value for key, value in fields.items()}
        reply = pool.request("POST", etcd.url + path, body=json.dumps(body), timeout=30, retries=False)
        assert reply.status == 200, reply.data
        return json.loads(reply.data)

    yield call
    pool.clear()


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode()


LOCKS = pytest.mark.parametrize(
    "lock",
    [
        Mutex,
        lambda session, name: RWLock(session, name).read(),
        lambda session, name: Semaphore(session, name, limit=9),
    ],
    ids=["mutex", "read", "slot"],
)


class TestLocks:
    @LOCKS
    def test_etcdctl_lock_excludes_us_and_we_it(
        self, session: Session, etcdctl: Callable[..., Any], prefix: str, lock: Callable[..., Lock]
    ) -> None:
        """Its holder is a writer to every kind of ours; behind ours it waits; both queue in order."""
        name = prefix + "a"
        ours = lock(session, name)
        with etcdctl("lock", name) as printed:
            until(lambda: printed() and printed()[:1] == keys(session, name), "etcdctl's lock")
            with pytest.raises(LockContended, match="another etcd client"):
                ours.acquire(blocking=False)
            waiting = Waiting(ours.acquire)
            until(lambda: len(keys(session, name)) == 2, "our contender")
        held = waiting.get()
        assert held.is_held()
        with etcdctl("lock", name) as printed:
            until(lambda: len(keys(session, name)) == 2, "etcdctl's contender")
            assert printed() == []
            held.release()
            until(lambda: printed() and printed()[:1] == keys(session, name), "etcdctl's lock")

    @LOCKS
    def test_the_lock_rpc_excludes_us_and_we_it(
        self, session: Session, rpc: Callable[..., Any], prefix: str, lock: Callable[..., Lock]
    ) -> None:
        """The same for the server's own Lock and Unlock."""
        name = prefix + "a"
        ours = lock(session, name)
        lease = int(rpc("/v3/lease/grant", TTL=60)["ID"])
        key = _text(rpc("/v3/lock/lock", name=name, lease=lease)["key"])
        assert keys(session, name) == [key]
        with pytest.raises(LockContended):
            ours.acquire(blocking=False)
        waiting = Waiting(ours.acquire)
        until(lambda: len(keys(session, name)) == 2, "our contender")
        rpc("/v3/lock/unlock", key=key)
        held = waiting.get()
        theirs = Waiting(lambda: rpc("/v3/lock/lock", name=name, lease=lease))
        until(lambda: len(keys(session, name)) == 2, "its contender")
        assert theirs.thread.is_alive()
        held.release()
        assert keys(session, name) == [_text(theirs.get()["key"])]
        rpc("/v3/lease/revoke", ID=lease)
        assert ours.acquire(blocking=False).release() == "released"


class TestElections:
    def test_etcdctl_elect_stands_in_our_elections(
        self, session: Session, etcdctl: Callable[..., Any], prefix: str
    ) -> None:
        """It follows us and we follow it; each sees what the other proclaims, as it was said."""
        name = prefix + "a"
        election = Election(session, name)
        leadership = election.campaign("ours")
        with etcdctl("elect", name, "theirs") as printed:
            until(lambda: len(keys(session, name)) == 2, "etcdctl's candidacy")
            assert printed() == []
            leadership.resign()
            until(lambda: len(printed()) == 2, "etcdctl's election")
            leader = election.leader()
            assert leader is not None
            assert printed() == [leader.key, "theirs"]
            assert leader.value == "theirs"
            ours = Waiting(lambda: election.campaign("ours again"))
            until(lambda: len(keys(session, name)) == 2, "our candidacy")
        leadership = ours.get()
        assert leadership.is_held()
        leadership.resign()

    def test_etcdctl_observes_what_we_proclaim(
        self, session: Session, etcdctl: Callable[..., Any], prefix: str
    ) -> None:
        """``etcdctl elect --listen`` prints our key with each value."""
        name = prefix + "a"
        with Election(session, name).campaign("one") as leadership, etcdctl("elect", "--listen", name) as printed:
            until(lambda: printed() == [leadership.key, "one"], "the first value")
            leadership.proclaim("two")
            until(lambda: printed() == [leadership.key, "one", leadership.key, "two"], "the second value")

    def test_we_observe_what_the_election_rpc_proclaims(
        self, session: Session, rpc: Callable[..., Any], prefix: str
    ) -> None:
        """A leader by the server's own Election, its proclamation, and ours after it; and its Leader is ours."""
        name = prefix + "a"
        election = Election(session, name)
        lease = int(rpc("/v3/lease/grant", TTL=60)["ID"])
        with election.observe() as leaders:
            theirs = rpc("/v3/election/campaign", name=name, lease=lease, value="one")["leader"]
            assert next(leaders).value == "one"
            rpc("/v3/election/proclaim", leader=theirs, value="two")
            assert next(leaders).value == "two"
            candidacy = Waiting(lambda: election.campaign("ours"))
            until(lambda: len(keys(session, name)) == 2, "our candidacy")
            rpc("/v3/election/resign", leader=theirs)
            assert next(leaders).value == "ours"
            with candidacy.get() as leadership:
                said = rpc("/v3/election/leader", name=name)["kv"]
                assert (_text(said["key"]), _text(said["value"])) == (leadership.key, "ours")
                assert int(said["create_revision"]) <= leadership.fencing_token
