"""The session: renewal, the deadline of trust, and loss. With a clock that the test moves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from celery_etcd_lock.etcd.api import Delete, Put, Range, Txn
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.exceptions import AuthRejected, EtcdUnavailable, LockContended, LockLost, LockTimeout, NoSpace
from celery_etcd_lock.locks import Mutex, Session
from tests.clock import Clock


def away(_verb: str, _request: Any) -> None:
    raise EtcdUnavailable("staged")


def test_trust_is_counted_from_before_the_request_and_ends_before_the_lease(store: MemoryEtcd, clock: Clock) -> None:
    """A grant whose answer took 20 of its 30 s is trusted for 7 s more, not for 27."""
    transport = MemoryTransport(store)

    def slow(verb: str, _request: Any) -> None:
        if verb == "lease_grant":
            clock.now += 20

    transport.after = slow
    session = Session(transport, ttl=30, clock=clock, background=False)
    assert session.remaining() == pytest.approx(7)


def test_renews_at_a_third_of_the_ttl(session: Session, clock: Clock) -> None:
    """Three renewals a TTL, one request each, and nothing else while nothing is held."""
    requests = session.transport.requests  # type: ignore[attr-defined]
    for _ in range(90):
        clock.now += 1
        session.keep()
        assert session.remaining() >= 17
    assert session.transport.requests - requests == 9  # type: ignore[attr-defined]


def test_holding_costs_one_request_more_a_ttl(session: Session, clock: Clock) -> None:
    """While anything is held the lease is asked for its keys, once per TTL, however many there are."""
    for number in range(100):
        Mutex(session, f"/{number}").acquire()
    requests = session.transport.requests  # type: ignore[attr-defined]
    for _ in range(90):
        clock.now += 1
        session.keep()
    assert session.transport.requests - requests == 12  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", ["lease_renew", "lease_time_to_live"])
def test_what_closing_cuts_off_is_no_news(
    session: Session, clock: Clock, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A renewal, or a look at the keys, that was under way when the session was closed is not logged as a failure."""
    Mutex(session, "/a").acquire()
    asked = []

    def close(asking: str, _request: Any) -> None:
        asked.append(asking)
        if asking == verb:
            session.close()
            raise EtcdUnavailable("the connection to etcd was closed")

    session.transport.before = close  # type: ignore[attr-defined]
    clock.now += 11
    session.keep()
    if verb == "lease_time_to_live":
        clock.now += 20
        session.keep()
    assert verb in asked
    assert session.lost
    assert not [record for record in caplog.records if record.levelname == "WARNING"], caplog.text


def test_unanswered_renewals_cost_the_trust_and_not_before(session: Session, clock: Clock) -> None:
    """While etcd is away the lock is held until the deadline, and not a moment longer."""
    held = Mutex(session, "/a").acquire()
    session.transport.before = away  # type: ignore[attr-defined]
    clock.now += 26.9
    session.keep()
    assert held.is_held()
    clock.now += 0.2
    assert not held.is_held()
    with pytest.raises(LockLost, match="no renewal"):
        held.assert_held()
    with pytest.raises(LockLost):
        Mutex(session, "/b").acquire()


def test_a_renewal_that_comes_back_extends_it(session: Session, clock: Clock) -> None:
    """An outage shorter than the trust is no loss."""
    session.transport.before = away  # type: ignore[attr-defined]
    clock.now += 20
    session.keep()
    session.transport.before = None  # type: ignore[attr-defined]
    session.keep()
    assert session.remaining() == pytest.approx(27)


def test_a_lease_that_is_gone_is_lost_at_once(session: Session, clock: Clock) -> None:
    """A renewal that finds no lease ends the session there and then, and says so to whoever holds a lock."""
    reasons: list[str] = []
    held = Mutex(session, "/a").acquire()
    held.on_lost(reasons.append)
    session.transport.lease_revoke(session.lease)
    clock.now += 11
    session.keep()
    assert session.lost
    assert not held.is_held()
    assert "expired or was revoked" in reasons[0]
    assert session.wait_lost(0)


def test_a_member_behind_an_election_proves_nothing(session: Session, store: MemoryEtcd, clock: Clock) -> None:
    """A renewal answered with a lower raft term than one seen before extends nothing; an acquire fails."""
    store.raft_term = 7
    clock.now += 11
    session.keep()
    store.raft_term = 6
    clock.now += 11
    remaining = session.remaining()
    session.keep()
    assert session.remaining() == remaining
    with pytest.raises(EtcdUnavailable, match="behind an election"):
        Mutex(session, "/a").acquire()


def test_a_late_reply_to_an_acquire_is_no_lock(session: Session, clock: Clock) -> None:
    """An acquire whose answer comes after the deadline of trust does not enter its block."""

    def slow(verb: str, _request: Any) -> None:
        if verb == "txn":
            clock.now += 28

    session.transport.after = slow  # type: ignore[attr-defined]
    with pytest.raises(LockLost):
        Mutex(session, "/a").acquire()


def test_a_session_key_deleted_by_hand_is_a_loss(session: Session, clock: Clock) -> None:
    """Without its own key a session can take nothing more, and says that it is lost."""
    session.transport.delete(Delete(session.key))
    with pytest.raises(LockLost, match="was deleted"):
        Mutex(session, "/a").acquire()
    assert session.lost


def test_close_gives_everything_back(session: Session, store: MemoryEtcd) -> None:
    """Closing revokes the lease, tells the holders, and may be done twice."""
    held = Mutex(session, "/a").acquire()
    session.close()
    session.close()
    assert not MemoryTransport(store).range(Range("/", "0")).kvs
    assert "closed" in held.why_not()


@pytest.mark.parametrize("held", [True, False])
def test_a_lost_session_is_revoked_unless_somebody_still_works_under_it(
    session: Session, store: MemoryEtcd, clock: Clock, held: bool
) -> None:
    """What a lost session left in etcd does not block the next one, but does protect a body that still runs."""
    lock = Mutex(session, "/a").acquire()
    clock.now += 28
    assert session.lost
    session._lose("staged")
    session.transport.before = away if not held else None  # type: ignore[attr-defined]
    if not held:
        assert lock.release() == "lost"
    session.transport.before = None  # type: ignore[attr-defined]
    session.close()
    assert bool(MemoryTransport(store).range(Range("/a/", "/a0")).kvs) is held


def test_the_background_says_it_without_being_asked(store: MemoryEtcd) -> None:
    """With etcd away for good, `wait_lost` returns and the holder's callback runs, close to the deadline."""
    store = MemoryEtcd()
    session = Session(MemoryTransport(store), ttl=2)
    told = threading.Event()
    Mutex(session, "/a").acquire().on_lost(lambda _reason: told.set())
    session.transport.before = away  # type: ignore[attr-defined]
    assert not session.wait_lost(0.5)
    assert session.wait_lost(20)
    assert told.wait(5)


class TestUnanswered:
    """Requests without an answer: they may have been carried out, or may still be."""

    @staticmethod
    def lose_answers(transport: Any, how_many: int) -> None:
        left = [how_many]

        def lose(verb: str, _request: Any) -> None:
            if verb == "txn" and left[0]:
                left[0] -= 1
                raise EtcdUnavailable("staged: the answer is lost", True)

        transport.after = lose

    @pytest.mark.parametrize("blocking", [True, False])
    def test_an_acquire_given_up_leaves_nothing(self, session: Session, clock: Clock, blocking: bool) -> None:
        """The key that an unanswered acquire did make is removed by the session when etcd answers again."""
        self.lose_answers(session.transport, 1)
        with pytest.raises(EtcdUnavailable):
            Mutex(session, "/a").acquire(blocking=blocking)
        assert session.transport.range(Range("/a/", "/a0")).kvs
        session.keep()
        assert not session.transport.range(Range("/a/", "/a0")).kvs

    def test_a_put_that_comes_late_does_nothing(self, session: Session, clock: Clock) -> None:
        """After an acquire was given up, its request, carried out late, finds that the epoch has passed."""
        late: list[Txn] = []

        def keep_back(verb: str, request: Any) -> None:
            if verb == "txn" and any(isinstance(op, Put) and "/a/" in op.key for op in request.success) and not late:
                late.append(request)
                raise EtcdUnavailable("staged: stuck on the way", True)

        session.transport.before = keep_back  # type: ignore[attr-defined]
        with pytest.raises(EtcdUnavailable):
            Mutex(session, "/a").acquire()
        session.keep()
        assert not session.transport.txn(late[0]).succeeded
        assert not session.transport.range(Range("/a/", "/a0")).kvs
        with Mutex(session, "/a").acquire(blocking=False) as held:
            assert held.key.endswith("-1"), "the name that may still be asked for is not used again"

    def test_a_removal_goes_on_until_it_is_certain(self, session: Session, clock: Clock) -> None:
        """A release that gets no answer says so, is finished in the background, and its name is not used again."""
        held = Mutex(session, "/a").acquire()
        session.transport.before = away  # type: ignore[attr-defined]
        assert held.release() == "unanswered"
        assert not held.is_held()
        session.keep()
        session.transport.before = None  # type: ignore[attr-defined]
        clock.now += 1.1
        session.keep()
        assert not session.transport.range(Range("/a/", "/a0")).kvs
        with Mutex(session, "/a").acquire() as again:
            assert again.key != held.key

    def test_a_removal_that_is_refused_does_not_keep_the_others(self, session: Session, clock: Clock) -> None:
        """One that etcd refuses for good goes to the end of the line, and the rest is removed."""
        refused, other = Mutex(session, "/refused").acquire(), Mutex(session, "/other").acquire()

        def refuse(verb: str, request: Any) -> None:
            if verb == "txn" and any(isinstance(op, Delete) and "/refused/" in op.key for op in request.success):
                raise AuthRejected("staged: permission denied", 7)

        session.transport.before = away  # type: ignore[attr-defined]
        assert (other.release(), refused.release()) == ("unanswered", "unanswered")
        session.transport.before = refuse  # type: ignore[attr-defined]
        for _ in range(3):
            clock.now += 1.1
            session.keep()
        assert not session.transport.range(Range("/other/", "/other0")).kvs
        assert session.transport.range(Range("/refused/", "/refused0")).kvs

    def test_what_etcd_goes_on_refusing_is_asked_for_less_and_less(self, session: Session, clock: Clock) -> None:
        """A removal that is refused is tried a few times in a TTL, for as long as something is held; after that the
        session gives up, so that the lock comes free."""
        refused, held = Mutex(session, "/refused").acquire(), Mutex(session, "/held").acquire()
        tried: list[float] = []

        def refuse(verb: str, request: Any) -> None:
            if verb == "txn" and any(isinstance(op, Delete) for op in request.success):
                tried.append(clock.now)
                raise AuthRejected("staged: permission denied", 7)

        session.transport.before = refuse  # type: ignore[attr-defined]
        assert refused.release() == "unanswered"
        for _ in range(100):
            clock.now += 0.5
            session.keep()
        assert len(tried) <= 10, "over 50 seconds"
        assert held.is_held()
        held.release()
        for _ in range(20):
            clock.now += 0.5
            session.keep()
        assert "has refused for 30 s to take back" in session.reason

    def test_an_acquire_that_is_refused_leaves_nothing_to_do(self, session: Session) -> None:
        """A definite no is an answer: nothing of the request can come late."""

        def refuse(_verb: str, _request: Any) -> None:
            raise AuthRejected("staged: permission denied", 7)

        session.transport.before = refuse  # type: ignore[attr-defined]
        with pytest.raises(AuthRejected):
            Mutex(session, "/a").acquire()
        assert not session.contenders.unfinished
        assert len(session.contenders) == 0

    def test_tidying_up_does_not_hold_up_the_renewal(self, session: Session, clock: Clock) -> None:
        """However many removals there are, and however slowly each is answered, the lease is renewed in time."""
        held = [Mutex(session, f"/{number}").acquire() for number in range(40)]
        session.transport.before = away  # type: ignore[attr-defined]
        for each in held:
            each.release()
        session.transport.before = None  # type: ignore[attr-defined]

        def slow(verb: str, _request: Any) -> None:
            if verb == "txn":
                clock.now += 3

        session.transport.after = slow  # type: ignore[attr-defined]
        for _ in range(40):
            session.keep()
            assert not session.lost
        assert not session.contenders.unfinished

    def test_a_release_that_was_carried_out_unheard_is_no_loss(self, session: Session, clock: Clock) -> None:
        """That the second try finds no key does not mean that the lock was lost."""
        held = Mutex(session, "/a").acquire()
        self.lose_answers(session.transport, 1)
        assert held.release() == "unanswered"
        session.keep()
        assert not session.contenders.unfinished

    def test_a_stray_contender_of_our_lease_is_removed(self, session: Session, clock: Clock) -> None:
        """A contender on our lease that nobody here owns goes at the next look, and what we hold stays."""
        held = Mutex(session, "/b").acquire()
        stray = f"/a/write/{session.lease:x}"
        session.transport.txn(Txn([], [Put(stray, b"{}", session.lease), Put("/x/y", b"", session.lease)]))
        for _ in range(4):
            clock.now += 10
            session.keep()
        assert not session.transport.range(Range(stray)).kvs
        assert session.transport.range(Range("/x/y")).kvs, "what is no contender is not touched"
        assert held.is_held()

    def test_a_key_of_ours_that_is_not_this_acquires_is_not_adopted(self, session: Session) -> None:
        """A key with our name but another nonce is somebody's: it is waited for, not taken for the lock."""
        stray = f"/a/write/{session.lease:x}"
        session.transport.txn(Txn([], [Put(stray, b'{"host":"me","nonce":"old"}', session.lease)]))
        with pytest.raises(LockContended):
            Mutex(session, "/a").acquire(blocking=False)
        with pytest.raises(LockTimeout):
            Mutex(session, "/a").acquire(timeout=0.1)


class TestFull:
    """etcd has reached its quota: it refuses puts. Before 3.5.7 it refuses transactions, whatever is in them."""

    @pytest.fixture(params=["puts", "transactions"])
    def full(self, request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
        def refuse(verb: str, asked: Any) -> None:
            if verb == "txn" and (request.param == "transactions" or any(isinstance(op, Put) for op in asked.success)):
                raise NoSpace("staged")

        return refuse

    def test_acquires_are_refused_and_leave_nothing_to_do(self, session: Session, full: Any) -> None:
        """An acquire is `NoSpace` after one request, and there is nothing to tidy up after it."""
        session.transport.before = full  # type: ignore[attr-defined]
        for blocking in (True, False):
            before = session.transport.requests  # type: ignore[attr-defined]
            with pytest.raises(NoSpace):
                Mutex(session, "/a").acquire(blocking=blocking)
            assert session.transport.requests - before == 1  # type: ignore[attr-defined]
        assert not session.contenders.unfinished
        assert len(session.contenders) == 0

    def test_releases_work(self, session: Session, store: MemoryEtcd, full: Any) -> None:
        """What is held is given back, its name is free for use, and a key that is gone or another's is left alone."""
        held, deleted, replaced = (Mutex(session, name).acquire() for name in ("/x/a", "/x/b", "/x/c"))
        other = MemoryTransport(store)
        other.delete(Delete(deleted.key))
        other.delete(Delete(replaced.key))
        other.txn(Txn([], [Put(replaced.key, b"somebody else's")]))
        session.transport.before = full  # type: ignore[attr-defined]
        assert (held.release(), deleted.release(), replaced.release()) == ("released", "lost", "lost")
        assert [kv.key for kv in other.range(Range("/x/", "/x0")).kvs] == [replaced.key]
        session.transport.before = None  # type: ignore[attr-defined]
        assert not session.contenders.unfinished
        assert Mutex(session, "/x/a").acquire().key == held.key

    def test_what_may_come_late_is_stopped_when_there_is_room(self, session: Session, clock: Clock, full: Any) -> None:
        """After an unanswered acquire the key goes at once, and the epoch as soon as puts are taken again."""

        def lose(verb: str, _request: Any) -> None:
            session.transport.before, session.transport.after = full, None  # type: ignore[attr-defined]
            raise EtcdUnavailable("staged: the answer is lost", True)

        session.transport.after = lose  # type: ignore[attr-defined]
        epoch = session.epoch
        with pytest.raises(EtcdUnavailable):
            Mutex(session, "/a").acquire()
        session.keep()
        assert not session.transport.range(Range("/a/", "/a0")).kvs
        assert session.epoch == epoch
        assert session.contenders.unfinished
        session.transport.before = None  # type: ignore[attr-defined]
        clock.now += 1.1
        session.keep()
        assert session.epoch > epoch
        assert not session.contenders.unfinished

    def test_a_stray_contender_goes(self, session: Session, store: MemoryEtcd, clock: Clock, full: Any) -> None:
        """A late put that got in before etcd was full keeps nobody out until there is room again."""
        held = Mutex(session, "/b").acquire()
        stray = f"/a/write/{session.lease:x}"
        MemoryTransport(store).txn(Txn([], [Put(stray, b"{}", session.lease)]))
        session.transport.before = full  # type: ignore[attr-defined]
        for _ in range(4):
            clock.now += 10
            session.keep()
        assert not session.transport.range(Range(stray)).kvs
        assert held.is_held()


def test_a_key_created_by_an_unheard_first_try_is_adopted(store: MemoryEtcd, clock: Clock) -> None:
    """The transport's second try finds the key that its first one made, by its nonce, and holds the lock."""

    class Twice(MemoryTransport):
        """Carries every transaction out twice, as a client does that got no answer to its first try."""

        def txn(self, request: Txn, *, timeout: float | None = None) -> Any:
            super().txn(request)
            reply = super().txn(request)
            return reply._replace(header=reply.header._replace(unanswered=True))

    session = Session(Twice(store), ttl=30, clock=clock, background=False)
    tokens = []
    take: list[Callable[[], Any]] = [Mutex(session, "/a").acquire, lambda: Mutex(session, "/a").acquire(blocking=False)]
    for acquire in take * 2:
        with acquire() as held:
            tokens.append(held.fencing_token)
            assert len(session.transport.range(Range("/a/", "/a0")).kvs) == 1
        assert not session.transport.range(Range("/a/", "/a0")).kvs
    assert tokens == sorted(set(tokens))
