"""Processes that take locks at random, checked: without faults, with staged ones, and with locks broken on purpose."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Delete, Put, Transport, Txn, created_at
from celery_etcd_lock.testing import EtcdServer
from tests.safety.checker import Report
from tests.safety.history import Event, EventKind, Fault, now, read
from tests.safety.run import Run
from tests.safety.witness import Lifetime
from tests.workers import until

TTL = 3
_ALIVE = float("inf")


class Staged(Run):
    """A run of its own in the tests' etcd, and what is done to it."""

    def __init__(self, url: str, folder: Path, **options: Any) -> None:
        self.etcd: Transport = connect(url)
        super().__init__(url, folder, prefix=f"/safety/{uuid.uuid4().hex}/", **{"ttl": TTL, **options})

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)  # type: ignore[arg-type]
        prefix = self.options.prefix
        self.etcd.delete(Delete(prefix, prefix[:-1] + "0"))
        self.etcd.close()

    def events(self, kind: EventKind, name: str = "", holder: subprocess.Popen[bytes] | None = None) -> list[Event]:
        """What is recorded up to now, of the lock `name`, of that process."""
        return [
            event
            for event in read(self.folder).events
            if event.kind == kind
            and event.name.endswith("/" + name if name else "")
            and (holder is None or event.pid == holder.pid)
        ]

    def inside(self, name: str, holder: subprocess.Popen[bytes]) -> Event:
        """Wait for the holder to have the lock."""
        return until(lambda: self.events("acquired", name, holder), f"{name} held")[0]  # type: ignore[no-any-return]

    def let_in(self, name: str, holder: subprocess.Popen[bytes]) -> None:
        """Wait for the holder to get the lock once more."""
        before = len(self.events("acquired", name, holder))
        until(lambda: len(self.events("acquired", name, holder)) > before, f"{name} passed on")

    def queue(self, name: str) -> list[Lifetime]:
        """Who is in the queue now, in its order."""
        prefix = f"{self.options.prefix}{name}/"
        lifetimes = self.witness.so_far().lifetimes
        return [each for each in lifetimes if each.key.startswith(prefix) and each.deleted == _ALIVE]

    def queued(self, name: str, count: int) -> list[Lifetime]:
        """Wait until so many are."""
        until(lambda: len(self.queue(name)) >= count, f"{count} in the queue of {name}")
        return self.queue(name)

    def put_stranger(self, name: str) -> str:
        """A contender that is nobody's."""
        key = f"{self.options.prefix}{name}/cafe"
        self.etcd.txn(Txn([], [Put(key, b"")]))
        return key

    def delete(self, key: str, created: int) -> None:
        """By hand, and written down."""
        at = now()
        reply = self.etcd.txn(Txn([created_at(key, created)], [Delete(key)]))
        assert reply.succeeded
        self.recorder.write(Fault("key_deleted", at, now(), key=key, revision=reply.header.revision))

    def revoke(self, lease: int) -> None:
        """By hand, and written down."""
        at = now()
        self.etcd.lease_revoke(lease)
        self.recorder.write(Fault("lease_revoked", at, now(), lease=lease))

    def finish(self) -> Report:
        """Stop everybody, and check."""
        self.stop()
        return self.report()


@pytest.fixture
def new_run(etcd: EtcdServer, tmp_path: Path) -> Iterator[Callable[..., Staged]]:
    """Makes runs; the options are those of its holders."""
    with ExitStack() as stack:

        def new(**options: Any) -> Staged:
            folder = tmp_path / uuid.uuid4().hex
            staged = Staged(etcd.url, folder, **options)
            stack.enter_context(staged)
            return staged

        yield new


def broken(report: Report) -> set[str]:
    return {violation.rule for violation in report.violations}


def test_no_faults(new_run: Callable[..., Staged]) -> None:
    """Three processes with four threads each, over both transports: many acquisitions, no violation."""
    run = new_run(seconds=5.0)
    for seed, transport in enumerate(["gateway", "grpc", "gateway"]):
        run.start(seed=seed, transport=transport)
    for holder in run.holders:
        assert holder.wait(120) == 0
    report = run.finish()
    assert not report.violations, report
    assert report.overlaps.total() == report.overlaps["stall"], report
    assert report.acquisitions > 60
    assert report.handovers > 20
    assert report.between_processes > 10
    assert {event.mode for event in run.events("acquired")} == {"write", "read", "slot"}


@pytest.mark.parametrize(
    ("lock", "way", "rules"),
    [
        ("mutex:m", "nolock", {"vouched", "grant"}),
        ("rw:r", "overtaking", {"vouched", "grant", "order"}),
        ("slot:s:2", "overtaking", {"overlap", "grant"}),
        ("mutex:m", "token", {"token"}),
    ],
)
def test_locks_that_are_broken(new_run: Callable[..., Staged], lock: str, way: str, rules: set[str]) -> None:
    """Control: a lock that keeps nobody out, whose readers or slots overtake, or whose tokens do not grow is caught."""
    run = new_run(locks=lock, broken=way, stay=0.02, threads=6, wait=0.0)
    one, two = run.start(seed=1), run.start(seed=2)
    until(lambda: min(len(run.events("left", holder=holder)) for holder in (one, two)) >= 20, "enough to see")
    report = run.finish()
    assert rules <= broken(report), report


@pytest.mark.parametrize("way", ["own-key", ""])
def test_a_key_that_is_gone_while_it_waits(new_run: Callable[..., Staged], way: str) -> None:
    """Control: a lock that does not look at its own key after waiting goes in without it; ours does not."""
    run = new_run(locks="mutex:m", broken=way, threads=3, times=1, wait=0.0, ttl=60, body=0.2)
    stranger = run.put_stranger("m")
    holder = run.start()
    first, second, *_ = run.queued("m", 4)[1:]
    run.delete(second.key, second.created)
    run.etcd.delete(Delete(stranger))
    assert holder.wait(60) == 0
    report = run.finish()
    refusals = [event.why for event in run.events("refused")]
    assert first.key in {event.key for event in run.events("acquired")}
    if way:
        assert "grant" in broken(report), report
        assert f"granted to one whose key was not there\n    {second.key}" in str(report)
        assert not refusals
    else:
        assert not report.violations, report
        assert len([why for why in refusals if f"our key {second.key} was deleted while we waited" in why]) == 1


def test_a_lease_that_is_trusted_for_too_long(new_run: Callable[..., Staged]) -> None:
    """Control: a session that counts from when a renewal's reply came, which was late, is caught; ours says it in time.

    The reply of the first renewal, sent after a third of the TTL, takes two fifths of it; no other one is answered.
    So the lease ends after 1.33 TTL. Ours is sure of it for 1.23 TTL, the broken one for 1.63.
    """
    ttl = 8
    runs = {way: new_run(ttl=ttl, locks="mutex:m", threads=1, times=1, wait=0.0) for way in ("", "trust")}
    for way, run in runs.items():
        late = run.start(broken=way, late_renewals=0.4 * ttl, body=3.0 * ttl)
        run.inside("m", late)
        run.start(body=0.1)
    for run in runs.values():
        for holder in run.holders:
            assert holder.wait(120) == 0
    reports = {way: run.finish() for way, run in runs.items()}
    assert not reports[""].violations, reports[""]
    assert (reports[""].acquisitions, reports[""].losses, reports[""].losses_in_time) == (2, 1, 1)
    assert "vouched" in broken(reports["trust"]), reports["trust"]
    assert "was held twice" in str(reports["trust"])


@pytest.mark.alone  # the next one must be in before a holder learns of its loss, which is a matter of tenths of seconds
def test_what_no_lock_can_prevent(new_run: Callable[..., Staged]) -> None:
    """A holder is frozen, one holds the GIL, and of two the key or lease is taken away by hand, while others wait.

    Each overlap is counted apart, with its cause, and the late write of each was refused. One is killed, and somebody
    else gets its lock; that is none.
    """
    run = new_run(wait=0.0)
    names = ("frozen", "deleted", "revoked", "killed", "gil")
    late = {name: run.start(threads=1, times=1, locks=f"mutex:{name}", body=300.0) for name in names[:-1]}
    got = {name: run.inside(name, holder) for name, holder in late.items()}
    others = run.start(threads=len(names), pinned=1, locks=",".join(f"mutex:{name}" for name in names), stay=0.05)
    for name in late:
        run.queued(name, 2)
    run.inside("gil", others)
    late["gil"] = run.start(threads=1, times=1, locks="mutex:gil", body=0.2, gil=2.5 * TTL, gil_odds=1.0)
    run.freeze(late["frozen"])
    run.delete(got["deleted"].key, got["deleted"].created)
    run.revoke(got["revoked"].lease)
    run.kill(late["killed"])
    run.inside("gil", late["gil"])
    for name in names:
        run.let_in(name, others)
    run.thaw(late["frozen"])
    for name in names:
        if name != "killed":
            assert late[name].wait(60) == 0, name
    report = run.finish()
    assert not report.violations, report
    expected = {"freeze": 1, "by hand": 2, "gil": 1}
    assert {cause: number for cause, number in report.late.items() if cause != "stall"} == expected, report
    assert {each.late.name.rpartition("/")[2] for each in report.excused if each.fence == "refused"} == set(names) - {
        "killed"
    }
    assert report.killed == 1
    assert report.losses_by_hand == 2
    assert 0.5 * TTL < report.worst_takeover < 10 * TTL
