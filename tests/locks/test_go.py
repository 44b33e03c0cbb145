"""Beside etcd's own Go client on the same names: ``concurrency.Mutex`` and ``Election``, and the RWMutex recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Put, Range, Txn
from celery_etcd_lock.exceptions import LockContended
from celery_etcd_lock.locks import Election, Lock, Mutex, RWLock, Semaphore, Session
from celery_etcd_lock.testing import EtcdServer
from tests.contenders.driver import PYTHON, Contender, Waiting, keys
from tests.contenders.main import count
from tests.workers import until

Start = Callable[..., Contender]
_GONE = -1
"""The TTL of a lease that is no more."""


@pytest.fixture
def session(etcd: EtcdServer) -> Iterator[Session]:
    transport = connect(etcd.url)
    with Session(transport, ttl=30) as opened:
        yield opened
    transport.close()


@pytest.fixture
def start_python(etcd: EtcdServer, tmp_path: Path) -> Iterator[Start]:
    """Starts processes that contend with this package, and kills them at the end."""
    with ExitStack() as started:

        def start(*, ttl: int = 60) -> Contender:
            return started.enter_context(Contender(PYTHON, etcd.url, tmp_path, ttl=ttl))

        yield start


@pytest.fixture
def start_go(go_contender: Path, etcd: EtcdServer, tmp_path: Path) -> Iterator[Start]:
    """The same with Go's."""
    with ExitStack() as started:

        def start(*, ttl: int = 60) -> Contender:
            return started.enter_context(Contender([go_contender], etcd.url, tmp_path, ttl=ttl))

        yield start


def ready(contender: Contender) -> Contender:
    contender.expect("ready")
    return contender


def in_line(session: Session, name: str, number: int) -> None:
    """Wait until so many contend for `name`."""
    until(lambda: len(keys(session, name)) == number, f"contender {number}")


class TestMutex:
    @pytest.mark.parametrize(
        "lock",
        [
            Mutex,
            lambda session, name: RWLock(session, name).read(),
            lambda session, name: Semaphore(session, name, limit=9),
        ],
        ids=["mutex", "read", "slot"],
    )
    def test_go_excludes_us_and_we_it(
        self, session: Session, start_go: Start, prefix: str, lock: Callable[..., Lock]
    ) -> None:
        """Its holder is a writer to every kind of ours until its Unlock; behind ours it waits for our release."""
        name = prefix + "a"
        ours, go = lock(session, name), ready(start_go())
        go.tell("lock", name)
        key = go.expect("held")["key"]
        assert keys(session, name) == [key]
        with pytest.raises(LockContended, match="another etcd client"):
            ours.acquire(blocking=False)
        waiting = Waiting(ours.acquire)
        in_line(session, name, 2)
        assert waiting.thread.is_alive()
        go.tell("unlock")
        go.expect("released")
        held = waiting.get()
        assert held.is_held()
        go.tell("lock", name)
        in_line(session, name, 2)
        assert len(go.events()) == 3
        held.release()
        theirs = go.expect("held")
        assert keys(session, name) == [theirs["key"]]
        assert theirs["token"] > held.fencing_token

    def test_four_of_both_take_turns_in_the_order_of_their_keys(
        self, session: Session, start_go: Start, start_python: Start, prefix: str
    ) -> None:
        """Whoever's key has the lower create revision goes first, tokens grow from each to the next, none overlap."""
        name = prefix + "a"
        first = Mutex(session, name).acquire()
        waiting = [ready(start()) for start in (start_go, start_python, start_go, start_python)]
        for number, contender in enumerate(waiting, 2):
            contender.tell("lock", name)
            in_line(session, name, number)
        order, tokens, turns = keys(session, name)[1:], [first.fencing_token], []
        first.release()
        for key, contender in zip(order, waiting, strict=True):
            held = contender.expect("held")
            assert held["key"] == key
            assert keys(session, name) == order[order.index(key) :]
            contender.tell("unlock")
            tokens.append(held["token"])
            turns.append((held["at"], contender.expect("released")["until"]))
        assert all(early < late for early, late in pairwise(tokens))
        assert all(early[1] < late[0] for early, late in pairwise(turns))

    def test_what_a_killed_go_holder_had_is_ours_after_its_lease(
        self, session: Session, start_go: Start, prefix: str
    ) -> None:
        """SIGKILL leaves its key until its lease ends; then we have the lock."""
        name = prefix + "a"
        go = start_go(ttl=2)
        lease = int(go.expect("ready")["lease"], 16)
        go.tell("lock", name)
        go.expect("held")
        waiting = Waiting(Mutex(session, name).acquire)
        in_line(session, name, 2)
        go.kill()
        with waiting.get() as held:
            assert keys(session, name) == [held.key]
            assert session.transport.lease_time_to_live(lease).ttl == _GONE

    def test_what_a_killed_holder_of_ours_had_is_gos_after_its_lease(
        self, session: Session, start_go: Start, start_python: Start, prefix: str
    ) -> None:
        """The same the other way round."""
        name = prefix + "a"
        ours, go = start_python(ttl=2), ready(start_go())
        lease = int(ours.expect("ready")["lease"], 16)
        ours.tell("lock", name)
        token = ours.expect("held")["token"]
        go.tell("lock", name)
        in_line(session, name, 2)
        ours.kill()
        assert go.expect("held")["token"] > token
        assert session.transport.lease_time_to_live(lease).ttl == _GONE

    @pytest.mark.parametrize("locked", [True, False], ids=["locked", "control"])
    def test_a_crowd_of_both_loses_no_count(
        self, session: Session, start_go: Start, start_python: Start, prefix: str, locked: bool
    ) -> None:
        """Threads and processes of both add to one number, each with a read and a put: none is lost.

        Control: with nobody locking some are, sooner or later.
        """
        name, key, times = prefix + "a" if locked else "-", prefix + "number", 15
        processes = [ready(start()) for start in (start_go, start_go, start_python)]

        def lost() -> int:
            session.transport.txn(Txn([], [Put(key, b"0")]))
            for process in processes:
                process.tell("count", name, key, times)
            threads = [Waiting(partial(count, session, name, key, times)) for _ in range(3)]
            for process in processes:
                process.expect("counted")
            for thread in threads:
                thread.get()
            return times * 6 - int(session.transport.range(Range(key)).kvs[0].value)

        if locked:
            assert lost() == 0
        else:
            until(lost, "a lost count")


class TestElection:
    def test_both_stand_in_one_election_and_see_each_others_values(
        self, session: Session, start_go: Start, prefix: str
    ) -> None:
        """Each follows when the other resigns; each observes every leader, and what it proclaims."""
        name = prefix + "a"
        election, go, watcher = Election(session, name), ready(start_go()), ready(start_go())

        def go_sees(key: str, value: str) -> None:
            seen = watcher.expect("leader")
            assert (seen["key"], seen["value"]) == (key, value)

        ours = election.campaign("ours")
        watcher.tell("observe", name)
        go_sees(ours.key, "ours")
        ours.proclaim("ours-still")
        go_sees(ours.key, "ours-still")
        go.tell("campaign", name, "theirs")
        in_line(session, name, 2)
        assert not go.said("elected")
        with election.observe() as leaders:
            assert next(leaders).value == "ours-still"
            ours.resign()
            theirs = go.expect("elected")
            go_sees(theirs["key"], "theirs")
            leader = next(leaders)
            assert (leader.key, leader.value, leader.create_revision) == (theirs["key"], "theirs", theirs["created"])
            go.tell("proclaim", "theirs-still")
            go.expect("proclaimed")
            go_sees(theirs["key"], "theirs-still")
            assert next(leaders).value == "theirs-still"
            candidacy = Waiting(lambda: election.campaign("ours-again"))
            in_line(session, name, 2)
            assert candidacy.thread.is_alive()
            go.tell("resign")
            go.expect("resigned")
            with candidacy.get() as ours:
                go_sees(ours.key, "ours-again")
                assert next(leaders).key == ours.key

    def test_a_go_leaders_revision_is_no_token_beside_ours(
        self, session: Session, start_go: Start, prefix: str
    ) -> None:
        """Its ``Rev`` is from when it joined, and so may be lower than the token of the leader before it."""
        name = prefix + "a"
        election, go = Election(session, name), ready(start_go())
        first = election.campaign("first")
        candidacy = Waiting(lambda: election.campaign("second"))
        in_line(session, name, 2)
        go.tell("campaign", name, "third")
        in_line(session, name, 3)
        first.resign()
        second = candidacy.get()
        second.resign()
        assert first.fencing_token < go.expect("elected")["created"] < second.fencing_token


class TestRWMutex:
    """Nothing is promised of the recipe, but the docs say what is so."""

    def test_its_readers_and_writers_are_ours(self, session: Session, start_go: Start, prefix: str) -> None:
        """Readers of both go in together and keep writers of both out; a writer of either keeps all out."""
        name = prefix + "a"
        lock, reader, writer = RWLock(session, name), ready(start_go()), ready(start_go())
        held = lock.read().acquire()
        reader.tell("read", name)
        reader.expect("held")
        writer.tell("write", name)
        in_line(session, name, 3)
        waiting = Waiting(lock.read().acquire)
        in_line(session, name, 4)
        held.release()
        assert not writer.said("held")
        reader.tell("unlock")
        reader.expect("released")
        writer.expect("held")
        assert waiting.thread.is_alive()
        writer.tell("unlock")
        waiting.get().release()
        with lock.write():
            reader.tell("read", name)
            in_line(session, name, 2)
            assert [event["event"] for event in reader.events()] == ["ready", "held", "released"]
        reader.expect("held")
        with pytest.raises(LockContended):
            lock.write().acquire(blocking=False)

    def test_its_readers_overlook_slots_and_gos_own_mutex(self, session: Session, start_go: Start, prefix: str) -> None:
        """They look for writers under ``NAME/write`` only."""
        reader, mutex = ready(start_go()), ready(start_go())
        for name in (prefix + "a", prefix + "b"):
            if name.endswith("a"):
                Semaphore(session, name, limit=1).acquire()
            else:
                mutex.tell("lock", name)
                mutex.expect("held")
            reader.tell("read", name)
            reader.expect("held")
            reader.tell("unlock")
            reader.expect("released")
