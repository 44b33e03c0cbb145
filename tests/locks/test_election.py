"""The election, on every transport."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from celery_etcd_lock.etcd.api import Compare, Delete, Put, Range, Txn
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.exceptions import EtcdUnavailable, LockContended, LockLost, LockTimeout
from celery_etcd_lock.locks import Election, Leader, Leadership, Session
from tests.workers import until

OpenSession = Callable[..., Session]


class Campaign:
    """One campaign, in a thread of its own."""

    def __init__(self, election: Election, value: str) -> None:
        self.leadership: Leadership | None = None
        self.thread = threading.Thread(target=self._run, args=(election, value), daemon=True)
        self.thread.start()

    def _run(self, election: Election, value: str) -> None:
        self.leadership = election.campaign(value)

    def result(self) -> Leadership:
        self.thread.join(30)
        assert self.leadership is not None
        return self.leadership


def candidates(session: Session, name: str) -> int:
    return session.transport.range(Range(name + "/", name + "0", count_only=True)).count


def leads(election: Election) -> Leader:
    leader = election.leader()
    assert leader is not None
    return leader


class TestTransactions:
    def test_the_leaders_are_carried_out(self, open_session: OpenSession, prefix: str) -> None:
        """The replies are to the transaction alone, whichever branch is taken."""
        leadership = Election(open_session(ttl=30), prefix + "a").campaign()
        key = prefix + "written"
        absent = Compare(key, "create", "==", 0)
        done = leadership.txn(Txn([absent], [Put(key, b"1"), Range(key)], [Range(key)]))
        assert done.succeeded
        assert done.range(1).kvs[0].value == b"1"
        again = leadership.txn(Txn([absent], [Put(key, b"2")], [Range(key)]))
        assert not again.succeeded
        assert len(again.responses) == 1
        assert again.range(0).kvs[0].value == b"1"
        assert leadership.is_held()

    def test_nobody_elses_are(self, open_session: OpenSession, prefix: str) -> None:
        """`LockLost`, and nothing is written, by one whose key is gone, whether it knows that or not."""
        session = open_session(ttl=30)
        leadership = Election(session, prefix + "a").campaign()
        session.transport.delete(Delete(leadership.key))
        assert leadership.is_held(), "nobody has told it"
        with pytest.raises(LockLost, match="was deleted"):
            leadership.txn(Txn([], [Put(prefix + "written", b"1")]))
        assert not leadership.is_held()
        with pytest.raises(LockLost):
            leadership.txn(Txn([], [Put(prefix + "written", b"1")]))
        assert session.transport.range(Range(prefix + "written")).count == 0


class TestCampaign:
    def test_one_leads_and_the_next_follows_in_order(self, open_session: OpenSession, prefix: str) -> None:
        """Candidates lead one after the other, in the order in which they stood; tokens grow."""
        elections = [Election(open_session(ttl=30), prefix + "a") for _ in range(2)]
        assert elections[0].leader() is None
        first = elections[0].campaign("zero")
        later = []
        for number in range(1, 5):
            later.append(Campaign(elections[number % 2], f"candidate {number}"))
            until(lambda number=number: candidates(elections[0].session, prefix + "a") == number + 1)  # type: ignore[misc]
        assert leads(elections[1]).value == "zero"
        assert leads(elections[1]).key == first.key
        tokens = [first.fencing_token]
        assert first.resign() == "released"
        for number, each in enumerate(later, 1):
            leadership = each.result()
            assert leads(elections[0]).value == f"candidate {number}"
            assert [other.leadership for other in later[number:]] == [None] * (4 - number)
            tokens.append(leadership.fencing_token)
            leadership.resign()
        assert tokens == sorted(set(tokens))
        assert elections[0].leader() is None

    def test_refused_or_late_is_no_candidate(self, open_session: OpenSession, prefix: str) -> None:
        """A try and a timed campaign that fail leave no candidate; the value is the key's, as it is."""
        one, other = (Election(open_session(), prefix + "a") for _ in range(2))
        with one.campaign("Grüße\n") as leadership:
            with pytest.raises(LockContended):
                other.campaign(blocking=False)
            with pytest.raises(LockTimeout):
                other.campaign("late", timeout=0.2)
            assert candidates(one.session, prefix + "a") == 1
            assert one.session.transport.range(Range(leadership.key)).kvs[0].value == "Grüße\n".encode()
            assert leads(other).value == "Grüße\n"
        assert other.leader() is None

    def test_costs_one_request(self, open_session: OpenSession, prefix: str) -> None:
        """An uncontended campaign, a proclamation and a resignation are one request each."""
        session = open_session(ttl=30)
        transport: Any = session.transport
        before = transport.requests
        leadership = Election(session, prefix + "a").campaign("x")
        leadership.proclaim("y")
        leadership.resign()
        assert transport.requests - before == 3

    def test_an_unanswered_candidacy_is_taken_for_its_own(self) -> None:
        """The answer to the put is lost; the next try finds the candidate there, and leads with that very key."""
        transport = MemoryTransport(MemoryEtcd())
        session = Session(transport, ttl=30, background=False)
        real = transport.txn
        lost: list[Any] = []

        def tried_twice(request: Txn, *, timeout: float | None = None) -> Any:
            if not lost and any(isinstance(each, Put) and each.value == b"me" for each in request.success):
                lost.append(real(request, timeout=timeout))
            return real(request, timeout=timeout)

        transport.txn = tried_twice  # type: ignore[method-assign]
        for blocking in (True, False):
            lost.clear()
            leadership = Election(session, "/a").campaign("me", blocking=blocking)
            assert lost
            assert candidates(session, "/a") == 1
            assert leads(Election(session, "/a")).key == leadership.key
            leadership.resign()


class TestLeadership:
    def test_proclaims_under_the_same_leadership(self, open_session: OpenSession, prefix: str) -> None:
        """A new value, on the same lease, with the create revision and so the compare as before."""
        session = open_session()
        election = Election(session, prefix + "a")
        with election.campaign("one") as leadership:
            before = leads(election)
            for value in ("two", "", "three"):
                leadership.proclaim(value)
                after = leads(election)
                assert after.value == value
                assert (after.key, after.create_revision, after.lease) == (
                    before.key,
                    before.create_revision,
                    session.lease,
                )
            assert session.transport.txn(Txn([leadership.compare()], [Put(prefix + "mine", b"1")])).succeeded
        with pytest.raises(LockLost, match="released"):
            leadership.proclaim("four")
        assert not session.transport.txn(Txn([leadership.compare()], [Put(prefix + "mine", b"2")])).succeeded

    def test_a_leadership_deleted_by_hand_cannot_proclaim(self, open_session: OpenSession, prefix: str) -> None:
        """Whose key is gone is told so by the attempt, and puts nothing."""
        session = open_session(ttl=30)
        election = Election(session, prefix + "a")
        leadership = election.campaign("one")
        session.transport.delete(Delete(leadership.key))
        with pytest.raises(LockLost, match="deleted"):
            leadership.proclaim("two")
        assert not leadership.is_held()
        assert election.leader() is None

    def test_a_late_proclamation_takes_nothing_back(self) -> None:
        """One that got no answer and is carried out after the next one does nothing; before it, no harm."""
        transport = MemoryTransport(MemoryEtcd())
        session = Session(transport, ttl=30, background=False)
        election = Election(session, "/a")
        leadership = election.campaign("one")
        stuck: list[Txn] = []

        def black_hole(_verb: str, request: Any) -> None:
            stuck.append(request)
            raise EtcdUnavailable("staged", True)

        transport.before = black_hole
        with pytest.raises(EtcdUnavailable):
            leadership.proclaim("two")
        transport.before = None
        leadership.proclaim("three")
        assert not transport.txn(stuck[0]).succeeded
        assert leads(election).value == "three"

        transport.before = black_hole
        with pytest.raises(EtcdUnavailable):
            leadership.proclaim("four")
        transport.before = None
        assert transport.txn(stuck[1]).succeeded
        leadership.proclaim("five")
        assert leads(election).value == "five"


class Observer:
    """Reads an observation in a thread of its own."""

    def __init__(self, election: Election) -> None:
        self.seen: list[Leader] = []
        self.error: Exception | None = None
        self.observation = election.observe()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            for leader in self.observation:
                self.seen.append(leader)
        except Exception as error:  # noqa: BLE001 - the test judges it
            self.error = error

    @property
    def values(self) -> list[str]:
        return [leader.value for leader in self.seen]


class TestObserve:
    def test_shows_leaders_and_what_they_proclaim(self, open_session: OpenSession, prefix: str) -> None:
        """From nobody to the first leader, its proclamations, and the next leader; closing ends it at once."""
        one, other, watcher = (Election(open_session(ttl=30), prefix + "a") for _ in range(3))
        observer = Observer(watcher)
        leadership = one.campaign("one")
        until(lambda: observer.values == ["one"])
        leadership.proclaim("two")
        until(lambda: observer.values == ["one", "two"])
        follower = Campaign(other, "three")
        until(lambda: candidates(one.session, prefix + "a") == 2)
        leadership.resign()
        until(lambda: observer.values == ["one", "two", "three"])
        follower.result().resign()
        one.campaign("four")
        until(lambda: observer.values == ["one", "two", "three", "four"])
        observer.observation.close()
        observer.observation.close()
        observer.thread.join(20)
        assert not observer.thread.is_alive()
        assert observer.error is None

    def test_goes_on_beside_campaigns_of_its_own_session(self, open_session: OpenSession, prefix: str) -> None:
        """An observer and a candidate of one session share a watch, and each is told what concerns it."""
        one, other = (Election(open_session(ttl=30), prefix + "a") for _ in range(2))
        leadership = one.campaign("one")
        candidate = Campaign(other, "two")
        until(lambda: candidates(one.session, prefix + "a") == 2)
        observers = [Observer(other), Observer(other)]
        until(lambda: all(each.values == ["one"] for each in observers))
        leadership.proclaim("one again")
        until(lambda: all(each.values == ["one", "one again"] for each in observers))
        leadership.resign()
        candidate.result()
        until(lambda: all(each.values == ["one", "one again", "two"] for each in observers))
        for each in observers:
            each.observation.close()
            each.thread.join(20)
            assert not each.thread.is_alive()

    def test_ends_with_its_session(self, open_session: OpenSession, prefix: str) -> None:
        """Closing the session is LockLost for who observes, not a silence."""
        session = open_session(ttl=30)
        observer = Observer(Election(session, prefix + "a"))
        until(lambda: session.wakeups._watches)
        session.close()
        observer.thread.join(20)
        assert isinstance(observer.error, LockLost)

    def test_survives_a_broken_watch(self) -> None:
        """The stream breaks, and what happens after it is seen all the same."""
        transport = MemoryTransport(MemoryEtcd())
        election = Election(Session(transport, ttl=600), "/a")
        leadership = election.campaign("one")
        observer = Observer(election)
        until(lambda: observer.values == ["one"])
        until(transport._open_watches)
        transport.break_watches()
        leadership.proclaim("two")
        until(lambda: observer.values == ["one", "two"])
        observer.observation.close()
        election.session.close()

    def test_is_a_context_manager(self, open_session: OpenSession, prefix: str) -> None:
        """Closed at the end of its block: nothing more comes."""
        election = Election(open_session(), prefix + "a")
        with election.campaign("one"), election.observe() as leaders:
            assert next(leaders).value == "one"
        assert list(leaders) == []
