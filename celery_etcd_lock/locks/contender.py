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
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

from celery_etcd_lock.etcd.api import Delete, Header, KeyValue, Range, Txn, created_at
from celery_etcd_lock.exceptions import EtcdLockError, EtcdUnavailable, LeaseNotFound, NoSpace
from celery_etcd_lock.locks.queue import Kind, contender_key, is_contender

if TYPE_CHECKING:
    from celery_etcd_lock.locks.session import Session

__all__ = ["Contender", "Contenders", "Removal"]

logger = logging.getLogger(__name__)

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
        "on_lost",
        "refused",
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
        self.listeners: dict[threading.Event, int] = {}
        """Set when it goes away, for local contenders that wait behind it: they need no watch. With each the create
        revision of the key that it waits for."""


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

    def take(self, name: str, kind: Kind, nonce: str) -> Contender:
        """A contender for the lock `name`, under a key that no other of ours has or may still get."""
        with self._lock:
            number = 0
            while (key := contender_key(name, kind, self._session.lease, number)) in self._by_key or key in self._burnt:
                number += 1
            contender = self._by_key[key] = Contender(name, kind, key, nonce)
            return contender

    def take_another(self, contender: Contender) -> Contender:
        """Instead of `contender`, whose key turned out to be there without us."""
        with self._lock:
            self._burnt.add(contender.key)
            self._by_key.pop(contender.key, None)
            for event in contender.listeners:
                event.set()  # it is not ours that they wait for
            return self.take(contender.name, contender.kind, contender.nonce)

    def created(self, contender: Contender, revision: int) -> None:
        """Take note that the key of `contender` was created at `revision`."""
        with self._lock:
            contender.create_revision = revision
            # Who has seen another key of that name has seen one that is gone.
            deceived = [event for event, seen in contender.listeners.items() if seen != revision]
        for event in deceived:
            event.set()

    @contextmanager
    def listening(self, ahead: Collection[KeyValue], event: threading.Event) -> Iterator[list[str]]:
        """Set `event` when one of `ahead` that is ours goes away. Gives the others' keys: somebody must watch those."""
        with self._lock:
            found = [(kv, each) for kv in ahead if (each := self._by_key.get(kv.key)) is not None and not each.lost]
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
            held = [each for each in others if not each.lost and each not in self._unfinished]
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
            contenders = list(self._by_key.values())
        for contender in contenders:
            self.lose(contender, reason)

    # -- removal

    def remove(self, contender: Contender, *, timeout: float | None = None) -> Removal:
        """Take `contender` out of its queue. ``"lost"``: etcd says that it was not there any more.

        ``"unanswered"``: no etcd answered in time, or it refused; the session goes on until it is certain.
        """
        removal = self._removal(contender)
        if removal is None:
            self._forget(contender)
            return "released"
        try:
            try:
                reply = self._session.txn(removal, timeout=timeout)
                header, was_there = reply.header, reply.succeeded
                if contender.unanswered:
                    self._session.epoch_is(header.revision)
            except NoSpace:
                # A put is refused, a delete is not. The epoch follows when there is room again.
                header, was_there = self._delete(contender.key, contender.create_revision, timeout)
                self._epoch_due = self._epoch_due or contender.unanswered
        except LeaseNotFound:
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

    def _removal(self, contender: Contender) -> Txn | None:
        """What to send so that the key is gone and stays gone; None if no request ever named it."""
        bare = _deletion(contender.key, contender.create_revision)
        if not contender.unanswered:
            return bare if contender.create_revision else None
        own_key = self._session.own_key
        return Txn(bare.compare, [*bare.success, own_key], [own_key])

    def _forget(self, contender: Contender) -> None:
        with self._lock:
            contender.gone = True
            self._by_key.pop(contender.key, None)
            if contender.unanswered:
                self._burnt.add(contender.key)
            listeners = list(contender.listeners)
        for event in listeners:
            event.set()

    def _later(self, contender: Contender) -> None:
        with self._lock:
            contender.unanswered = True
            if contender not in self._unfinished:
                self._unfinished.append(contender)
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
            return all(each in self._unfinished for each in self._by_key.values())

    def existing(self) -> list[Contender]:
        """Those that are in etcd, as far as we know."""
        with self._lock:
            return [c for c in self._by_key.values() if c.create_revision and not c.lost]

    def check_missing(self, contenders: list[Contender], listed: set[str]) -> None:
        """Lose those of `contenders` that are not in `listed`, once a linearizable read has said so too."""
        for contender in contenders:
            if contender.key in listed:
                continue
            kvs = self._session.transport.range(Range(contender.key)).kvs
            if not kvs or kvs[0].create_revision != contender.create_revision:
                self.lose(contender, f"its key {contender.key} was deleted")

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
    """Deletes `key` if it was created at `revision`. 0: whenever; its name is burnt, so it is nobody else's ever."""
    return Txn([created_at(key, revision)] if revision else [], [Delete(key)])
