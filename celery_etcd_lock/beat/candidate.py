"""Standing for election, in a thread of its own: what the thread that ticks does, or sleeps, costs no leadership::

    asking ──▶ standing by ──▶ leading ──▶ (lost, or given up) asking
      └──────────────────────────────────────────┘

It never gives up, whatever etcd says or does not say: no beat ends because of etcd.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

from celery_etcd_lock import signals
from celery_etcd_lock.beat.broker import Broker
from celery_etcd_lock.beat.clocks import Clocks
from celery_etcd_lock.beat.outage import Outage
from celery_etcd_lock.beat.record import leader_name
from celery_etcd_lock.etcd.api import Range, prefix_end
from celery_etcd_lock.exceptions import EtcdLockError, LockLost
from celery_etcd_lock.locks.election import Election, Leader, Leadership
from celery_etcd_lock.locks.queue import value_of
from celery_etcd_lock.locks.session import Session
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.instance import instance

__all__ = ["Candidate", "who"]

logger = logging.getLogger("celery_etcd_lock")

_PAUSE = 1.0
"""Seconds between two tries to get into touch with etcd."""

_LOOK = 1.0
"""Seconds between two looks whether this beat, which leads, reaches the broker. Asks nobody."""


class Candidate:
    """This beat, in the election of all that have its name.

    `project`: the app's name, by which two projects find out. `send` is called with a signal and its record.
    """

    def __init__(
        self, settings: Settings, outage: Outage, broker: Broker, project: str, send: Callable[[Any, Any], None]
    ) -> None:  # fmt: skip
        self._settings = settings
        self._project = project
        self._outage = outage
        self._broker = broker
        self._send = send
        self._thread: threading.Thread | None = None
        self._transport = settings.connect()
        self._session: Session | None = None
        self._leadership: Leadership | None = None
        self._elected = threading.Event()
        self._closed = threading.Event()

    @property
    def leadership(self) -> Leadership | None:
        """This beat's, if it surely leads right now. Asks the clock, not etcd."""
        leadership = self._leadership
        return leadership if leadership is not None and leadership.is_held() else None

    def wait(self, seconds: float) -> None:
        """Stand by, for this long or until elected. The first call begins to stand for election."""
        if self._thread is None and not self._closed.is_set():
            self._thread = threading.Thread(target=self._stand, name="etcd-lock-beat", daemon=True)
            self._thread.start()
        self._elected.wait(seconds)

    def close(self) -> None:
        """Step down, for the next to lead at once. Safe to call twice; never raises."""
        self._closed.set()
        if self._session is not None:
            self._session.close()
        self._transport.close()

    # -- in the thread

    def _stand(self) -> None:
        since = time.monotonic()
        while not self._closed.is_set():
            if self._broker.is_tried:  # since the last term: it may hang, and with it the thread that would tick
                self._closed.wait(_PAUSE)
                continue
            try:
                since = self._one_session(since)
            except EtcdLockError as error:
                if not self._closed.is_set():
                    self._outage.fails(error)
            except Exception:
                if not self._closed.is_set():
                    logger.exception("etcd_lock.beat_failed")
            self._closed.wait(_PAUSE)

    def _one_session(self, since: float) -> float:
        """Stand by since `since` (monotonic), be elected, lead, be deposed. Returns since when it stands by again."""
        settings = self._settings
        session = self._session = Session(
            self._transport, ttl=settings.beat_ttl, namespace=settings.namespace, instance=instance()
        )
        try:
            if self._closed.is_set():
                return since
            self._outage.over()
            election = Election(session, leader_name(settings.namespace, settings.beat_name))
            self._say_who_leads(election.leader())
            try:
                leadership = election.campaign(self._description(session))
            except LockLost as lost:
                if not self._closed.is_set():
                    logger.warning("etcd_lock.standby_lost: %s; this beat stands for election again", lost)
                return since
            self._lead(leadership, time.monotonic() - since)
            return time.monotonic()
        finally:
            session.close()

    def _lead(self, leadership: Leadership, waited: float) -> None:
        began, beat, deposed = time.monotonic(), self._settings.beat_name, threading.Event()
        self._send(
            signals.leader_elected,
            signals.LeaderElectedRecord(beat, leadership.key, leadership.fencing_token, waited),
        )
        self._leadership = leadership
        self._elected.set()
        leadership.on_lost(lambda _reason: deposed.set())
        clocks = Clocks(self._transport, leadership.name, leadership.fencing_token + 1, leadership.session.ttl)
        given_up = self._await_end(leadership, deposed)
        clocks.close()
        self._elected.clear()
        self._leadership = None
        if given_up:
            leadership.resign()
        if not self._closed.is_set():
            seconds = time.monotonic() - began
            record = signals.LeaderLostRecord(beat, leadership.key, given_up or leadership.why_not(), seconds)
            self._send(signals.leader_lost, record)

    def _await_end(self, leadership: Leadership, deposed: threading.Event) -> str:
        """Until it is lost, or to be given up. Returns why it is given up; ``""``: it is lost."""
        broker, ttl = self._broker, self._settings.beat_ttl
        began = ask_at = broker.now()
        while not deposed.wait(_LOOK):
            away = broker.away(began)
            if away < broker.patience(ttl) or broker.now() < ask_at:
                continue
            ask_at = broker.now() + ttl
            if self._another_stands_by(leadership):
                broker.gives_up()
                since = (datetime.now(timezone.utc) - timedelta(seconds=away)).isoformat(timespec="seconds")
                logger.warning(
                    "etcd_lock.beat_without_broker: no broker since %s, for %.0f s: this beat, which leads %r, steps "
                    "down for one that stands by, and stands for election again",
                    since, away, self._settings.beat_name,
                )  # fmt: skip
                return f"it had no broker for {away:.0f} s"
        return ""

    def _another_stands_by(self, leadership: Leadership) -> bool:
        start = leadership.name + "/"
        candidates = Range(start, prefix_end(start), count_only=True)
        try:
            return self._transport.range(candidates, timeout=self._settings.timeout).count > 1
        except EtcdLockError:
            return False  # then this beat does not lead for long

    def _say_who_leads(self, leader: Leader | None) -> None:
        if leader is None:
            return
        beat, project = self._settings.beat_name, said_by(leader).get("app")
        logger.info("etcd_lock.standby: %s leads %r, and this beat stands by", who(leader), beat)
        if project and self._project and project != self._project:
            logger.warning(
                "etcd_lock.another_project: %s, which leads %r, is a beat of the app %r and sends nothing of %r: give "
                "each project an etcd_lock_namespace of its own",
                who(leader), beat, project, self._project,
            )  # fmt: skip

    def _description(self, session: Session) -> str:
        since = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return value_of(
            host=session.host,
            pid=session.pid,
            since=since,
            nonce=secrets.token_hex(6),
            extra={"app": self._project} if self._project else None,
        ).decode()


def said_by(leader: Leader) -> dict[str, Any]:
    """What a leader says of itself."""
    try:
        said = json.loads(leader.value)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def who(leader: Leader) -> str:
    """The leader, for people."""
    said = said_by(leader)
    return f"{said['host']}:{said['pid']}" if said.keys() >= {"host", "pid"} else leader.key
