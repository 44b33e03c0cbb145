"""``celery etcd-lock doctor``, of real etcds: healthy ones, and others."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from celery import Celery

from celery_etcd_lock.cli.doctor.findings import Finding, lines, status_of
from celery_etcd_lock.cli.doctor.growth import Sample, about_clocks, about_history, about_watches
from celery_etcd_lock.cli.doctor.members import Member, about_members, about_versions
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Put, Range, Status, Txn
from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.testing import EtcdCluster, EtcdServer
from tests.cli.compacting import compact
from tests.cli.installed import Said, app_with, here
from tests.locks.test_doors import PASSWORD, USER, etcdctl, guard
from tests.quota import fill, small_etcd
from tests.servers import skip_or_fail
from tests.workers import until

QUICK = ("--sample", "0.2")


def examine(endpoints: Any, *arguments: str, **settings: Any) -> Said:
    """As JSON; a test of the text asks for that."""
    return here(app_with(endpoints, **settings), "doctor", *QUICK, "--json", *arguments)


def found(said: Said, level: str) -> dict[str, dict[str, str]]:
    """The findings of a level, by what they are about."""
    return {each["about"]: each for each in json.loads(said.out)["findings"] if each["level"] == level}


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with EtcdCluster() as started:
        yield started


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdServer]:
    """With the user of docs/security.md, and others who may less."""
    with EtcdServer() as server:
        if server.etcdctl is None:
            skip_or_fail("there is no etcdctl on this machine, and only that makes users")
        guard(server)
        for name, grants in {
            "reader": ["read --prefix /celery/"],
            "half": ["readwrite --prefix /celery/locks/"],
        }.items():
            etcdctl(server, "role", "add", name)
            for granted in grants:
                etcdctl(server, "role", "grant-permission", name, *granted.split())
            etcdctl(server, "user", "add", name, "--interactive=false", typing=PASSWORD)
            etcdctl(server, "user", "grant-role", name, name)
        yield server


def keys(server: EtcdServer) -> int:
    with closing(connect(server.url)) as transport:
        return transport.range(Range("\0", "\0", count_only=True)).count


@pytest.mark.parametrize("transport", ["gateway", "grpc"])
def test_nothing_is_wrong_with_a_healthy_one(etcd: EtcdServer, transport: str) -> None:
    """Status 0, though there may be warnings; and nothing is left behind."""
    if transport == "grpc":
        pytest.importorskip("grpc")
    before = keys(etcd)
    said = examine(etcd.url, transport=transport)
    assert (said.status, json.loads(said.out)["status"]) == (0, 0)
    assert not found(said, "wrong")
    assert not found(said, "unknown")
    fine = found(said, "ok")
    assert f"endpoint {etcd.url}" in fine
    assert "/celery/sessions/" in fine["permissions"]["what"]
    assert keys(etcd) == before


def test_it_is_readable_and_hides_the_password(guarded: EtcdServer) -> None:
    said = here(app_with(guarded.url, username=USER, password=PASSWORD), "doctor", *QUICK)
    assert said.status == 0
    assert all(len(line) <= 80 for line in said.out.splitlines())
    assert "Nothing wrong" in said.out
    assert PASSWORD not in said.out
    assert 'etcd_lock_password = "********"' in said.out
    assert PASSWORD not in examine(guarded.url, username=USER, password=PASSWORD).out


def test_a_dead_member_is_named_and_the_others_are_examined(cluster: EtcdCluster) -> None:
    """It is killed, then stopped: that takes its timeout and no longer."""
    dead = cluster.members[0]
    dead.kill()
    try:
        said = until(lambda: (each := examine(cluster.endpoints)).status == 1 and each, "that a new leader is there")
        assert set(found(said, "wrong")) == {f"endpoint {dead.url}"}
        assert "permissions" in found(said, "ok")
    finally:
        dead.start()
    dead.pause()
    try:
        began = time.monotonic()
        said = examine(cluster.endpoints, "--timeout", "1")
        assert time.monotonic() - began < 15
        assert f"endpoint {dead.url}" in found(said, "wrong")
    finally:
        dead.resume()
        dead.wait_healthy()


def test_no_majority_is_something_wrong(cluster: EtcdCluster) -> None:
    """Who is there says so; what takes a majority is not examined."""
    for member in cluster.members[1:]:
        member.kill()
    try:
        said = examine(cluster.endpoints, "--timeout", "1.5")
        assert said.status == 1
        assert {f"endpoint {url}" for url in cluster.endpoints} <= set(found(said, "wrong"))
        assert found(said, "unknown")
    finally:
        cluster.start()


def test_no_etcd_cannot_be_examined() -> None:
    said = examine("http://127.0.0.1:1")
    assert said.status == 2
    assert "connection refused" in found(said, "wrong")["endpoint http://127.0.0.1:1"]["what"]


def test_a_host_that_nobody_knows_is_given_up_in_time() -> None:
    began = time.monotonic()
    assert examine("http://nobody.invalid:2379", "--timeout", "1").status == 2
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"username": USER, "password": "wrong"}, "does not accept user 'celery' with this password"),
        ({}, "set etcd's user name and password"),
    ],
)
def test_who_is_not_let_in_is_told_what_to_set(guarded: EtcdServer, settings: dict[str, Any], says: str) -> None:
    said = examine(guarded.url, **settings)
    assert said.status == 2
    assert says in found(said, "wrong")[f"endpoint {guarded.url}"]["what"]


def test_each_kind_of_key_that_may_not_be_used_is_named(guarded: EtcdServer) -> None:
    """With the command that grants it. What is needed for something special only is a warning."""
    said = examine(guarded.url, username="half", password=PASSWORD)
    assert said.status == 1
    wrong, warned = found(said, "wrong"), found(said, "warning")
    assert set(wrong) == {"permission below /celery/sessions/", "permission below /celery/done/"}
    assert {"permission below /celery/queued/", "permission below /celery/beat/default/"} <= set(warned)
    assert "readwrite --prefix /celery/" in wrong["permission below /celery/sessions/"]["do"]
    reader = found(examine(guarded.url, username="reader", password=PASSWORD), "wrong")
    assert "may not write or delete there" in reader["permission below /celery/locks/"]["what"]


def test_a_history_takes_no_more_than_reading_locks(guarded: EtcdServer) -> None:
    """Though it tells times less well, when sessions are not to be read."""
    with Session.open(guarded.url, username=USER, password=PASSWORD) as session:
        Mutex(session, "/celery/locks/t/k").acquire().release()
    (lock,) = json.loads(here(app_with(guarded.url, username="half", password=PASSWORD), "history", "--json").out)[
        "locks"
    ]
    assert lock["key"] == "k"


def test_https_where_http_is_spoken(etcd: EtcdServer) -> None:
    said = examine(etcd.url.replace("http:", "https:"))
    assert said.status == 2
    assert any("write http://" in each["what"] for each in found(said, "wrong").values())


def test_locks_in_memory_exclude_nobody() -> None:
    said = examine("memory://doctor")
    assert said.status == 1
    assert "another process" in found(said, "wrong")["settings"]["what"]


def test_a_client_that_cannot_be_made_is_told() -> None:
    """And nothing of it is shown but its name."""
    pytest.importorskip("grpc")

    def client() -> None:
        raise ValueError("no secret today")

    app = Celery("proj", broker="memory://", set_as_current=False)
    app.conf.etcd_lock_client = client
    said = here(app, "doctor", *QUICK, "--json")
    assert said.status == 2
    assert "client" in json.loads(said.out)["settings"]["etcd_lock_client"]
    assert found(said, "wrong")


def test_settings_that_cannot_be_meant() -> None:
    said = here(app_with("http://127.0.0.1:1", tll=3), "doctor")
    assert said.status == 2
    assert "did you mean etcd_lock_ttl?" in said.out.replace("\n        ", "")


def test_room_that_gets_short_and_is_used_up() -> None:
    """etcd before 3.6 does not say its quota, so it is said here."""
    with small_etcd() as server:
        with closing(connect(server.url)) as transport:
            (status,) = transport.status()
        size = status.db_size
        said = examine(server.url, "--quota", str(int(size / 0.85)))
        assert said.status == 0
        assert "85%" in found(said, "warning")[f"room {server.url}"]["what"]
        assert examine(server.url, "--quota", str(int(size / 0.85)), "--strict").status == 1
        assert examine(server.url, "--quota", str(int(size / 0.96))).status == 1
        fill(server)
        said = examine(server.url)
        assert said.status == 1
        assert "NOSPACE" in found(said, "wrong")[f"endpoint {server.url}"]["what"]
        assert "etcdctl alarm disarm" in found(said, "wrong")[f"endpoint {server.url}"]["do"]


def test_clocks_of_those_who_put_something(etcd: EtcdServer) -> None:
    """What is there already, with a time that has not come yet, shows a clock that is ahead."""
    future = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))
    key = "/clocks/locks/t/k/write/1"
    with closing(connect(etcd.url)) as transport:
        transport.txn(Txn([], [Put(key, f'{{"host": "fast", "since": "{future}"}}'.encode())]))
        said = examine(etcd.url, namespace="clocks")
    assert "fast's clock is about 3600 s ahead" in found(said, "warning")["clocks"]["what"] or "3599" in said.out


# -- what figures mean


def status(url: str = "http://a:1", *, version: str = "3.5.30", size: int = 10**8, **rest: Any) -> Status:
    given: dict[str, Any] = {"leader": 1, "raft_term": 2, "member_id": 1, "revision": 100, **rest}
    return Status(url, version, size, size, **given)


def sample(**rest: Any) -> Sample:
    given: dict[str, Any] = {"head": 10**6, "oldest": 1, "moved": False, "rate": 10.0, "seconds": 2.0, "begins": None}
    return Sample(**{**given, **rest})


def test_a_history_that_nothing_compacts_fills_its_quota() -> None:
    """100 MB for a million revisions are 100 bytes each, and at 10 a second 2 GiB are full in 24 days."""
    (finding,) = about_history(sample(), [status()], None)
    assert finding.level == "warning"
    assert "in about 24 days" in finding.what
    assert "--auto-compaction-mode" in finding.do
    assert next(about_history(sample(head=500), [status()], None)).level == "note"
    (full,) = about_history(sample(), [status(db_size_quota=10**8)], None)
    assert "in about 0 seconds" in full.what


@pytest.mark.parametrize(
    ("seen", "level"),
    [
        ({"moved": True}, "ok"),
        ({"rate": 0.0}, "warning"),
        ({"rate": 0.0, "head": 900_100}, "ok"),
        ({"rate": 100.0}, "ok"),
        ({"rate": 0.01}, "warning"),
    ],
)
def test_a_history_that_was_compacted(seen: dict[str, Any], level: str) -> None:
    (finding,) = about_history(sample(**{"oldest": 900_000, **seen}), [status()], None)
    assert finding.level == level


def test_watches() -> None:
    assert [each.level for each in about_watches(sample())] == ["ok"]
    assert [each.level for each in about_watches(sample(unwatched="no"))] == ["warning"]


def test_a_history_that_was_compacted_just_now(etcd: EtcdServer) -> None:
    """By an etcd that is asked: whoever has a session now was there when it was."""
    with Session.open(etcd.url, namespace="compacted") as session:
        at = session.txn(Txn([], [Put("/somebody/elses", b"")])).header.revision
        compact(etcd, at)
        said = found(examine(etcd.url, namespace="compacted"), "ok")
    assert f"from {at} on" in said["history"]["what"]
    assert "something compacts it" in said["history"]["what"]
    assert "watches" in said


def test_clocks() -> None:
    (off,) = about_clocks(sample(offsets={"a": -40.0, "b": 0.1}))
    assert (off.level, "a's clock is about 40 s behind" in off.what) == ("warning", True)
    assert [each.level for each in about_clocks(sample(offsets={"b": 0.1}))] == ["ok"]
    assert [each.level for each in about_clocks(sample())] == ["note"]


def test_endpoints_of_different_clusters_exclude_nobody() -> None:
    members = [Member(f"http://{name}:1", status(f"http://{name}:1"), None, number, (0.001,)) for number, name in
               enumerate("ab", start=1)]  # fmt: skip
    wrong = [each for each in about_members(members, 5) if each.level == "wrong"]
    assert ["2 different clusters" in each.what for each in wrong] == [True]


def test_members_that_are_not_named_or_named_twice() -> None:
    one = Member("http://a:1", status("http://a:1", leader=9), None, 1, (0.001,))
    two = Member("http://b:1", status("http://b:1", leader=9), None, 1, (0.001,))
    notes = [each.what for each in about_members([one, two], 5) if each.level == "note"]
    assert any("one and the same member" in note for note in notes)
    assert any("not named" in note for note in notes)


def test_versions() -> None:
    def levels(*versions: str) -> list[str]:
        return [each.level for each in about_versions([status(version=each) for each in versions], auth=False)]

    assert levels("3.5.1")[0] == "wrong"
    assert levels("3.5.16")[0] == "warning"
    assert levels("3.6.14") == ["ok", "note"]
    assert levels("3.3.10") == ["wrong"]
    assert levels("3.6.14", "3.6.13") == ["ok", "ok", "note", "note"]
    assert levels("what") == ["unknown"]


def test_exit_status() -> None:
    warning, wrong = Finding("warning", "a", "b"), Finding("wrong", "a", "b")
    assert status_of([warning], examined=True, strict=False) == 0
    assert status_of([warning], examined=True, strict=True) == 1
    assert status_of([wrong], examined=True, strict=False) == 1
    assert status_of([wrong], examined=False, strict=False) == 2
    assert max(map(len, lines([Finding("wrong", "x", "word " * 100, "do " * 50)], 60))) <= 60
