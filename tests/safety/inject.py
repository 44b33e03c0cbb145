"""Carries out a plan of faults on a running cluster, its proxies and its clients, and writes down what it did."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import methodcaller

import urllib3

from celery_etcd_lock.etcd.api import Delete, KeyValue, Range, Transport, Txn, created_at, prefix_end
from celery_etcd_lock.exceptions import EtcdLockError, EtcdUnavailable
from celery_etcd_lock.locks.queue import is_contender
from celery_etcd_lock.testing import EtcdCluster, EtcdServer
from tests.safety import history
from tests.safety.clients import Clients
from tests.safety.faults import TRACKS, Fault, Kind, Side
from tests.safety.history import now
from tests.safety.proxy import Direction, Proxy
from tests.safety.run import Run

__all__ = ["Injector"]

logger = logging.getLogger(__name__)

_TRIES = 20
"""For a key that may be gone before it is deleted, or a leader that is another by then."""
_LATEST = 0.12
"""In TTLs, an answer's delay. A renewal waits for 0.14 at least, on each member, before it asks the next."""
_LOST: Sequence[tuple[Direction, ...]] = (("to_member",), ("to_client",), ())


class Injector:
    """`proxies` are, for each side of clients, those of the members, in their order. `etcd` goes past them."""

    def __init__(
        self,
        cluster: EtcdCluster,
        proxies: Mapping[Side, Sequence[Proxy]],
        clients: Clients,
        run: Run,
        etcd: Transport,
    ) -> None:
        self.injected: Counter[Kind] = Counter()
        """What was really done."""
        self._cluster = cluster
        self._proxies = proxies
        self._clients = clients
        self._run = run
        self._witness = run.witness
        self._recorder = run.recorder
        self._prefix = run.options.prefix
        self._ttl = run.options.ttl
        self._etcd = etcd
        self._pool = urllib3.PoolManager(timeout=10, retries=False)
        self._ended = threading.Event()
        self._failures: list[BaseException] = []
        self._besides: list[threading.Thread] = []
        self._does: Mapping[Kind, Callable[[Fault], bool]] = {
            "member killed": self._kill_member,
            "member stopped": self._stop_member,
            "leader moved": self._move_leader,
            "network delays": self._network,
            "network drops": self._network,
            "network black hole": self._network,
            "network resets": self._network,
            "network fades": self._network,
            "holder killed": self._kill_holder,
            "holder stopped": self._stop_holder,
            "GIL held": self._hold_gil,
            "key deleted": self._delete_key,
            "lease revoked": self._revoke_lease,
            "history compacted": self._compact,
        }

    def run(self, plan: Sequence[Fault]) -> None:
        """Do all of it, and leave everything whole. Raises what went wrong with the injection itself."""
        began = now()
        tracks = [[fault for fault in plan if TRACKS[fault.kind] == track] for track in sorted(set(TRACKS.values()))]
        threads = [
            threading.Thread(target=self._follow, args=(track, began), name="faults", daemon=True) for track in tracks
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
            for thread in self._besides:
                thread.join()
        finally:
            self._ended.set()  # for Ctrl-C: what is under way is undone
            for thread in threads + self._besides:
                thread.join(60)
            self._pool.clear()
        if self._failures:
            raise self._failures[0]

    def _follow(self, track: Sequence[Fault], began: float) -> None:
        try:
            for fault in track:
                self._wait(began + fault.at - now())
                if self._ended.is_set():
                    return
                logger.info("%6.1f s: %s", now() - began, fault)
                if self._does[fault.kind](fault):
                    self.injected[fault.kind] += 1
        except BaseException as failure:
            self._failures.append(failure)
            self._ended.set()
            raise

    def _wait(self, seconds: float) -> None:
        self._ended.wait(max(0.0, seconds))

    @contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        """Write down, for people, that this was so for the length of the block."""
        at = now()
        try:
            yield
        finally:
            self._recorder.write(history.Fault("other", at, now(), what=what))

    # -- members

    def _members(self, fault: Fault) -> list[EtcdServer]:
        """Whom the fault is meant for, as things stand now."""
        if fault.target == "all":
            return self._cluster.members
        leader = self._cluster.leader()
        if fault.target == "leader":
            return [leader]
        followers = [member for member in self._cluster.members if member is not leader]
        return [fault.picked(followers)]

    def _kill_member(self, fault: Fault) -> bool:
        (member,) = self._members(fault)
        with self._noted(f"{member.name}, {fault.target}, killed"):
            member.kill()
            try:
                self._wait(fault.for_)
            finally:
                member.start()
        return True

    def _stop_member(self, fault: Fault) -> bool:
        (member,) = self._members(fault)
        with self._noted(f"{member.name}, {fault.target}, stopped"):
            member.pause()
            try:
                self._wait(fault.for_)
            finally:
                member.resume()
        return True

    def _move_leader(self, fault: Fault) -> bool:
        """By the leader's own RPC; it may have been voted out before it hears of it."""
        for _ in range(_TRIES):
            leader, (follower,) = self._cluster.leader(), self._members(fault)
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                at = now()
                status = self._post(follower, "/v3/maintenance/status", {})
                answer = status and self._post(
                    leader, "/v3/maintenance/transfer-leadership", {"targetID": status["header"]["member_id"]}
                )
                if answer is not None:
                    what = f"the leader moved from {leader.name} to {follower.name}"
                    self._recorder.write(history.Fault("other", at, now(), what=what))
                    return True
            self._wait(0.1)
        return False

    def _compact(self, fault: Fault) -> bool:
        """Up to what the witness has been told of, and no further: it must not lose anything."""
        for member in self._cluster.members:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                at, told = now(), self._witness.told
                if self._post(member, "/v3/kv/compaction", {"revision": str(told), "physical": True}) is not None:
                    what = f"history compacted up to revision {told}"
                    self._recorder.write(history.Fault("other", at, now(), what=what))
                    return True
        return False

    def _post(self, member: EtcdServer, path: str, body: object) -> dict[str, dict[str, str]] | None:
        """None: etcd said no."""
        reply = self._pool.request("POST", member.url + path, body=json.dumps(body))
        return json.loads(reply.data) if reply.status == 200 else None

    # -- the network

    def _network(self, fault: Fault) -> bool:
        members = self._members(fault)
        sides = [fault.side] if fault.side in self._proxies else list(self._proxies)
        proxies = [
            proxy
            for side in sides
            for member, proxy in zip(self._cluster.members, self._proxies[side], strict=True)
            if member in members
        ]
        where = f"{' and '.join(sides)} of {', '.join(member.name for member in members)}"
        with self._noted(f"{fault.kind}, {where}"):
            try:
                for tell in self._told(fault):
                    for proxy in proxies:
                        tell(proxy)
            finally:
                for proxy in proxies:
                    proxy.pass_on()
        return True

    def _told(self, fault: Fault) -> Iterator[Callable[[Proxy], None]]:
        """What to tell each proxy, one after the other; the last holds until the fault is over."""
        over = now() + fault.for_
        match fault.kind:
            case "network delays":
                yield methodcaller("delay", 0.02 + 0.4 * fault.pick)
            case "network drops":
                yield methodcaller("drop", *fault.picked(_LOST))
            case "network resets":
                yield Proxy.reset
            case "network black hole":
                yield Proxy.black_hole
            case "network fades":  # answers come ever later, in the end as late as clients still wait; then none come
                for part, seconds in ((0.06, 0.3), (0.12, 0.3), (_LATEST, 0.4 * self._ttl)):
                    yield methodcaller("delay", part * self._ttl, "to_client")
                    self._wait(seconds)
                yield methodcaller("fade", _LATEST * self._ttl)
        self._wait(over - now())

    # -- the clients

    def _kill_holder(self, fault: Fault) -> bool:
        holder = fault.picked(self._clients.running)
        self._run.kill(holder)
        self._clients.replace(holder)
        return True

    def _stop_holder(self, fault: Fault) -> bool:
        holder = fault.picked(self._clients.running)
        self._run.freeze(holder)
        try:
            self._wait(fault.for_)
        finally:
            self._run.thaw(holder)
        return True

    def _hold_gil(self, fault: Fault) -> bool:
        """Beside what comes next: when the client gets to it is up to its dice."""

        def hold() -> None:
            with self._noted("a client that holds the GIL"):
                if self._clients.hold_gil(fault.for_, self._ended):
                    self.injected[fault.kind] += 1

        thread = threading.Thread(target=hold, name="GIL", daemon=True)
        self._besides.append(thread)
        thread.start()
        return False

    def _delete_key(self, fault: Fault) -> bool:
        for _ in range(_TRIES):
            contender = self._contender(fault)
            if contender is None:
                continue
            condition = created_at(contender.key, contender.create_revision)
            at = now()
            try:
                reply = self._etcd.txn(Txn([condition], [Delete(contender.key)]))
            except EtcdLockError:
                self._recorder.write(history.Fault("key_deleted", at, now(), key=contender.key))
                return True  # perhaps
            if reply.succeeded:
                revision = 0 if reply.header.unanswered else reply.header.revision
                self._recorder.write(history.Fault("key_deleted", at, now(), key=contender.key, revision=revision))
                return True
            if reply.header.unanswered:  # an attempt before it may have done it
                self._recorder.write(history.Fault("key_deleted", at, now(), key=contender.key))
        return False

    def _revoke_lease(self, fault: Fault) -> bool:
        for _ in range(_TRIES):
            contender = self._contender(fault)
            if contender is None:
                continue
            at = now()
            with contextlib.suppress(EtcdLockError):  # gone, or perhaps done
                self._etcd.lease_revoke(contender.lease)
            self._recorder.write(history.Fault("lease_revoked", at, now(), lease=contender.lease))
            return True
        return False

    def _contender(self, fault: Fault) -> KeyValue | None:
        """One that is there, as the witness knows already: every other time whoever is first in line."""
        try:
            reply = self._etcd.range(Range(self._prefix, prefix_end(self._prefix), sort="create"))
        except EtcdUnavailable:
            self._wait(0.2)
            return None
        there = [kv for kv in reply.kvs if is_contender(kv.key, kv.lease)]
        first = {kv.key.split("/write/")[0].split("/read/")[0].split("/slot/")[0]: kv for kv in reversed(there)}
        several = list(first.values()) if int(fault.pick * 100) % 2 else there
        until = now() + 1.0
        while self._witness.told < reply.header.revision and now() < until:
            self._wait(0.002)
        if not several or self._witness.told < reply.header.revision:
            self._wait(0.5)  # all of them may have just been started, or be cut off
            return None
        return fault.picked(several)
