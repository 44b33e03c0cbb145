"""``ls``, ``show``, ``why`` and ``sessions``, of a worker whose tasks hold locks, wait for them and are put back."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from celery import Celery

from celery_etcd_lock.etcd.api import Put, Txn
from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.locks.acquire import acquire
from celery_etcd_lock.locks.queue import EXCLUSIVE
from celery_etcd_lock.testing import EtcdServer
from tests.cli.installed import Said, app_with, here, in_terminal, metadata, piped
from tests.servers import RedisServer
from tests.workers import Project, project, until

LONG = "a-key-that-is-far-too-long-for-a-table-of-eighty-columns"
SOON = ("--timeout", "0.5")
"""Of a worker that has nothing else to do."""


@dataclass
class Scene:
    """Tasks by what they do: ``holder`` and ``next``, ``last`` in line behind it; ``away``, put back behind `other`."""

    project: Project
    environment: dict[str, str]
    ids: dict[str, str]
    other: Session

    @property
    def app(self) -> Celery:
        """One that does not know the tasks."""
        return self.project.app

    @property
    def locks(self) -> str:
        return f"/{self.project.queue}/locks/"

    def say(self, *arguments: str) -> Said:
        return piped(self.environment, *arguments)


@pytest.fixture(scope="module")
def scene(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    (folder / "installed").mkdir()
    with ExitStack() as stack:
        running = stack.enter_context(project(redis.url, etcd.url, folder))
        environment = running.environment
        running.app.conf.update(etcd_lock_endpoints=etcd.url, etcd_lock_namespace=running.queue)
        environment["PYTHONPATH"] = f"{metadata(folder / 'installed')}:{environment['PYTHONPATH']}"
        other = stack.enter_context(Session.open(etcd.url, namespace=running.queue))
        stack.enter_context(Mutex(other, f"/{running.queue}/locks/later/all").acquire())
        running.worker("-P", "threads", "-c", "12")
        ids = {}

        def start(who: str, task: str, key: str, there: int) -> None:
            ids[who] = running.send(task, 1, 600.0, key).id
            until(partial(_there, running, f"locks/{task}/key={key}/", there), who)

        for there, who in enumerate(("holder", "next", "last"), 1):
            start(who, "waiting", LONG, there)
        for there, who in enumerate(("first slot", "second slot", "no slot"), 1):
            start(who, "limited_in_turn", "s", there)
        for number, who in enumerate(("reader", "second reader"), 1):
            ids[who] = running.send("reading", 1, 600.0, "c").id
            until(partial(_there, running, "locks/@shared/", number), who)
        ids["away"] = running.send("later", 1).id
        until(lambda: running.app.AsyncResult(ids["away"]).state == "RETRY", "what is put back")
        yield Scene(running, environment, ids, other)


def _there(running: Project, under: str, many: int) -> bool:
    return len(running.keys(under)) == many


def parsed(said: Said) -> Any:
    assert said.status == 0, said.err
    return json.loads(said.out)


def by_key(listed: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {each["key"]: each for each in listed}


def test_ls_as_json_is_as_promised(scene: Scene) -> None:
    """Lock, task, key and mode; each holder's record with its token; how many wait. Of slots, too, who is in."""
    listed = parsed(scene.say("ls", "--json"))
    assert [set(each) for each in listed] == [{"lock", "task", "key", "mode", "holders", "waiting"}] * 4
    locks = by_key(listed)
    long = locks[f"key={LONG}"]
    assert (long["lock"], long["task"], long["mode"]) == (f"{scene.locks}waiting/key={LONG}", "waiting", "exclusive")
    (holder,) = long["holders"]
    (run,) = scene.project.runs("waiting")
    assert holder["task_id"] == scene.ids["holder"]
    assert (holder["pid"], holder["token"], long["waiting"]) == (run.pid, run.token, 2)
    slots = locks["key=s"]
    assert (slots["mode"], slots["waiting"]) == ("limited", 1)
    assert [each["task_id"] for each in slots["holders"]] == [scene.ids["first slot"], scene.ids["second slot"]]
    shared = locks["/catalog/c"]
    assert (shared["task"], shared["mode"], shared["waiting"], len(shared["holders"])) == ("", "shared", 0, 2)
    assert "task_id" not in locks["all"]["holders"][0], "it is a session without a task"


def test_ls_in_a_pipe_is_for_grep(scene: Scene) -> None:
    """Nothing is coloured or shortened, and each line begins with its task and ends with how many wait."""
    said = scene.say("ls")
    assert (said.status, said.err) == (0, "")
    assert "\033" not in said.out
    assert "…" not in said.out
    head, *lines = said.out.splitlines()
    assert head.split() == ["TASK", "KEY", "HOST", "PID", "TASK", "ID", "AGE", "TTL", "WAIT"]
    (line,) = [line for line in lines if scene.ids["holder"] in line]
    task, key, _, pid, _, age, ttl, waiting = line.split()
    assert (task, key, waiting) == ("waiting", f"key={LONG}", "2")
    assert int(pid) == scene.project.runs("waiting")[0].pid
    assert re.fullmatch(r"(\d+m)?\d+s", age)
    assert 0 < int(ttl.removesuffix("s")) <= 30
    assert sum(line.startswith("reading ") for line in lines) == 2


@pytest.mark.parametrize("command", [("ls",), ("show", "waiting", f"key={LONG}")], ids=["ls", "show"])
def test_a_terminal_of_eighty_columns(scene: Scene, command: tuple[str, ...]) -> None:
    """Colours, and no line of a table is broken: what does not fit ends in …"""
    said = in_terminal(scene.environment, 80, *command)
    assert said.status == 0
    assert "\033[1m" in said.out
    lines = re.sub(r"\033\[\d*m", "", said.out).splitlines()
    name = f"{scene.locks}waiting/key={LONG}"  # which is to be copied, whatever its length
    assert [line for line in lines if len(line) > 80 and not line.startswith(name)] == []
    assert (command == ("ls",)) is any("…" in line for line in lines)
    if command == ("ls",):
        (line,) = [line for line in lines if "key=a-key" in line]
        assert line.split()[-1] == "2"
        assert "waiting" in lines, "by task"


def test_ls_filters(scene: Scene) -> None:
    """By task and key, with * and ?; by host, by who is waited for, by age; and no more than so many."""

    def keys(*arguments: str) -> set[str]:
        return {each["key"] for each in parsed(here(scene.app, "ls", "--json", *arguments))}

    everything = {f"key={LONG}", "key=s", "/catalog/c", "all"}
    assert keys() == everything
    assert keys("--task", "waiting") == {f"key={LONG}"}
    assert keys("--task", "wait") == set(), "the beginning of a name is not the name"
    assert keys("--task", "l*") == {"key=s", "all"}
    assert keys("--task", "*ing") == {f"key={LONG}"}
    assert keys("--key", "key=?") == {"key=s"}
    assert keys("--waiting") == {f"key={LONG}", "key=s"}
    assert keys("--host", "no-such-host") == set()
    assert keys("--host", scene.other.host) == everything
    assert keys("--older", "3600") == set()
    assert keys("--older", "0") == everything
    said = here(scene.app, "ls", "--limit", "1")
    assert len(said.out.splitlines()) == 3, "a head, and the two readers"
    assert "and more" in said.err
    none = here(scene.app, "ls", "--task", "nobody")
    assert (none.status, none.out, none.err) == (0, "", "no lock that is held is of that kind\n")


def test_who_is_in_is_not_guessed(scene: Scene) -> None:
    """Of a limit that this app does not know only the first holder is sure; and that is said."""
    said = here(scene.app, "ls", "--task", "limited_in_turn")
    assert said.out.splitlines()[1].endswith("<=2")
    assert "not known here" in said.err
    shown = here(scene.app, "show", "limited_in_turn", "key=s").out
    assert [line.split()[1] for line in shown.splitlines()[3:6]] == ["holds", "waits?", "waits?"]
    known = scene.say("show", "limited_in_turn", "key=s").out
    assert [line.split()[1] for line in known.splitlines()[3:6]] == ["holds", "holds", "waits"]


@pytest.mark.parametrize("how", [("waiting",), ("waiting", f"key={LONG}"), (f"waiting key={LONG}",), ("name in etcd",)])
def test_show_is_the_queue_in_its_order(scene: Scene, how: tuple[str, ...]) -> None:
    """However the lock is named: by its task, if that has only one; by task and key; by its name in etcd."""
    asked = [f"{scene.locks}waiting/key={LONG}" if each == "name in etcd" else each for each in how]
    shown = parsed(here(scene.app, "show", "--json", *asked))
    queue = shown["queue"]
    assert [each["task_id"] for each in queue] == [scene.ids[who] for who in ("holder", "next", "last")]
    assert [each["holds"] for each in queue] == [True, False, False]
    assert all(0 < each["ttl"] <= 30 for each in queue)
    assert shown["lock"] == f"{scene.locks}waiting/key={LONG}"


def test_show_of_a_shared_key(scene: Scene) -> None:
    """It is named as `lock_key` has it."""
    assert len(parsed(here(scene.app, "show", "--json", "/catalog/c"))["queue"]) == 2


def test_an_unknown_lock_says_what_is_near(scene: Scene) -> None:
    said = here(scene.app, "show", "limited_in_tern", "key=s")
    assert (said.status, said.out) == (1, "")
    assert said.err == "Error: nobody holds limited_in_tern key=s: did you mean 'limited_in_turn key=s'?\n"
    assert "celery etcd-lock ls" in here(scene.app, "show", "x" * 30).err


def test_why_a_task_waits_in_line(scene: Scene) -> None:
    """Which lock, who holds it, since when; that it needs no next try."""
    said = here(scene.app, "why", *SOON, scene.ids["last"])
    assert said.status == 0, said.err
    told = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert told["task"] == f"waiting[{scene.ids['last']}]"
    assert told["state"] == "waits in line, in a worker's slot: 1 wait before it"
    assert f"{scene.locks}waiting/key={LONG}" in told["lock"]
    pid = scene.project.runs("waiting")[0].pid
    assert f"(pid {pid}) for waiting[{scene.ids['holder']}], since 20" in told["held"]
    assert "not" not in told, "all was found out"
    running = parsed(here(scene.app, "why", *SOON, "--json", scene.ids["holder"]))
    assert (running["state"], running["holders"], running["unknown"]) == ("running", [], [])


def test_why_a_task_was_put_back(scene: Scene) -> None:
    """What is only in its message: how often it has tried, for how long, when it will next; and who holds the lock."""
    story = parsed(scene.say("why", "--json", scene.ids["away"]))
    assert (story["task"], story["state"], story["result"]) == ("later", "put back", "RETRY")
    assert story["lock"] == f"{scene.locks}later/all"
    assert [each["host"] for each in story["holders"]] == [scene.other.host]
    assert story["tried"] >= 1
    assert story["waited"] > 0
    assert story["worker"].endswith("@test")
    assert story["next"] > time.strftime("%Y-%m-%dT%H:", time.gmtime(time.time() - 60))
    assert story["unknown"] == []
    told = here(scene.app, "why", *SOON, scene.ids["away"]).out
    assert re.search(r"^tried +(once|\d+ times), for .* now$", told, re.MULTILINE), told
    assert re.search(r"^next +in \d+s, at 20", told, re.MULTILINE), told


def test_why_says_what_it_could_not_find_out(scene: Scene) -> None:
    """A broker and a result backend that are silent are not waited for; what etcd knows is told all the same."""
    with RedisServer() as silent:
        silent.pause()
        environment = scene.environment | {"BROKER_URL": silent.url, "BACKEND_URL": silent.url}
        began = time.monotonic()
        story = parsed(piped(environment, "why", "--json", *SOON, scene.ids["next"]))
        assert time.monotonic() - began < 15
        silent.resume()
    assert story["state"] == "in line"
    assert [each["task_id"] for each in story["holders"]] == [scene.ids["holder"]]
    assert [each.split(":")[0] for each in story["unknown"][:2]] == ["what is in the workers", "its result"]


def test_why_of_an_id_that_nobody_knows(scene: Scene) -> None:
    said = here(scene.app, "why", *SOON, "no-such-id")
    assert (said.status, said.out) == (1, "")
    assert said.err.startswith("Error: nothing is known of task no-such-id: ")


def test_sessions(scene: Scene) -> None:
    """The worker's and the test's own: where, since when, for how long still, and which locks."""
    said = parsed(here(scene.app, "sessions", "--json"))
    sessions = {each["lease"]: each for each in said}
    assert len(sessions) == 2
    own = sessions.pop(f"{scene.other.lease:x}")
    assert (own["pid"], own["locks"]) == (scene.other.pid, [f"{scene.locks}later/all"])
    (worker,) = sessions.values()
    assert worker["pid"] == scene.project.runs()[0].pid
    assert len(worker["locks"]) == 3
    assert 0 < worker["ttl"] <= 30
    assert worker["start"].startswith("20")
    lines = here(scene.app, "sessions").out.splitlines()
    assert lines[0].split()[-1] == "LOCKS"
    assert {line.split()[-1] for line in lines[1:]} == {"1", "3"}


def test_strangers_and_leftovers(scene: Scene, etcd: EtcdServer) -> None:
    """A key that no lease ends, with how to delete it; and a lock that `lock_at_least_for` keeps after its run."""
    app = app_with(etcd.url, namespace=f"{scene.project.queue}-2")
    prefix = f"/{scene.project.queue}-2/locks/"
    with Session.open(etcd.url, namespace=f"{scene.project.queue}-2") as session:
        session.transport.txn(Txn([], [Put(f"{prefix}forgotten/-/abc", b"")]))
        acquire(session, f"{prefix}bursts/-", EXCLUSIVE, blocking=False, at_least_for=20).release()
        forgotten = here(app, "show", "forgotten").out
        assert "another client" in forgotten
        assert "never" in forgotten
        assert f"etcdctl del {prefix}forgotten/-/abc" in forgotten
        kept = here(app, "show", "bursts").out
        assert "(has ended)" in kept
        assert re.search(r"its lock_at_least_for keeps the lock for \d+s more", kept)
        assert len(kept.splitlines()) == 5, "the two keys of one holder are one line"
        assert "forgotten" in here(app, "ls").out
        session.transport.txn(Txn([], [Put(f"{prefix}ring/%07/abc", b"")]))
        assert "\a" not in here(app, "ls").out + here(app, "show", "ring").out, "whatever somebody calls a key"
