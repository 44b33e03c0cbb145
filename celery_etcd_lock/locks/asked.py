"""Asking a holder for its lock back, by way of etcd. Costs whoever holds a lock nothing while nobody asks.

The wish is a key, ``/<namespace>/asked/<the contender's key, percent-encoded>``, on the *holder's own lease*: it goes
when that goes, and the holder's session finds it among the keys of its lease, which it asks for once per TTL anyway
while it holds anything::

    who asks                         etcd                  the holder's session
    put the wish ─────────────────▶ asked/…
                                    asked/…  ◀──────────── the keys of my lease? (once per TTL)
                                             ◀──────────── read it; the contender is lost; delete it
    the wish is gone: it was told
    the contender is gone: it was given back

A lost contender is what it always is: its holder is told, ends what it does under the lock or does not, and takes the
key away. A wish names the create revision of the contender, because names are used again: one that comes too late is
deleted, and hits nobody else.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias
from urllib.parse import quote, unquote

from celery_etcd_lock.etcd.api import Compare, Delete, KeyValue, Put, Range, Transport, Txn, created_at
from celery_etcd_lock.exceptions import LeaseNotFound

if TYPE_CHECKING:
    from celery_etcd_lock.locks.session import Session

__all__ = ["Answer", "Asking", "Owner", "Wish", "asked_key", "heed", "owner_of"]

Answer: TypeAlias = Literal["none", "told", "gone"]
"""``"none"``: it was not heard yet. ``"told"``: it was, and the holder's key is there still. ``"gone"``: it is not."""


class Wish(NamedTuple):
    """What is in the key: who asks, since when, and for the contender of which create revision."""

    by: str
    at: str
    """ISO 8601, UTC."""
    revision: int

    def encoded(self) -> bytes:
        return json.dumps(self._asdict(), separators=(",", ":")).encode()

    @classmethod
    def decoded(cls, value: bytes) -> Wish | None:
        """None: it is no wish."""
        try:
            said = json.loads(value)
            return cls(str(said["by"]), str(said["at"]), int(said["revision"]))
        except (ValueError, TypeError, KeyError):
            return None


def asked_key(namespace: str, contender: str) -> str:
    """The key of the wish for the contender with the key `contender`, whose session has this `namespace`."""
    return f"/{namespace}/asked/{quote(contender, safe='', errors='surrogateescape')}"


# -- the holder's side


def heed(session: Session, namespace: str, listed: set[str]) -> None:
    """Lose the contenders of `session` that are asked for in `listed`, the keys of its lease. Raises what etcd does."""
    prefix = asked_key(namespace, "")
    wishes = [key for key in listed if key.startswith(prefix)]
    if not wishes:
        return
    ours = {contender.key: contender for contender in session.contenders.existing()}
    for key in wishes:
        kvs = session.transport.range(Range(key)).kvs
        if not kvs:
            continue
        wish = Wish.decoded(kvs[0].value)
        contender = ours.get(unquote(key[len(prefix) :], errors="surrogateescape"))
        if wish is not None and contender is not None and contender.create_revision == wish.revision:
            session.contenders.lose(contender, f"{wish.by} asked for it back")
        # Told first, then deleted: if the deletion gets no answer, nobody is told twice.
        session.txn(Txn([Compare(key, "mod", "==", kvs[0].mod_revision)], [Delete(key)]))


# -- who asks


class Owner(NamedTuple):
    """The session behind a lease."""

    key: str
    namespace: str
    ttl: int
    """Seconds within which it hears a wish."""


def owner_of(transport: Transport, lease: int) -> Owner | None:
    """The session behind `lease`. None: it is gone, or no session of this package's, which hears no wish."""
    if not lease:
        return None
    try:
        found = transport.lease_time_to_live(lease, keys=True)
    except LeaseNotFound:
        return None
    for key in found.keys:
        if session := re.fullmatch(rf"/([^/]+)/sessions/[^/]+/\d+-{lease:x}", key):
            return Owner(key, session[1], found.granted_ttl)
    return None


class Asking:
    """One wish: put it by `ask`, see what comes of it by `look`, and `withdraw` it in the end.

    `contender`: whose key it is, as etcd has it; `owner`: of its lease. `by` and `at` are shown to people.
    """

    def __init__(self, transport: Transport, owner: Owner, contender: KeyValue, *, by: str, at: str) -> None:
        self._transport = transport
        self._contender = contender
        self._wish = Wish(by, at, contender.create_revision)
        self._asked_at = 0
        self.key = asked_key(owner.namespace, contender.key)

    def ask(self) -> bool:
        """Put the wish. False: the contender is gone already, and nothing was put."""
        there = created_at(self._contender.key, self._contender.create_revision)
        try:
            reply = self._transport.txn(Txn([there], [Put(self.key, self._wish.encoded(), self._contender.lease)]))
        except LeaseNotFound:
            return False
        self._asked_at = reply.header.revision if reply.succeeded else 0
        return reply.succeeded

    def look(self) -> Answer:
        """What has come of it so far."""
        asked = [Range(self._contender.key, keys_only=True), Range(self.key, keys_only=True)]
        reply = self._transport.txn(Txn([], asked))
        contender, wish = reply.range(0).kvs, reply.range(1).kvs
        if not contender or contender[0].create_revision != self._contender.create_revision:
            return "gone"
        return "none" if wish else "told"

    def withdraw(self) -> None:
        """Take the wish back, if it is there still and nobody has asked anew since."""
        if self._asked_at:
            mine = Compare(self.key, "mod", "==", self._asked_at)
            self._transport.txn(Txn([mine], [Delete(self.key)]))
