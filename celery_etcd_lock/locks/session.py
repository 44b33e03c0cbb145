"""A session: one lease, the keys that hang on it, and how long they can be trusted.

All locks of a process hang on the lease of its session, so renewing them costs one request however many they
are. A session is open until it is closed or lost; it never comes back, its user opens another::

              opened                       "no such lease", its key gone,
    (grant) ─────────▶ trusted ───────────────────────────────────────────▶ lost ──▶ closed
                       │    ▲  │           or the deadline of trust passed             ▲
                       └────┘  └───────────────────────────────────────────────────────┘
                       renewed

**The deadline of trust** is counted from *before* the grant or renewal was sent, with the TTL that the server
returned, less a margin (a tenth). The server counts from a later moment and to the full TTL, so the holder knows
before anybody else can get the lock. The clock goes on while the machine is suspended. Two threads keep the
session: one talks to etcd (renews at a third of the TTL, and tidies up), the other only watches the deadline (and
those of single locks, see `expiry`), so that a request that hangs cannot keep it from saying that they are lost.

What the tidying is for: a renewal that succeeds does not prove that the keys are still there, so once per TTL
the lease is asked for them while anything is held (there, too, stands who wants a lock back: see `asked`); and a
request that got no answer may be carried out late and leave a contender that nobody owns, so those are removed, by
create revision.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import (
    TLS,
    Header,
    KeyValue,
    Put,
    Range,
    Transport,
    Txn,
    TxnReply,
)
from celery_etcd_lock.exceptions import (
    EtcdLockError,
    EtcdRejected,
    EtcdUnavailable,
    LeaseNotFound,
    LockLost,
    PermissionDenied,
)
from celery_etcd_lock.locks.asked import heed
from celery_etcd_lock.locks.contender import Contenders
from celery_etcd_lock.locks.expiry import Expiries, Expiry
from celery_etcd_lock.locks.permission import denied
from celery_etcd_lock.locks.waiting import Wakeups

__all__ = ["Session", "boottime"]

logger = logging.getLogger(__name__)


boottime: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
"""Seconds of a clock that never steps and, where there is one (Linux), goes on while the machine sleeps."""


def trusted_until(sent: float, ttl: float) -> float:
    """Until when a grant or renewal that was sent at `sent` and answered with `ttl` can be relied upon."""
    return sent + ttl - ttl / 10


class Session:
    """A lease and its renewal; every lock is made from one. All threads of a process may share it.

    `ttl` is in seconds: how long a process that dies keeps what it holds. etcd may grant more (its minimum is 2
    by default): `ttl` tells what it granted. Use `open` to make one; it raises `EtcdUnavailable` if no etcd
    answers. A forked child has a copy that holds nothing: it neither renews, nor releases, nor vouches. `on_lost` is
    called with the reason, once, in whatever thread finds out, unless it was closed before.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        ttl: int = 30,
        namespace: str = "celery",
        instance: str | None = None,
        clock: Callable[[], float] = boottime,
        background: bool = True,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.transport = transport
        self.pid = os.getpid()
        self.host = socket.gethostname()
        self.wakeups = Wakeups(transport)
        self.contenders = Contenders(self)
        self.expiries = Expiries(self.contenders)
        self._namespace = namespace
        self._clock = clock
        self._changed = threading.Condition()
        self._lost = threading.Event()
        self._over = False
        """That it is set, for those who only look, often."""
        self._reason = ""
        self._closed = False
        self._on_lost = on_lost
        self._owns_transport = False
        self._failing = False
        self._hurried = False
        self._refused_since: float | None = None

        sent = clock()
        granted = transport.lease_grant(ttl)
        self.lease = granted.lease
        self.ttl = granted.ttl
        self._term = granted.header.raft_term
        self._deadline = trusted_until(sent, granted.ttl)
        self._renewal_due = sent + granted.ttl / 3
        self._check_due = sent + granted.ttl
        self._finish_due = 0.0
        instance = instance or secrets.token_hex(4)
        self.key = f"/{namespace}/sessions/{instance}/{self.pid}-{self.lease:x}"
        start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.own_key = Put(
            self.key,
            json.dumps({"host": self.host, "pid": self.pid, "start": start}, separators=(",", ":")).encode(),
            self.lease,
        )
        try:
            self.epoch = self.txn(Txn([], [self.own_key])).header.revision
            """The mod revision of the session's key. Every acquire compares it."""
        except EtcdRejected:
            with contextlib.suppress(EtcdLockError):  # whoever tries again and again would leave a lease each time
                transport.lease_revoke(self.lease)
            raise
        if background:
            for work in (self._keep, self._watch_deadline):
                threading.Thread(target=work, name=f"etcd-lock{work.__name__}", daemon=True).start()

    @classmethod
    def open(
        cls,
        endpoints: str | Sequence[str] = (),
        *,
        ttl: int = 30,
        namespace: str = "celery",
        timeout: float = 5.0,
        username: str | None = None,
        password: str | None = None,
        tls: TLS | None = None,
        transport: Literal["gateway", "grpc"] = "gateway",
        client: str | Callable[[], Any] | None = None,
    ) -> Session:
        """A session with the etcd at `endpoints`: URLs, in a list or separated by commas.

        `timeout`: seconds for one etcd request, over all endpoints tried. `transport` ``"grpc"`` needs the extra
        of that name. `client`, in place of `endpoints`: what gives an ``etcd3.Etcd3Client``, whose channel gRPC then
        uses, and leaves open. `EtcdUnavailable` if none answers, `AuthRejected` if it does not let us in
        (`PermissionDenied`: no further than that), `EtcdRejected` if it is no etcd, `ConfigError` for what cannot be
        meant.
        """
        connected = connect(
            endpoints,
            timeout=timeout,
            username=username,
            password=password,
            tls=tls,
            transport=transport,
            client=client,
        )
        try:
            session = cls(connected, ttl=ttl, namespace=namespace)
        except BaseException:
            connected.close()
            raise
        session._owns_transport = True
        return session

    @classmethod
    def from_app(cls, app: Any) -> Session:
        """A session of your own with the etcd that the settings of the Celery `app` name; it is yours to close.

        `ConfigError` if they do not do, and what `open` raises. Its locks are named as you like, and its TTL and
        namespace are the app's.
        """
        from celery_etcd_lock.settings import Settings  # the one step up, for those inside a Celery project

        settings = Settings.from_app(app)
        connected = settings.connect()
        try:
            session = cls(connected, ttl=settings.ttl, namespace=settings.namespace)
        except BaseException:
            connected.close()
            raise
        session._owns_transport = True
        return session

    # -- trust

    def remaining(self) -> float:
        """Seconds for which the session is surely ours; 0 when it is lost, closed, or another process's."""
        if self._over or os.getpid() != self.pid:
            return 0.0
        return max(0.0, self._deadline - self._clock())

    @property
    def lost(self) -> bool:
        """Whether it is lost or closed. It stays so."""
        return self.remaining() == 0.0

    @property
    def reason(self) -> str:
        """Why it is lost, in words; empty while it is not."""
        if os.getpid() != self.pid:
            return f"the session belongs to process {self.pid}, and this is a forked copy"
        return self._reason or ("" if self.remaining() else self._overdue())

    def wait_lost(self, timeout: float | None = None) -> bool:
        """Wait until the session is lost or closed. False: it was not, for `timeout` seconds."""
        return self._lost.wait(timeout)

    def now(self) -> float:
        """What the session's clock says, in seconds."""
        return self._clock()

    def assert_trusted(self) -> None:
        """`LockLost` unless the session can be trusted right now."""
        if self._over or os.getpid() != self.pid or self._clock() >= self._deadline:
            raise LockLost(self.reason)

    def _overdue(self) -> str:
        return f"no renewal of lease {self.lease:x} was confirmed within its {self.ttl} s"

    def _lose(self, reason: str) -> None:
        with self._changed:
            if self._lost.is_set():
                return
            self._reason, self._over = reason, True
            self._lost.set()
            self._changed.notify_all()
        self.contenders.lose_all(reason)
        self.wakeups.wake_all()
        if self._on_lost is not None:
            self._on_lost(reason)

    def lease_gone(self) -> None:
        """etcd said that there is no such lease: lost, now."""
        self._lose(f"lease {self.lease:x} has expired or was revoked")

    def _proves(self, header: Header) -> bool:
        """Whether the reply comes from a member that is not behind one that has answered before."""
        if header.raft_term == self._term:  # as nearly always
            return True
        with self._changed:
            if header.raft_term < self._term:
                return False
            self._term = header.raft_term
            return True

    # -- requests

    def txn(self, txn: Txn, *, timeout: float | None = None) -> TxnReply:
        """Send `txn`. A reply from before an election that we know of is no answer: `EtcdUnavailable`.

        `PermissionDenied` says what the role lacks.
        """
        try:
            reply = self.transport.txn(txn, timeout=timeout)
        except PermissionDenied as error:
            raise denied(error, txn, self._namespace, self.lease) from error
        if not self._proves(reply.header):
            raise EtcdUnavailable("an etcd member answered that is behind an election", True)
        return reply

    def saw_own_key(self, kvs: Sequence[KeyValue], *, sent_in: int) -> None:
        """Take note of the session's key, as a request of the epoch `sent_in` found it. `LockLost` if it is gone."""
        if not kvs:
            self._lose(f"the session's key {self.key} was deleted")
        elif kvs[0].mod_revision < sent_in:
            self._lose("etcd's history was set back: it was restored, or is another etcd")
        else:
            self.epoch_is(kvs[0].mod_revision)
        self.assert_trusted()

    def epoch_is(self, revision: int) -> None:
        """Take note that the session's key was last put at `revision`."""
        with self._changed:
            self.epoch = max(self.epoch, revision)

    # -- keeping

    def _watch_deadline(self) -> None:
        while not self._lost.is_set():
            with self._changed:
                now = self._clock()
                left, until_expiry = self._deadline - now, self.expiries.next_due() - now
                if left > 0 and until_expiry > 0:
                    # Not longer than a second: after a suspension the wait's own clock is behind ours.
                    self._changed.wait(min(left, until_expiry, 1.0) if len(self.contenders) else left)
                    continue
            if left > 0:
                self.expiries.run(now)
            else:
                self._lose(self._overdue())

    def expire(self, expiry: Expiry) -> None:
        """Stop vouching for a contender when `expiry` says so."""
        self.expiries.add(expiry)
        with self._changed:
            self._changed.notify_all()

    def _keep(self) -> None:
        while not self._lost.is_set():
            try:
                pause = self.keep()
            except Exception:
                logger.exception("etcd_lock.keep_failed")
                pause = 0.5
            with self._changed:
                if not (self._hurried or self._lost.is_set()):
                    self._changed.wait(pause)
                self._hurried = False

    def keep(self) -> float:
        """Do what is due: renew, finish removals, check the keys. Returns the seconds until the next is."""
        now = self._clock()
        if now >= self._renewal_due and not self._renew():
            return min(0.2, self.ttl / 20)
        if self.contenders.unfinished and now >= self._finish_due:
            # The renewal goes first, however much there is to tidy up.
            done = self.contenders.finish(max(0.1, self.ttl / 6), lambda: self._clock() < self._renewal_due)
            self._finish_due = 0.0 if done else self._clock() + self._pause_to_finish()
        if now >= self._check_due:
            self._check_due = now + self.ttl
            if len(self.contenders):
                self._check_keys()
        due = min(self._renewal_due, self._check_due)
        if self.contenders.unfinished:
            due = min(due, self._finish_due)
        return max(0.0, due - self._clock())

    def _pause_to_finish(self) -> float:
        """Until removals are tried again; longer and longer for those that etcd refuses."""
        pause, refused = min(1.0, self.ttl / 10), self.contenders.refused
        if not refused:
            self._refused_since = None
            return pause
        now = self._clock()
        self._refused_since = now if self._refused_since is None else self._refused_since
        if now - self._refused_since >= self.ttl and self.contenders.idle:
            # Nobody here holds anything, and what is left over keeps others out for as long as the lease is renewed.
            self._lose(f"etcd has refused for {self.ttl} s to take back what lease {self.lease:x} no longer needs")
        return min(pause * 2.0 ** min(refused - 1, 10), self.ttl / 3)

    def hurry(self) -> None:
        """Let the background do what is due now, not at its next round."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def _renew(self) -> bool:
        sent = self._clock()
        try:
            reply = self.transport.lease_renew(self.lease, timeout=max(0.1, min(5.0, self._deadline - sent)))
        except LeaseNotFound:
            self.lease_gone()
            return True
        except EtcdLockError as error:
            if not (self._failing or self._lost.is_set()):  # a request that `close` cut off is no news
                self._failing = True
                logger.warning("etcd_lock.renewal_failed: %s (trusted for %.1f s more)", error, self.remaining())
            return False
        if not self._proves(reply.header):
            return False
        if reply.ttl <= 0:
            self.lease_gone()
            return True
        with self._changed:
            self._deadline = max(self._deadline, trusted_until(sent, reply.ttl))
            self._renewal_due = sent + reply.ttl / 3
            self._failing = False
            self._changed.notify_all()
        return True

    def _check_keys(self) -> None:
        held = self.contenders.existing()
        try:
            reply = self.transport.lease_time_to_live(self.lease, keys=True, timeout=max(0.1, self.ttl / 6))
            if not self._proves(reply.header):
                return
            if reply.ttl <= 0:
                self.lease_gone()
                return
            listed = set(reply.keys)
            if self.key not in listed and not self.transport.range(Range(self.key)).kvs:
                self._lose(f"the session's key {self.key} was deleted")
                return
            self.contenders.check_missing(held, listed)
            self.contenders.remove_strays(listed)
            self.contenders.check_siblings(self._clock())
            heed(self, self._namespace, listed)
        except EtcdLockError as error:
            if not self._lost.is_set():
                logger.warning("etcd_lock.check_failed: %s", error)

    # -- the end

    def close(self) -> None:
        """Give everything back: revoke the lease, and with it every key. Safe to call twice; never raises."""
        if self._closed or os.getpid() != self.pid:
            return
        lost = self._lost.is_set()
        # A session that was lost may live on in etcd. Where somebody still works under a lock of it, that keeps the
        # others out for a while longer.
        leave = lost and not self.contenders.idle
        self._on_lost = None  # that it is closed is no news
        self._lose("the session was closed")
        self._closed = True
        if not leave:
            try:
                self.transport.lease_revoke(self.lease, timeout=1.0 if lost else None)
            except EtcdLockError as error:
                logger.info("etcd_lock.revoke_failed: lease %x: %s", self.lease, error)
        if self._owns_transport:
            self.transport.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"lost: {self.reason}" if self.lost else f"{self.remaining():.1f} s left"
        return f"<Session lease={self.lease:x} ttl={self.ttl} {state}>"
