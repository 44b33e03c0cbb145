"""Our own keys in the queues of locks, from the moment a name is taken until the key is surely gone.

A request that got no answer may still be carried out, minutes later: a member that was stopped goes on and
works off what lay in its sockets. So a contender remembers whether any request that names it lacks an answer.
Such a one is removed together with a new put of the session's key, whose mod revision every acquire compares
(the *epoch*): a late put of ours finds the epoch passed and does nothing. Its name is *burnt*, not used again on
this lease. Removals compare the create revision, so that a late one hits nobody else's key. All other names are
used again, because etcd keeps every deleted key until it is compacted, and walks the dead ones in each range.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

from celery_etcd_lock.etcd.api import Compare, Delete, Header, KeyValue, Operation, Range, Txn, created_at
from celery_etcd_lock.exceptions import EtcdLockError, EtcdUnavailable, LeaseNotFound, NoSpace
from celery_etcd_lock.locks.queue import Kind, contender_key, is_contender
from celery_etcd_lock.locks.rider import leases_of
from celery_etcd_lock.locks.waiting import Wakeable

if TYPE_CHECKING:
    from celery_etcd_lock.locks.session import Session

__all__ = ["Contender", "Contenders", "Removal"]

logger = logging.getLogger(__name__)

_RANGES_A_LOOK = 100
"""Fewer than the operations that etcd takes in one transaction by default, 128."""

Removal: TypeAlias = Literal["released", "lost", "unanswered"]


class Contender:
    """The state of one key. Only `Contenders` and the acquire that made it change it."""

    __slots__ = (
        "create_revision",
        "gone",
        "key",
        "kind",
        "listeners",
        "lost",
        "name",
        "nonce",
        "of",
        "on_lost",
        "refused",
        "sibling",
        "stays_until",
        "thread",
        "unanswered",
    )

    def __init__(self, name: str, kind: Kind, key: str, nonce: str) -> None:
        self.name = name
        self.kind: Kind = kind
        self.key = key
        self.nonce = nonce
        self.thread = threading.current_thread()
        """Which took the name; any may give it back."""
        self.create_revision = 0
        """0: not known to exist."""
        self.unanswered = False
        """A request that names the key lacks an answer."""
        self.lost: str | None = None
        """Why it can no longer be trusted."""
        self.refused = False
        """etcd has refused its removal, which was said."""
        self.gone = False
        """Surely not in etcd any more."""
        self.on_lost: list[Callable[[str], None]] = []
        self.listeners: dict[Wakeable, int] = {}
        """Set when it goes away, for local contenders that wait behind it: they need no watch. With each the create
        revision of the key that it waits for."""
        self.sibling: Contender | None = None
        """The one that is made with it, and may outlive it: see `sibling`."""
        self.of: Contender | None = None
        """Of a sibling: whose."""
        self.stays_until: float | None = None
        """Of a sibling: when it goes by itself, at the earliest, by the session's clock. None: with its contender."""

    @property
    def leaving(self) -> list[Contender]:
        """Who goes when it is removed: itself, and its sibling unless that stays."""
        sibling = self.sibling
        return [self] if sibling is None or sibling.stays_until is not None else [self, sibling]


class Contenders:
    """All contenders of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.RLock()
        self._by_key: dict[str, Contender] = {}
        self._burnt: set[str] = set()
        self._unfinished: list[Contender] = []
        self._epoch_due = False
        self.refused = 0
        """How often in a row etcd has refused a removal."""

    def __len__(self) -> int:
        return len(self._by_key)

    def take(self, name: str, kind: Kind, nonce: str, *, sibling: bool = False) -> Contender:
        """A contender for the lock `name`, under a key that no other of ours has or may still get.

        With `sibling`, with one.
        """
        with self._lock:
            number = 0
            while (key := contender_key(name, kind, self._session.lease, number)) in self._by_key or key in self._burnt:
                number += 1
            contender = self._by_key[key] = Contender(name, kind, key, nonce)
            if sibling:
                contender.sibling = self.take(name, kind, nonce)
                contender.sibling.of = contender
            return contender

    def take_another(self, contender: Contender) -> Contender:
        """Instead of `contender`, whose key turned out to be there without us."""
        with self._lock:
            self._burnt.add(contender.key)
            self._by_key.pop(contender.key, None)
            for event in contender.listeners:
                event.set()  # it is not ours that they wait for
            another = self.take(contender.name, contender.kind, contender.nonce)
            another.sibling, another.of = contender.sibling, contender.of
            if another.sibling is not None:
                another.sibling.of = another
            if another.of is not None:
                another.of.sibling = another
            return another

    def created(self, contender: Contender, revision: int) -> None:
        """Take note that the key of `contender` was created at `revision`."""
        with self._lock:
            contender.create_revision = revision
            if contender.sibling is not None:
                contender.sibling.create_revision = revision  # of the same transaction
            if not contender.listeners:
                return
            # Who has seen another key of that name has seen one that is gone.
            deceived = [event for event, seen in contender.listeners.items() if seen != revision]
        for event in deceived:
            event.set()

    @contextmanager
    def listening(self, ahead: Collection[KeyValue], event: Wakeable) -> Iterator[list[str]]:
        """Set `event` when one of `ahead` that is ours goes away. Gives the others' keys: somebody must watch those.

        A sibling is like another's: its lease may end it.
        """
        with self._lock:
            known = [(kv, self._by_key.get(kv.key)) for kv in ahead]
            found = [(kv, each) for kv, each in known if each is not None and not (each.lost or each.of)]
            if any(each.create_revision not in {0, kv.create_revision} for kv, each in found):
                event.set()  # its name is in use again: the one that was seen is gone
            ours = [each for _, each in found]
            for kv, contender in found:
                contender.listeners[event] = kv.create_revision
        try:
            local = {contender.key for contender in ours}
            yield [kv.key for kv in ahead if kv.key not in local]
        finally:
            with self._lock:
                for contender in ours:
                    contender.listeners.pop(event, None)

    def waits_for_own_thread(self, contender: Contender) -> bool:
        """Whether the very thread that took `contender` has another in the same queue: it holds that."""
        with self._lock:
            others = [each for each in self._by_key.values() if each.name == contender.name and each is not contender]
            held = [each for each in others if not (each.lost or each.of) and each not in self._unfinished]
            return any(each.thread is contender.thread for each in held)

    def on_lost(self, contender: Contender, callback: Callable[[str], None]) -> None:
        """Call `callback` with the reason once `contender` is lost; at once if it is already."""
        with self._lock:
            if contender.lost is None:
                contender.on_lost.append(callback)
                return
        callback(contender.lost)

    def lose(self, contender: Contender, reason: str) -> None:
        """Say that `contender` can no longer be trusted, once, to whoever asked to be told."""
        with self._lock:
            if contender.lost is not None or contender.gone:
                return
            contender.lost = reason
            callbacks, listeners = list(contender.on_lost), list(contender.listeners)
        for event in listeners:
            event.set()
        for callback in callbacks:
            try:
                callback(reason)
            except Exception:
                logger.exception("etcd_lock.on_lost_failed: %s", contender.name)

    def lose_all(self, reason: str) -> None:
        with self._lock:
            contenders = [each for each in self._by_key.values() if each.of is None]
        for contender in contenders:
            self.lose(contender, reason)

    # -- removal

    def remove(self, contender: Contender, *, timeout: float | None = None, also: Sequence[Operation] = ()) -> Removal:
        """Take `contender` out of its queue, and do `also` if it was there. ``"lost"``: it was not, says etcd.

        ``"unanswered"``: no etcd answered in time, or it refused; the session goes on until it is certain, without
        `also`. So it is dropped where etcd takes no put, being full, or where it names a lease that is gone.
        """
        removal = self._removal(contender, also)
        if removal is None:
            self._forget(contender)
            return "released"
        try:
            try:
                reply = self._session.txn(removal, timeout=timeout)
                header, was_there = reply.header, reply.succeeded
                if contender.unanswered:
                    self._session.epoch_is(header.revision)
                if not was_there:
                    for sibling in contender.leaving[1:]:
                        self._session.txn(_deletion(sibling.key, sibling.create_revision), timeout=timeout)
            except NoSpace:
                # A put is refused, a delete is not. The epoch follows when there is room again.
                deleted = [self._delete(each.key, each.create_revision, timeout) for each in contender.leaving]
                header, was_there = deleted[0]
                self._epoch_due = self._epoch_due or contender.unanswered
        except LeaseNotFound:
            if leases_of(also) - {self._session.lease}:  # it may be one of those
                return self.remove(contender, timeout=timeout)
            self._session.lease_gone()
            self._forget(contender)
            return "lost"
        except EtcdLockError as error:
            if not isinstance(error, EtcdUnavailable):
                self.refused += 1
                if not contender.refused:
                    contender.refused = True
                    logger.warning("etcd_lock.removal_refused: %s: %s", contender.key, error)
            self._later(contender)
            return "unanswered"
        except BaseException:
            # The exception of a signal came between the request and its answer.
            self._later(contender)
            raise
        self.refused = 0
        contender.unanswered |= header.unanswered
        self._forget(contender)
        # Not there: gone without us, unless one of our own tries that got no answer was carried out after all.
        return "released" if was_there or contender.unanswered else "lost"

    def _delete(self, key: str, revision: int, timeout: float | None = None) -> tuple[Header, bool]:
        """Delete `key`, if it was created at `revision` (0: whenever), in an etcd that is full. Was it there?"""
        try:
            reply = self._session.txn(_deletion(key, revision), timeout=timeout)
        except NoSpace:
            # Before 3.5.7 a full etcd takes no transaction at all. Nobody but us makes keys of this name, and if the
            # answer stays out it is burnt: so two requests do as well as one.
            found = self._session.transport.range(Range(key), timeout=timeout)
            if not found.kvs or revision not in {0, found.kvs[0].create_revision}:
                return found.header, False
            deleted = self._session.transport.delete(Delete(key), timeout=timeout)
            return deleted.header, deleted.deleted > 0
        return reply.header, reply.succeeded

    def remove_later(self, contender: Contender) -> None:
        """Leave it to the session to take `contender` out of its queue: etcd does not answer now."""
        if self._removal(contender) is None:
            self._forget(contender)
        else:
            self._later(contender)

    def expel(self, contender: Contender) -> None:
        """Take `contender` out of its queue under its holder, in the background, and its sibling with it."""
        with self._lock:
            if contender.gone:
                return
            if contender.sibling is not None:
                contender.sibling.stays_until = None
        what = (
            "its holder was told of the loss and has not ended: it gives up its place, and the next may run beside it"
        )
        logger.warning("etcd_lock.expelled: %s: %s", contender.name, what)
        self.remove_later(contender)

    def _removal(self, contender: Contender, also: Sequence[Operation] = ()) -> Txn | None:
        """What to send so that the key is gone and stays gone; None if no request ever named it."""
        compare = _if_created(contender.key, contender.create_revision)
        deletions = [Delete(each.key) for each in contender.leaving]
        if not contender.unanswered:
            return Txn(compare, [*deletions, *also]) if contender.create_revision else None
        own_key = self._session.own_key
        return Txn(compare, [*deletions, own_key, *also], [own_key])

    def _forget(self, contender: Contender) -> None:
        with self._lock:
            contender.gone = True
            for each in contender.leaving:
                self._by_key.pop(each.key, None)
                if contender.unanswered:
                    self._burnt.add(each.key)
            listeners = list(contender.listeners)
        for event in listeners:
            event.set()

    def _later(self, contender: Contender) -> None:
        with self._lock:
            if contender.gone:
                return  # its name may be another's by now
            contender.unanswered = True
            if contender not in self._unfinished:
                self._unfinished.append(contender)
        self._session.hurry()

    def begin_epoch(self) -> None:
        """A request that compared the epoch got no answer: what may come of it yet shall fail. The session does it."""
        self._epoch_due = True
        self._session.hurry()

    # -- what the session does for them in the background

    @property
    def unfinished(self) -> bool:
        """Whether anything is left for `finish`."""
        return bool(self._unfinished or self._epoch_due)

    def finish(self, timeout: float, go_on: Callable[[], bool]) -> bool:
        """Try the removals again that got no answer, for as long as `go_on`. False: come back later.

        One that is refused or unanswered goes to the end of the line, so that it does not keep the others.
        """
        while go_on():
            with self._lock:
                if not self._unfinished:
                    break
                contender = self._unfinished.pop(0)
            if self.remove(contender, timeout=timeout) == "unanswered":
                return False
        if self._epoch_due and go_on():
            try:
                reply = self._session.txn(Txn([], [self._session.own_key]), timeout=timeout)
            except EtcdLockError:
                return False
            self._session.epoch_is(reply.header.revision)
            self._epoch_due = False
        return True

    @property
    def idle(self) -> bool:
        """Whether nobody holds or wants a lock any more: what is left is on its way out."""
        with self._lock:
            return all(each in self._unfinished for each in self._by_key.values() if each.of is None)

    def existing(self) -> list[Contender]:
        """Those that are in etcd, as far as we know."""
        with self._lock:
            return [c for c in self._by_key.values() if c.create_revision and not (c.lost or c.of)]

    def check_missing(self, contenders: list[Contender], listed: set[str]) -> None:
        """Lose those of `contenders` that are not in `listed`, once a linearizable read has said so too."""
        for contender in contenders:
            if contender.key in listed:
                continue
            kvs = self._session.transport.range(Range(contender.key)).kvs
            if not kvs or kvs[0].create_revision != contender.create_revision:
                self.lose(contender, f"its key {contender.key} was deleted")

    def check_siblings(self, now: float) -> None:
        """Make the names of those siblings free for use again that should be gone by `now`, if they surely are."""
        with self._lock:
            left = [each for each in self._by_key.values() if each.of is not None and each.of.gone]
            due = [each for each in left if each.stays_until is not None and each.stays_until <= now]
        for begin in range(0, len(due), _RANGES_A_LOOK):
            some = due[begin : begin + _RANGES_A_LOOK]
            reply = self._session.txn(Txn([], [Range(each.key, keys_only=True) for each in some]))
            there = {kv.key: kv.create_revision for index in range(len(some)) for kv in reply.range(index).kvs}
            gone = [each for each in some if there.get(each.key) != each.create_revision]
            with self._lock:
                self._burnt.update(each.key for each in gone if each.of is not None and each.of.unanswered)
                for each in gone:
                    self._by_key.pop(each.key, None)

    def remove_strays(self, listed: set[str]) -> None:
        """Delete the contenders among the lease's keys `listed` that nobody here owns: late puts made them."""
        for key in listed:
            if is_contender(key, self._session.lease) and key not in self._by_key:
                self._remove_stray(key)

    def _remove_stray(self, key: str) -> None:
        kvs = self._session.transport.range(Range(key)).kvs
        with self._lock:
            # Looked at after the reply: whoever made the key that it shows had taken the name by then.
            if not kvs or key in self._by_key:
                return
            self._burnt.add(key)
        logger.warning("etcd_lock.stray_removed: %s was made by a request of ours that came late", key)
        try:
            self._session.txn(Txn([created_at(key, kvs[0].create_revision)], [Delete(key), self._session.own_key]))
        except NoSpace:
            self._delete(key, kvs[0].create_revision)
            self._epoch_due = True


def _deletion(key: str, revision: int) -> Txn:
    """Deletes `key` if it was created at `revision`."""
    return Txn(_if_created(key, revision), [Delete(key)])


def _if_created(key: str, revision: int) -> list[Compare]:
    """That `key` was created at `revision`. 0: whenever; its name is burnt, so it is nobody else's ever."""
    return [created_at(key, revision)] if revision else []
