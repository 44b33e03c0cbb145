"""A look at each endpoint by itself: is it there, who is it, how quick is it, what ails it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from celery_etcd_lock.cli.doctor.faults import LEASES_END_EARLY, OLDEST, faults_of, parsed, written
from celery_etcd_lock.cli.doctor.findings import Finding
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Range, Status, Transport
from celery_etcd_lock.exceptions import AuthRejected, EtcdLockError, EtcdRejected, PermissionDenied
from celery_etcd_lock.settings import Settings

__all__ = ["MAKE_ROOM", "Member", "about_members", "about_versions", "look_at_all"]

_READS = 5
_SLOW = 0.1
"""Seconds for one read that is more than a good network and disk take."""

MAKE_ROOM = "`etcdctl compact <revision>`, then `etcdctl defrag --cluster`, then `etcdctl alarm disarm`"

_GRACE = 1.0
"""Seconds on top of its timeout, after which an endpoint is given up: the look-up of a host's name has no timeout."""


@dataclass(frozen=True)
class Member:
    """What an endpoint has said."""

    url: str
    status: Status | None = None
    error: EtcdLockError | None = None
    """Why there is no status; or, with one, why it answers no reads."""
    cluster_id: int = 0
    seconds: tuple[float, ...] = ()
    """What each read took that went through the cluster's majority."""

    @property
    def lets_in(self) -> bool:
        """Whether it is there, and takes us for somebody."""
        refused = isinstance(self.error, AuthRejected) and not isinstance(self.error, PermissionDenied)
        return self.status is not None and not refused

    @property
    def serves(self) -> bool:
        """Whether it answers reads (or says, as one who may, that we may not)."""
        return self.status is not None and (self.error is None or isinstance(self.error, PermissionDenied))


def look_at_all(settings: Settings, key: str, timeout: float) -> list[Member]:
    """Every endpoint at the same time, each for `timeout` seconds and a little. `key` is read, there or not."""
    urls = settings.connection["endpoints"] or ("",)
    found: dict[str, Member] = {}

    def look(url: str) -> None:
        found[url] = _look_at(settings, url, key, timeout)

    threads = [threading.Thread(target=look, args=(url,), daemon=True) for url in dict.fromkeys(urls)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout + _GRACE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    nothing = EtcdLockError(f"nothing came of it within {timeout + _GRACE:g} s, not even an error: is its name known?")
    return [dict(found).get(url) or Member(url, error=nothing) for url in dict.fromkeys(urls)]


def _look_at(settings: Settings, url: str, key: str, timeout: float) -> Member:
    deadline = time.monotonic() + timeout
    transport: Transport | None = None
    try:
        transport = connect(**{**settings.connection, "endpoints": (url,) if url else ()})
        url = url or ", ".join(transport.endpoints)
        (status,) = transport.status(timeout=timeout)
    except EtcdLockError as error:
        if transport is not None:
            transport.close()
        return Member(url, error=error)
    seconds: list[float] = []
    cluster_id, failure = 0, None
    try:
        while len(seconds) < _READS and (left := deadline - time.monotonic()) > 0:
            began = time.monotonic()
            cluster_id = transport.range(Range(key, limit=1), timeout=left).header.cluster_id
            seconds.append(time.monotonic() - began)
    except EtcdLockError as error:
        failure = None if seconds else error
    finally:
        transport.close()
    return Member(url, status, failure, cluster_id, tuple(seconds))


def about_members(members: Sequence[Member], timeout: float) -> Iterator[Finding]:
    for member in members:
        yield _presence(member, timeout)
        if member.status is not None:
            yield from _ailments(member, member.status)
    yield from _together([member for member in members if member.status])


def _presence(member: Member, timeout: float) -> Finding:
    about = f"endpoint {member.url}" if member.url else "endpoint"
    said = str(member.error).removeprefix(f"{member.url}: ")
    rejected = None
    if isinstance(member.error, AuthRejected):
        rejected = "do what the message says; docs/security.md has the whole of it"
    elif isinstance(member.error, EtcdRejected):
        rejected = "do what the message says"
    if member.status is None:
        do = (
            "start it, correct etcd_lock_endpoints, or leave it out there; locks work while a majority of members is up"
        )
        return Finding("wrong", about, said, do if rejected is None else rejected)
    if not member.serves:
        what = f"it is there (etcd {member.status.version}), and answers no reads: {said}"
        do = "see whether it reaches the other members, and a majority of them is up"
        return Finding("wrong", about, what, do if rejected is None else rejected)
    if not member.seconds:
        return Finding("ok", about, f"etcd {member.status.version}; how quick, only a user who may read can tell")
    usual, worst = median(member.seconds), max(member.seconds)
    what = f"etcd {member.status.version}, answers in {usual * 1000:.1f} ms (at worst {worst * 1000:.1f} ms)"
    if worst > timeout / 2 or usual > _SLOW:
        do = "look at its disk (etcd's wal_fsync metrics) and the network; or raise etcd_lock_timeout and etcd_lock_ttl"
        return Finding("warning", about, what, do)
    return Finding("ok", about, what)


def _ailments(member: Member, status: Status) -> Iterator[Finding]:
    about = f"endpoint {member.url}"
    for said in status.errors:
        if "NOSPACE" in said:
            yield Finding("wrong", about, "it is full (alarm NOSPACE), and takes no writes", MAKE_ROOM)
        elif "CORRUPT" in said:
            do = "stop using it, and follow https://etcd.io/docs/latest/op-guide/data_corruption/"
            yield Finding("wrong", about, "its data is corrupt (alarm CORRUPT)", do)
        else:
            yield Finding("wrong", about, said, "see its log: it may have lost the other members, or their majority")
    if not status.leader and not status.errors:
        yield Finding("wrong", about, "it knows of no leader", "see that a majority of the members is up")


def _together(members: Sequence[Member]) -> Iterator[Finding]:
    """What several members' answers show side by side."""
    clusters = {member.cluster_id for member in members if member.cluster_id}
    if len(clusters) > 1:
        yield Finding(
            "wrong",
            "endpoints",
            f"they are of {len(clusters)} different clusters: a lock in one excludes nobody in another",
            "let etcd_lock_endpoints name members of one cluster",
        )
        return
    statuses = [member.status for member in members if member.status]
    by_member: dict[int, list[str]] = {}
    for status in statuses:
        by_member.setdefault(status.member_id, []).append(status.endpoint)
    for urls in by_member.values():
        if len(urls) > 1:
            yield Finding("note", "endpoints", f"{' and '.join(urls)} are one and the same member", "leave one out")
    leaders = {status.leader for status in statuses if status.leader}
    if len(leaders) > 1:
        yield Finding(
            "warning", "endpoints", "they do not agree who leads", "run it again: an election may be under way"
        )
    elif leaders and not leaders & by_member.keys():
        do = "name all members in etcd_lock_endpoints, so that locks go on when one is away"
        yield Finding("note", "endpoints", "the cluster has members that are not named, or do not answer", do)
    newest = max((status.revision for status in statuses), default=0)
    for status in statuses:
        if newest - status.revision > 10_000:
            what = f"it is {newest - status.revision} revisions behind the others"
            yield Finding("warning", f"endpoint {status.endpoint}", what, "look at its disk and network")


def about_versions(statuses: Iterable[Status], *, auth: bool) -> Iterator[Finding]:
    """Of each version that is there, what is known to be wrong with it."""
    versions: dict[str, list[str]] = {}
    for status in statuses:
        versions.setdefault(status.version, []).append(status.endpoint)
    for version, urls in versions.items():
        about = f"version {version}" + (f" ({', '.join(urls)})" if len(versions) > 1 else "")
        numbers = parsed(version)
        if numbers is None:
            yield Finding("unknown", about, "it is no version of etcd's that is known here")
        elif numbers < OLDEST:
            yield Finding("wrong", about, "this package needs 3.4 or later", "upgrade etcd")
        else:
            found, mended = faults_of(numbers, auth=auth)
            known = "; ".join(f"{fault.what} ({fault.reference})" for fault in found)
            if found:
                level = "wrong" if any(fault.grave for fault in found) else "warning"
                do = f"upgrade etcd to {written(mended)} or later"
                yield Finding(level, about, f"known faults: {known}", do)  # type: ignore[arg-type]
            else:
                yield Finding("ok", about, "no faults are known of it that touch locks, but for one")
    if any((parsed(version) or (0,)) >= OLDEST for version in versions):
        yield Finding("note", "versions", LEASES_END_EARLY, "fence what must not be written by two: docs/fencing.md")
    if len(versions) > 1:
        yield Finding("note", "versions", f"they differ: {', '.join(sorted(versions))}", "finish the upgrade")
