"""Keys that an older version has left in etcd, byte for byte: what excluded then excludes today.

`tests/golden` has a file for each version that changed what is written. None of them is ever changed, and each is
honoured by every later version of the same major one: see docs/compatibility.md.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import unquote

import pytest
from celery import Celery, signals

from celery_etcd_lock import LockContended
from celery_etcd_lock.beat import EtcdScheduler
from celery_etcd_lock.etcd import Transport, connect
from celery_etcd_lock.etcd.api import Delete, Put, Range, Txn, created_at, prefix_end
from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.locks.asked import heed
from celery_etcd_lock.tasks.runtime import close_all
from celery_etcd_lock.testing import EtcdServer
from tests.cli.installed import here
from tests.golden.record import COPY, HERE, Situations, recorded
from tests.golden.shop import make, run
from tests.workers import until

VERSIONS = sorted((file.stem for file in HERE.glob("*.json")), key=lambda name: [int(n) for n in name.split(".")])


class Left:
    """What an older version has left, put into an etcd once more, under the leases of then."""

    def __init__(self, url: str, transport: Transport, situations: Situations) -> None:
        self.url = url
        self.transport = transport
        self._situations = situations
        self.leases: set[str] = set()

    def keys(self, situation: str) -> list[dict[str, str]]:
        return self._situations[situation]

    def put(self, situation: str, *, part: str = "") -> None:
        """Those whose key has `part` in it, in their order."""
        for each in self.keys(situation):
            if part in each["key"]:
                self._grant(each["lease"])
                put = Put(each["key"], each["value"].encode(), int(each["lease"], 16))
                assert self.transport.txn(Txn([created_at(put.key, 0)], [put])).succeeded

    def die(self, *leases: str) -> None:
        """The older version's process is gone, and its leases with it; all, or these."""
        for lease in leases or tuple(self.leases):
            self.transport.lease_revoke(int(lease, 16))
            self.leases.remove(lease)

    def _grant(self, lease: str) -> None:
        if lease != "0" and lease not in self.leases:
            body = json.dumps({"ID": str(int(lease, 16)), "TTL": "120"}).encode()
            with urllib.request.urlopen(f"{self.url}/v3/lease/grant", data=body, timeout=10) as answer:
                assert "error" not in json.load(answer)
            self.leases.add(lease)


@pytest.fixture(scope="module")
def own_etcd(etcd: EtcdServer) -> Iterator[EtcdServer]:
    """One in which nobody else has a namespace ``celery``."""
    with EtcdServer() as server:
        yield server


@pytest.fixture(params=VERSIONS)
def left(request: pytest.FixtureRequest, own_etcd: EtcdServer) -> Iterator[Left]:
    situations = json.loads((HERE / f"{request.param}.json").read_text())
    with closing(connect(own_etcd.url)) as transport:
        left = Left(own_etcd.url, transport, situations)
        yield left
        close_all()
        if left.leases:
            left.die()
        transport.txn(Txn([], [Delete("/celery/", "/celery0")]))


@pytest.fixture
def app(left: Left) -> Celery:
    return make(left.url)


def why(app: Celery, task_id: str) -> Any:
    return app.AsyncResult(task_id).result


class TestLocks:
    def test_an_exclusive_one(self, left: Left, app: Celery) -> None:
        """Keeps out, says who holds it, and is listed; when it goes, the next may."""
        left.put("exclusive")
        assert run(app, "shop.sync", "t-1", 42) == "FAILURE"
        error = why(app, "t-1")
        assert isinstance(error, LockContended)
        assert "worker-1" in error.holder
        assert "t-sync" in error.holder or error.task_id == "t-sync"
        assert run(app, "shop.sync", "t-2", 43) == "SUCCESS"
        (listed,) = json.loads(here(app, "ls", "--json").out)
        assert (listed["lock"], listed["mode"]) == ("/celery/locks/shop.sync/value=42", "exclusive")
        assert (listed["holders"][0]["host"], listed["holders"][0]["task_id"]) == ("worker-1", "t-sync")
        left.die()
        assert run(app, "shop.sync", "t-3", 42) == "SUCCESS"

    def test_a_shared_one(self, left: Left, app: Celery) -> None:
        """Keeps a writer out, and lets a reader in beside."""
        left.put("shared")
        assert run(app, "shop.rebuild", "t-1", 7) == "FAILURE"
        assert run(app, "shop.export", "t-2", 7) == "SUCCESS"
        left.die()
        assert run(app, "shop.rebuild", "t-3", 7) == "SUCCESS"

    def test_slots(self, left: Left, app: Celery) -> None:
        """Two are all that there are; with one of them gone there is room."""
        left.put("slots")
        assert run(app, "shop.render", "t-1", 3) == "FAILURE"
        left.transport.delete(Delete(left.keys("slots")[-1]["key"]))
        assert run(app, "shop.render", "t-2", 3) == "SUCCESS"

    def test_one_that_stays_taken_though_the_body_has_ended(self, left: Left, app: Celery) -> None:
        """`lock_at_least_for`: the sibling alone keeps out, also when the session is gone."""
        left.put("at_least_for")
        left.die(left.keys("at_least_for")[0]["lease"])
        assert run(app, "shop.import", "t-1", 42) == "FAILURE"
        left.die()
        assert run(app, "shop.import", "t-2", 42) == "SUCCESS"

    def test_a_session(self, left: Left, app: Celery) -> None:
        """Is listed with what it holds."""
        left.put("exclusive")
        (session,) = json.loads(here(app, "sessions", "--json").out)
        (key, _) = left.keys("exclusive")
        assert session["host"] == "worker-1"
        assert str(session["pid"]) in key["key"]

    def test_a_wish_for_a_lock(self, left: Left) -> None:
        """As an older `etcd-lock release` puts it, for the contender that this version has: it is told."""
        (key, value) = next((e["key"], json.loads(e["value"])) for e in left.keys("asked") if "/asked/" in e["key"])
        with closing(Session.open(left.url)) as session:
            lease = f"{session.lease:x}"
            contender = unquote(key.rpartition("/")[2])
            name, _, then = contender.partition("/write/")
            with pytest.raises(Exception, match="ops@worker-1"), Mutex(session, name).acquire() as held:  # noqa: PT012
                value["revision"] = held.fencing_token
                wish = Put(key.replace(then, lease), json.dumps(value, separators=(",", ":")).encode(), session.lease)
                session.txn(Txn([], [wish]))
                heed(session, "celery", {wish.key})
                held.assert_held()


class TestMarks:
    def test_of_a_queued_message(self, left: Left, app: Celery) -> None:
        """No second one is published; and it goes when this version runs the message."""
        left.put("queued")
        (mark,) = left.keys("queued")
        task_id = json.loads(mark["value"])["task_id"]
        invoice: Any = app.tasks["shop.invoice"]
        assert invoice.delay(42).id == task_id
        assert invoice.delay(43).id != task_id
        assert (
            run(app, "shop.invoice", task_id, 42, headers={"etcd_lock": {"of": task_id, "queued": True}}) == "SUCCESS"
        )
        assert invoice.delay(42).id != task_id

    def test_of_one_that_waits_for_all(self, left: Left, app: Celery) -> None:
        """`coalesce`: whoever comes meanwhile is skipped, and that one itself is not."""
        left.put("waiting")
        bodies: list[Any] = []
        assert run(app, "shop.index", "t-1", 42, work=bodies.append) == "SUCCESS"
        assert run(app, "shop.index", "t-index", 42, work=bodies.append) == "RETRY"
        assert bodies == []
        left.die(left.keys("waiting")[0]["lease"])
        run(app, "shop.index", "t-index", 42, work=bodies.append)
        assert bodies == [42]

    def test_of_a_message_that_was_put_back(self, left: Left, app: Celery) -> None:
        """A copy that is behind is ignored, one that is as far goes on."""
        left.put("put_back")
        assert run(app, "shop.charge", "t-charge", 42, **COPY) == "IGNORED"
        header = {**COPY["headers"]["etcd_lock"], "times": 1, "count": 1}
        assert run(app, "shop.charge", "t-charge", 42, **{**COPY, "headers": {"etcd_lock": header}}) == "RETRY"

    def test_of_one_that_is_ending(self, left: Left, app: Celery) -> None:
        """A copy comes again later; if the process of the first dies first, the copy runs."""
        left.put("ending")
        assert run(app, "shop.charge", "t-charge", 42, **COPY) == "RETRY"
        left.die()
        assert run(app, "shop.charge", "t-charge", 42, **COPY) == "SUCCESS"

    def test_of_one_that_has_run(self, left: Left, app: Celery) -> None:
        """A copy is ignored; the same id published anew is a new message."""
        left.put("done")
        assert run(app, "shop.charge", "t-charge", 42, **COPY) == "IGNORED"
        header = {**COPY["headers"]["etcd_lock"], "nonce": "ba9876543210"}
        assert run(app, "shop.charge", "t-charge", 42, **{**COPY, "headers": {"etcd_lock": header}}) == "SUCCESS"


def test_a_header_with_a_field_of_a_newer_version(left: Left, app: Celery) -> None:
    """Says nothing, where it begins with ``_``; another name is a mistake of its publisher, as ever."""
    header = {"of": "t-1", "nonce": "0123456789ab", "_since": 3}
    assert run(app, "shop.sync", "t-1", 42, headers={"etcd_lock": header}) == "SUCCESS"
    assert run(app, "shop.sync", "t-1", 42, headers={"etcd_lock": {**header, "since": 3}}) == "FAILURE"


class TestBeat:
    @pytest.fixture
    def published(self) -> Iterator[list[str]]:
        """The ids of what is published."""
        ids: list[str] = []

        def receiver(headers: Any, **_: Any) -> None:
            ids.append(headers["id"])

        signals.before_task_publish.connect(receiver)
        yield ids
        signals.before_task_publish.disconnect(receiver)

    @pytest.mark.parametrize("situation", ["beat", "beat_in_the_middle"])
    def test_takes_over(self, left: Left, app: Celery, published: list[str], situation: str) -> None:
        """Stands by while the older one leads, and then goes on where that stopped."""
        app.conf.etcd_lock_done_ttl = 100 * 365 * 86_400  # the tick is as old as the file
        left.put(situation)
        *_, entry = left.keys(situation)
        before = json.loads(entry["value"])
        (name,) = json.loads(here(app, "beat", "--json").out)
        assert "worker-1" in json.dumps(name)
        scheduler = EtcdScheduler(app=app)
        try:
            for _ in range(2):
                scheduler.tick()
            assert not scheduler.schedule
            left.die()
            until(lambda: scheduler.tick() is not None and published, "its first tick", seconds=30)
            (kv,) = left.transport.range(Range(entry["key"])).kvs
        finally:
            scheduler.close()
        assert json.loads(kv.value)["total_run_count"] == before["total_run_count"] + 1
        assert (published[0] == before["task_id"]) is (before["state"] == "sending")


def test_what_is_written_today_is_of_the_newest_form(own_etcd: EtcdServer) -> None:
    """Else this version has a form of its own, and wants a file of its own: ``python -m tests.golden.record``."""
    with closing(connect(own_etcd.url)) as transport:
        assert not transport.range(Range("/celery/", prefix_end("/celery/"))).kvs
    newest = json.loads((HERE / f"{VERSIONS[-1]}.json").read_text())
    assert _forms(recorded(own_etcd.url)) == _forms(newest)


_FORMS = (
    (r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b", "<uuid>"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", "<time>"),
    (r"\.\d{6}\+", "<microseconds>+"),
    (r"\.\d{3}Z", "<milliseconds>Z"),
    (r'"nonce":"[0-9a-f]{12}"', "<nonce>"),
    (r"/sessions/[0-9a-f]{8}/\d+-", "/sessions/<instance>/<pid>-"),
    (r'("pid"|"revision"):\d+', r"\1:<number>"),
)


def _forms(situations: Situations) -> dict[str, list[tuple[str, ...]]]:
    """Without what is another each time; leases by the order in which they come."""

    def form(text: str, leases: list[str]) -> str:
        for number, lease in enumerate(leases):
            text = text.replace(lease, f"<lease {number}>") if lease != "0" else text
        for pattern, instead in _FORMS:
            text = re.sub(pattern, instead, text)
        return text

    forms = {}
    for situation, keys in situations.items():
        leases = list(dict.fromkeys(each["lease"] for each in keys))
        forms[situation] = [tuple(form(each[part], leases) for part in ("key", "value", "lease")) for each in keys]
    return forms
