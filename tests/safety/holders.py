"""A client process: several threads that take locks at random and write down what happens to them.

    python -m tests.safety.holders --endpoints URL[,URL] --history FOLDER --store PORT [--seed N] [--threads 4] …

It survives whatever the library raises, opens a new session when one is lost, and ends cleanly, all holds given
back, on SIGTERM, after ``--seconds``, or when each thread has had the ``--times`` it was told. Its choices are random
from the seed; what comes of them depends on the others.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import LeaseReply, Transport, Txn, TxnReply
from celery_etcd_lock.exceptions import EtcdLockError, EtcdUnavailable
from celery_etcd_lock.locks import HeldLock, Mutex, RWLock, Semaphore, Session
from celery_etcd_lock.locks.lock import Lock
from tests.safety.broken import BREAKS, LateRenewals
from tests.safety.history import Event, EventKind, Fault, Recorder, now
from tests.safety.store import EtcdStore, StoreClient

__all__ = ["LOCKS", "Options", "command", "main"]

LOCKS = "mutex:m1,mutex:m2,rw:r1,slot:s1:2"
_PULSE = 0.02
_STALL = 0.04


@dataclass(frozen=True)
class Options:
    """What a holder process is told on its command line; `command` makes that line."""

    endpoints: str
    history: str
    store: int
    """The port of the `FencedStore`."""
    transport: Literal["gateway", "grpc"] = "gateway"
    prefix: str = "/safety/locks/"
    """Of all lock names: what the witness watches."""
    locks: str = LOCKS
    """``mutex:NAME``, ``rw:NAME``, ``slot:NAME:LIMIT``, with commas. A name has one kind."""
    seed: int = 0
    threads: int = 4
    sessions: int = 1
    """Threads share them, in turn."""
    ttl: int = 3
    timeout: float = 2.0
    """Of an etcd request, in seconds."""
    seconds: float = 0.0
    """How long; 0: until SIGTERM."""
    stay: float = 0.01
    """The longest step of a body, in seconds; it has one to four."""
    body: float = 0.0
    """Instead: every body lasts so many seconds, and looks twenty times in each; or until SIGTERM."""
    times: int = 0
    """After how many acquisitions a thread ends; 0: it goes on."""
    pinned: int = 0
    """1: a thread keeps to one of the locks, the next thread to the next, and so on."""
    wait: float = 3.0
    """The longest timeout of an acquire, in seconds; 0: every acquire waits for as long as it takes."""
    gil: float = 0.0
    """For how long a body holds the GIL in the end, if it does, in seconds; 0: none does."""
    gil_odds: float = 0.02
    """How many of the bodies do."""
    broken: str = ""
    """One of `BREAKS`."""
    late_renewals: float = 0.0
    """The first renewal is answered so many seconds late, all others are lost."""


def command(options: Options) -> list[str]:
    """What to start, from the checkout's root."""
    said = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items()]
    return [sys.executable, "-m", "tests.safety.holders", *said]


class Noting:
    """`inner`, and a note of what was said of leases: of each promise by etcd, and of each end that we ask for.

    An answer from before an election that an answer has told of already is no promise.
    """

    def __init__(self, inner: Transport, recorder: Recorder) -> None:
        self._inner = inner
        self._recorder = recorder
        self._term = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def txn(self, request: Txn, **options: Any) -> TxnReply:
        reply = self._inner.txn(request, **options)
        self._term = max(self._term, reply.header.raft_term)
        return reply

    def lease_grant(self, ttl: int, **options: Any) -> LeaseReply:
        return self._promised(now(), self._inner.lease_grant(ttl, **options))

    def lease_renew(self, lease: int, **options: Any) -> LeaseReply:
        return self._promised(now(), self._inner.lease_renew(lease, **options))

    def _promised(self, sent: float, reply: LeaseReply) -> LeaseReply:
        if reply.ttl > 0 and reply.header.raft_term >= self._term:
            self._term = reply.header.raft_term
            self._recorder.write(Fault("lease_promised", sent, now(), lease=reply.lease, until=sent + reply.ttl))
        return reply

    def lease_revoke(self, lease: int, **options: Any) -> Any:
        self._recorder.write(Fault("session_ended", now(), lease=lease))
        return self._inner.lease_revoke(lease, **options)


class Sessions:
    """One session, and the next when that is lost."""

    def __init__(self, options: Options, recorder: Recorder) -> None:
        self._options = options
        self._recorder = recorder
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._transport: Transport | None = None
        self._closed = False

    def get(self) -> Session:
        """One that is not lost. `EtcdLockError` if there is none to be had."""
        with self._lock:
            if self._closed:
                raise EtcdUnavailable("the process is about to end")
            if self._session is None or self._session.lost:
                self._close()
                options = self._options
                transport = connect(options.endpoints, timeout=options.timeout, transport=options.transport)
                transport = cast("Transport", Noting(transport, self._recorder))
                if options.late_renewals:
                    transport = cast("Transport", LateRenewals(transport, options.late_renewals))
                try:
                    self._session = Session(transport, ttl=options.ttl, namespace=options.prefix.strip("/"))
                except BaseException:
                    transport.close()
                    raise
                self._transport = transport
            return self._session

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._close()

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._transport is not None:
            self._transport.close()


class Holder(threading.Thread):
    """One thread that takes and gives back locks until told to stop."""

    def __init__(
        self,
        number: int,
        options: Options,
        sessions: Sessions,
        recorder: Recorder,
        etcd: Transport,
        stop: threading.Event,
    ) -> None:
        super().__init__(name=f"holder-{number}", daemon=True)
        self._options = options
        self._sessions = sessions
        self._recorder = recorder
        self._stop_asked = stop
        self._random = random.Random(f"{options.seed}/{number}")
        self._store = StoreClient(options.store)
        self._etcd_store = EtcdStore(etcd, recorder)
        self._kinds = [each.split(":") for each in options.locks.split(",")]
        if options.pinned:
            self._kinds = [self._kinds[number % len(self._kinds)]]
        self._count = 0
        self._got = 0

    def run(self) -> None:
        while not self.stopping and (self._got < self._options.times or not self._options.times):
            try:
                session = self._sessions.get()
            except EtcdLockError:
                self._stop_asked.wait(0.2)
                continue
            self._once(self._choose(session))
            if self._random.random() < 0.2:
                self._stop_asked.wait(self._random.uniform(0, 0.02))
        self._store.close()

    def _choose(self, session: Session) -> Lock:
        kind, name, *limit = self._random.choice(self._kinds)
        name = self._options.prefix + name
        if kind == "mutex":
            return Mutex(session, name)
        if kind == "slot":
            return Semaphore(session, name, limit=int(limit[0]))
        both = RWLock(session, name)
        return both.read() if self._random.random() < 0.7 else both.write()

    def _once(self, lock: Lock) -> None:
        self._count += 1
        hold = _Hold(self, lock, f"{os.getpid()}-{self.name}-{self._count}")
        how: dict[str, Any] = {}
        if self._options.wait:
            dice = self._random.random()
            if dice < 0.1:
                how = {"blocking": False}
            elif dice < 0.9:
                how = {"timeout": self._random.uniform(0.1, self._options.wait)}
        hold.say("queued", now())
        try:
            held = lock.acquire(**how)
        except EtcdLockError as error:
            hold.say("refused", now(), why=f"{type(error).__name__}: {error}")
            if isinstance(error, EtcdUnavailable):
                self._stop_asked.wait(self._random.uniform(0.02, 0.2))
            return
        self._got += 1
        hold.run(held)

    # -- what a hold needs of its thread

    def record(self, event: Event) -> None:
        self._recorder.write(event)

    @property
    def stopping(self) -> bool:
        return self._stop_asked.is_set()

    def steps(self) -> list[float]:
        if self._options.body:
            return [0.05] * round(self._options.body / 0.05)
        return [self._random.uniform(0, self._options.stay) for _ in range(self._random.randint(1, 4))]

    def holds_gil(self) -> float:
        options = self._options
        return options.gil if options.gil and self._random.random() < options.gil_odds else 0.0

    def write(self, hold: str, lock: Lock, held: HeldLock) -> bool | None:
        """One write under the lock: taken, refused, or (None) nobody knows."""
        name, mode, token = lock.name, lock.mode.kind, held.fencing_token
        if mode != "slot":
            return self._store.write(name, mode, token, hold)
        try:
            return self._etcd_store.write(name, mode, token, hold, held.compare())
        except EtcdUnavailable:
            return None


class _Hold:
    """One acquisition, from before it is asked for."""

    def __init__(self, thread: Holder, lock: Lock, id_: str) -> None:
        self._thread = thread
        self._lock = lock
        self._id = id_

    def say(self, kind: EventKind, at: float, **more: Any) -> None:
        mode = self._lock.mode
        who: tuple[Any, ...] = (os.getpid(), self._thread.name, self._id, self._lock.name, mode.kind, mode.limit)
        self._thread.record(Event(kind, at, *who, **more))

    def run(self, held: HeldLock) -> None:
        about = {"key": held.key, "created": held.compare().operand, "token": held.fencing_token}
        about["lease"] = self._lock.session.lease
        if not self.look(held, "acquired", about):
            held.release()
            return
        held.on_lost(lambda reason: self.say("lost", now(), why=reason))
        if self.body(held):
            self.say("left", now())
            # After `left`: whoever gets in before that is over, and writes, is written against.
            self.write(held, 15.0)
        else:
            self.write_late(held)
        self.say("released", now(), why=held.release())

    def look(self, held: HeldLock, kind: EventKind, about: dict[str, Any]) -> bool:
        """Ask whether it is held, and write down what was promised."""
        at = now()
        remaining = held.remaining()
        if not held.is_held():
            self.say("refused" if kind == "acquired" else "lost", now(), why=held.why_not())
            return False
        self.say(kind, at, remaining=remaining, **about)
        return True

    def body(self, held: HeldLock) -> bool:
        """The critical section. False: the lock was lost in it."""
        self.write(held, 0.0)
        for pause in self._thread.steps():
            time.sleep(pause)
            if not self.look(held, "looked", {}):
                return False
            if self._thread.stopping:
                break
        seconds = self._thread.holds_gil()
        if seconds:
            self.say("gil_taken", now())
            ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))
            self.say("gil_given", now())
        return self.look(held, "looked", {})

    def write(self, held: HeldLock, seconds: float) -> bool | None:
        """Write once; if nobody knows what became of it, again for so many seconds."""
        until = now() + seconds
        while (answer := self._thread.write(self._id, self._lock, held)) is None and now() < until:
            time.sleep(0.1)
        return answer

    def write_late(self, held: HeldLock) -> None:
        """What a body does that never looks: go on writing. Until it is refused, or there is nobody to lose to."""
        until = now() + 2.0
        while self.write(held, 15.0) and now() < until:
            time.sleep(0.02)


def _pulse(recorder: Recorder) -> None:
    """Write down when this process did not get to run."""
    while True:
        due = now() + _PULSE
        time.sleep(_PULSE)
        at = now()
        if at > due + _STALL:
            recorder.write(Event("stalled", at, os.getpid(), since=due))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.broken:
        BREAKS[options.broken]()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is for whoever started us
    recorder = Recorder(Path(options.history), "holder")
    threading.Thread(target=_pulse, args=(recorder,), daemon=True).start()
    etcd = connect(options.endpoints, timeout=options.timeout, transport=options.transport)
    sessions = [Sessions(options, recorder) for _ in range(options.sessions)]
    holders = [
        Holder(number, options, sessions[number % len(sessions)], recorder, etcd, stop)
        for number in range(options.threads)
    ]
    for holder in holders:
        holder.start()
    until = now() + (options.seconds or float("inf"))
    while not stop.is_set() and now() < until and any(holder.is_alive() for holder in holders):
        time.sleep(0.05)  # not a wait for `stop`: the signal's handler, in this very thread, could not set it then
    stop.set()
    _join(holders, options.wait + options.timeout + 5)
    for each in sessions:  # whoever still waits is told that the session is lost
        each.close()
    left = _join(holders, 30)
    etcd.close()
    return len(left)


def _join(holders: Sequence[Holder], seconds: float) -> list[Holder]:
    until = now() + seconds
    for holder in holders:
        holder.join(max(0.0, until - now()))
    return [holder for holder in holders if holder.is_alive()]


def _options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m tests.safety.holders", description=__doc__)
    parser.add_argument("--endpoints", required=True)
    parser.add_argument("--history", required=True)
    parser.add_argument("--store", required=True, type=int)
    for name, field in Options.__dataclass_fields__.items():
        if name not in ("endpoints", "history", "store"):
            choices = ["", *BREAKS] if name == "broken" else None
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=type(field.default), default=field.default, choices=choices
            )
    return Options(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
