"""``celery etcd-lock history``, of locks in a real etcd."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from celery import Celery

from celery_etcd_lock.cli.history import past
from celery_etcd_lock.cli.history.command import Told, read
from celery_etcd_lock.cli.history.instants import unix
from celery_etcd_lock.cli.history.story_text import Drawn, lines
from celery_etcd_lock.cli.history.timeline import Scope
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Delete, Put, Range, Txn, Watch
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport, MemoryWatch
from celery_etcd_lock.locks import Mutex, RWLock, Session
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.queue import slot_of
from celery_etcd_lock.tasks.task import SingletonTask
from celery_etcd_lock.testing import EtcdServer, memory_locks
from tests.cli.compacting import compact
from tests.cli.installed import app_with, here

Opens = Callable[[], Session]
SLACK = 1.0
"""Seconds between a request's being made and its being noted, on a busy machine."""


@pytest.fixture
def namespace() -> str:
    return f"ns{uuid.uuid4().hex[:8]}"


@pytest.fixture
def app(etcd: EtcdServer, namespace: str) -> Celery:
    app = app_with(etcd.url, namespace=namespace)

    @app.task(name="proj.sync")
    def sync() -> None: ...

    @app.task(name="proj.gpu", base=SingletonTask, lock_limit=2)
    def gpu() -> None: ...

    return app


@pytest.fixture
def opens(etcd: EtcdServer, namespace: str) -> Iterator[Opens]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Session.open(etcd.url, namespace=namespace))


def revision(server: EtcdServer) -> int:
    with closing(connect(server.url)) as transport:
        return transport.range(Range("/", limit=1)).header.revision


def times(said: dict[str, Any]) -> tuple[float, float]:
    return unix(said["earliest"]) or 0.0, unix(said["latest"]) or 0.0


def test_it_tells_what_the_holders_and_waiters_know_themselves(
    etcd: EtcdServer, app: Celery, opens: Opens, namespace: str
) -> None:
    """A run of two workers' worth: each of its times lies in the interval that the history gives for it."""
    name = f"/{namespace}/locks/proj.sync/account_id=42"
    noted: dict[int, tuple[float, float, float]] = {}

    def work(session: Session, task_id: str) -> None:
        for _ in range(3):
            came = time.time()
            with acquire(session, name, describe={"task": "proj.sync", "task_id": task_id}) as held:
                let_in = time.time()
                time.sleep(0.05)
                created = session.transport.range(Range(held.key)).kvs[0].create_revision
            noted[created] = (came, let_in, time.time())

    threads = [threading.Thread(target=work, args=(opens(), f"t{number}")) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    before = revision(etcd)
    said = json.loads(here(app, "history", "proj.sync", "--json").out)
    assert revision(etcd) == before
    (lock,) = said["locks"]
    assert (lock["lock"], lock["task"], lock["key"]) == (name, "proj.sync", "account_id=42")
    assert said["complete"]
    told = {each["came"]["revision"]: each for each in lock["contenders"]}
    assert told.keys() == noted.keys()
    assert len(noted) == 6
    for created, (came, let_in, gone) in noted.items():
        for moment, key in ((came, "came"), (let_in, "held_from"), (gone, "gone")):
            earliest, latest = times(told[created][key])
            assert earliest - SLACK <= moment <= latest + SLACK
    # One after the other, in the order in which they came.
    ordered = [told[created] for created in sorted(told)]
    for one, two in itertools.pairwise(ordered):
        assert two["held_from"]["revision"] == max(one["gone"]["revision"], two["came"]["revision"])
    assert {each["record"]["task_id"] for each in ordered} == {"t0", "t1"}


def test_who_holds_and_waits_now(app: Celery, opens: Opens, namespace: str) -> None:
    name = f"/{namespace}/locks/proj.gpu/-"
    sessions = [opens() for _ in range(3)]
    described = {"task": "proj.gpu", "task_id": "x"}
    with ExitStack() as stack:
        for number, session in enumerate(sessions[:2]):
            stack.enter_context(acquire(session, name, slot_of(2), describe={**described, "task_id": f"{number}"}))
        waiter = threading.Thread(
            target=lambda: acquire(sessions[2], name, slot_of(2), describe=described).release(), daemon=True
        )
        waiter.start()
        with closing(connect(app.conf.etcd_lock_endpoints)) as transport:
            while transport.range(Range(f"{name}/", f"{name}0")).count < 3:
                time.sleep(0.01)
        contenders = json.loads(here(app, "history", "--json").out)["locks"][0]["contenders"]
        assert [bool(each["held_from"]) for each in contenders] == [True, True, False]
        assert [each["gone"] for each in contenders] == [None] * 3
        assert [each["held_seconds"] is None for each in contenders] == [False, False, True]
    waiter.join(30)


def test_a_session_that_ends_takes_its_locks_along(app: Celery, opens: Opens, namespace: str) -> None:
    session = opens()
    RWLock(session, f"/{namespace}/locks/proj.sync/a").read().acquire()
    session.close()
    (contender,) = json.loads(here(app, "history", "--json").out)["locks"][0]["contenders"]
    assert contender["with_its_session"]
    assert contender["kind"] == "read"


def test_it_is_drawn_in_80_columns_and_in_ascii(app: Celery, opens: Opens, namespace: str) -> None:
    """A pipe gets all of it, a terminal what fits; one that knows no other characters gets none."""
    session, task_id = opens(), uuid.uuid4().hex
    long = f"/{namespace}/locks/proj.sync/" + "k" * 100
    with acquire(session, long, describe={"task": "\x1b[2Jnasty" * 5, "task_id": task_id}):
        out = here(app, "history").out
        story = read(session.transport, Scope(namespace), since=3600, look_back=1000, limit=10,
                     limit_of=lambda _: None, timeout=5)  # fmt: skip
    assert long in out.splitlines()
    assert f"{session.host}:{session.pid}" in out
    assert f"[{task_id[:8]}]" in out
    assert "\x1b" not in out
    drawn = list(lines(story, width=80, drawn=Drawn.of("ascii")))
    assert all(len(line) <= 80 and line.isascii() for line in drawn)
    assert re.fullmatch(r"  came +\d.*\d +waited +held  who", drawn[0])
    assert "#" in drawn[3]
    assert Drawn.of("utf-8") != Drawn.of("ascii") == Drawn.of(None)


def test_the_page_loads_nothing_and_believes_nothing(app: Celery, opens: Opens, namespace: str) -> None:
    """One file, no script, no address; and what contenders say of themselves is text."""
    session = opens()
    nasty = '<script>alert("x")</script>'
    with acquire(session, f"/{namespace}/locks/proj.sync/a", describe={"task": nasty, "task_id": "'\"&<"}):
        page = here(app, "history", "--html").out
    assert "alert" in page
    tags: set[str] = set()

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.add(tag)
            assert not {name for name, _ in attributes} & {"src", "href", "onload", "onclick"}

    Parser().feed(page)
    assert {"svg", "rect", "table", "style"} <= tags
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import", page)


def test_after_a_compaction_it_says_where_it_begins(
    etcd: EtcdServer, app: Celery, opens: Opens, namespace: str
) -> None:
    """Who was in line already is told, with the time that he said himself."""
    session, name = opens(), f"/{namespace}/locks/proj.sync/a"
    Mutex(session, name).acquire().release()
    with Mutex(session, name).acquire():
        with closing(connect(etcd.url)) as transport:
            transport.txn(Txn([], [Put(f"/{namespace}/x", b"")]))
        compacted = revision(etcd)
        compact(etcd, compacted)
        said = json.loads(here(app, "history", "--json").out)
        (contender,) = said["locks"][0]["contenders"]
        assert (said["from"]["revision"], said["from"]["why"]) == (compacted, "compacted")
        assert contender["held_from"]["or_before"]
        assert contender["came"]["revision"] < compacted
        assert f"etcd keeps history since revision {compacted}" in here(app, "history").out


def test_thousands_of_revisions_are_read_and_no_more_than_asked(etcd: EtcdServer, app: Celery, namespace: str) -> None:
    """etcd tells them a thousand at a time, without an end: none is lost, and none waited for."""
    key = f"/{namespace}/locks/proj.sync/a/write/1"
    with closing(connect(etcd.url)) as transport:
        for _ in range(600):
            transport.txn(Txn([], [Put(key, b'{"host": "h", "pid": 1, "since": "2026-01-01T00:00:00Z"}')]))
            transport.delete(Delete(key))
    began = time.monotonic()
    said = json.loads(here(app, "history", "--json", "--since", "520w", "--limit", "100000").out)
    assert time.monotonic() - began < 15
    assert said["complete"]
    assert len(said["locks"][0]["contenders"]) == 600
    fewer = json.loads(here(app, "history", "--json", "--since", "520w", "--limit", "100000", "--look-back", "100").out)
    assert len(fewer["locks"][0]["contenders"]) == 50
    assert fewer["from"]["why"] == "asked"
    limited = json.loads(here(app, "history", "--json", "--since", "520w", "--limit", "7").out)
    assert (len(limited["locks"][0]["contenders"]), limited["left_out"]) == (7, 593)


def test_it_ends_where_nothing_has_happened(etcd: EtcdServer, app: Celery) -> None:
    """A watch that has nothing to tell says so by saying nothing."""
    with closing(connect(etcd.url)) as transport:
        transport.txn(Txn([], [Put("/somebody/elses", b"")]))
    began = time.monotonic()
    said = here(app, "history")
    assert time.monotonic() - began < 10
    assert said.status == 0
    assert "Nobody was in line" in said.out


def test_one_lock_that_is_no_task_of_this_project(app: Celery, opens: Opens) -> None:
    name = f"/maintenance-{uuid.uuid4().hex}"
    Mutex(opens(), name).acquire().release()
    (lock,) = json.loads(here(app, "history", name, "--json").out)["locks"]
    assert (lock["lock"], lock["task"]) == (name, "")
    assert lock["contenders"][0]["gone"]


def test_in_memory() -> None:
    with memory_locks() as store, closing(Session(MemoryTransport(store))) as session:
        Mutex(session, "/celery/locks/t/k").acquire().release()
        (lock,) = json.loads(here(app_with("memory://"), "history", "--json").out)["locks"]
        assert (lock["key"], bool(lock["contenders"][0]["gone"])) == ("k", True)


class Deaf(MemoryTransport):
    """Its watches tell nothing."""

    def watch(self, request: Watch) -> MemoryWatch:
        return super().watch(Watch("/nobody/puts/this"))


def test_what_a_watch_does_not_tell_is_missed() -> None:
    """It waits no longer than the timeout, and says that something is missing, or that nothing is."""
    store, scope = MemoryEtcd(), Scope("celery", lock="/l")
    transport = Deaf(store)
    for complete in (True, False):
        began = time.monotonic()
        reach = past.replay(transport, Told(scope, lambda _: None, 10), prefix="/l/", watched="/l/", look_back=100,
                            timeout=1.5)  # fmt: skip
        assert reach.complete == complete
        assert time.monotonic() - began < 20
        transport.txn(Txn([], [Put("/l/write/1", b"{}")]))


def test_a_compaction_in_the_middle_is_begun_anew_behind() -> None:
    store = MemoryEtcd()
    compacted: list[int] = []
    transport = MemoryTransport(store)
    for number in range(10):
        transport.txn(Txn([], [Put(f"/l/write/{number}", b"{}")]))

    def compact_once(verb: str, _: object) -> None:
        if verb == "watch" and not compacted:
            compacted.append(6)
            store.compact(6)

    transport.before = compact_once
    told = Told(Scope("celery", lock="/l"), lambda _: None, 100)
    reach = past.replay(transport, told, prefix="/l/", watched="/l/", look_back=100, timeout=2)
    assert (reach.start, reach.head, reach.compacted, reach.complete) == (6, 11, True, True)
    assert [stay.came for stay in told.timeline.finish()] == list(range(2, 12))


@pytest.mark.parametrize("compacted", [0, 2, 500, 999, 1000])
def test_the_oldest_revision_is_found_by_halves(compacted: int) -> None:
    store = MemoryEtcd()
    transport = MemoryTransport(store)
    for _ in range(999):
        transport.txn(Txn([], [Put("/k", b"")]))
    if compacted:
        store.compact(compacted)
    before = transport.requests
    assert past.oldest_revision(transport, "/k", 1000, timeout=10) == max(1, compacted)
    assert transport.requests - before < 15


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["proj.sink"], "did you mean proj.sync?"),
        (["/"], "a lock's name is"),
        (["--since", "soon"], "write it like 90s, 15m, 1h or 2d"),
        (["--json", "--html"], "write one"),
    ],
)
def test_what_cannot_be_meant(app: Celery, arguments: list[str], said: str) -> None:
    done = here(app, "history", *arguments)
    assert done.status in {1, 2}
    assert said in done.err


def test_no_etcd_is_one_line(namespace: str) -> None:
    done = here(app_with("http://127.0.0.1:1", namespace=namespace), "history")
    assert done.status == 1
    assert done.err.startswith("Error: no etcd there")
    assert len(done.err.splitlines()) == 1
