"""``celery etcd-lock hold``: a command under a task's lock, against real tasks in a real worker."""

from __future__ import annotations

import json
import signal
import sys
import uuid
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from celery_etcd_lock.etcd.api import Delete
from celery_etcd_lock.exceptions import LockContended
from celery_etcd_lock.locks.queue import describe
from tests.cli.conftest import Command
from tests.workers import Project, Run, until

Start = Callable[..., Command]


_TERMINAL = (
    sys.executable,
    "-c",
    """
import os, pty, sys
pid, master = pty.fork()
if not pid:
    os.execvp(sys.argv[1], sys.argv[1:])
seen, struck = b"", False
while True:
    try:
        piece = os.read(master, 1024)
    except OSError:
        break
    if not piece:
        break
    seen += piece
    os.write(1, piece)
    if b"ready" in seen and not struck:
        struck = True
        os.write(master, b"\\x03")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
""",
)
"""Runs a command in a terminal of its own, and types Ctrl-C when it is ready."""


_NOWHERE = ("sh", "-c", 'exec "$@" 2>/dev/full', "sh")
"""Runs a command whose stderr takes nothing, as that of a terminal that is gone."""


@pytest.fixture
def key() -> str:
    """The key of a lock that is this test's alone."""
    return uuid.uuid4().hex


def arguments(key: str) -> str:
    return json.dumps({"key": key})


def begun(hold: Command) -> str:
    """What its command has said, once it has said something."""
    until(lambda: "\n" in hold.out, "the command's start")
    return hold.out


def line(project: Project, key: str, task: str = "waiting") -> list[str]:
    """Who is in line for the lock of `task`, first come first."""
    queue = sorted(project.keys(f"locks/{task}/key={key}/"), key=lambda kv: kv.create_revision)
    return [describe(kv).holder for kv in queue]


def runs(project: Project, key: str) -> list[Run]:
    return [each for each in project.runs() if f"/key={key}/" in each.key]


def test_it_keeps_a_task_out_and_a_task_keeps_it_out(working: Project, run: Start, key: str, tmp_path: Path) -> None:
    """It waits for the run before it, says for whom, and is waited for; the tokens grow; its exit is the command's."""
    gate = tmp_path / "gate"
    before = working.send("gated", 1, str(gate), key)
    until(lambda: line(working, key, "gated"), "the run before")
    script = "echo $ETCD_LOCK_KEY $ETCD_LOCK_REV; while [ ! -e go ]; do sleep 0.05; done; exit 7"
    hold = run("hold", "gated", arguments(key), "--", "sh", "-c", script)
    until(lambda: hold.err, "its waiting")
    assert len(line(working, key, "gated")) == 2
    assert hold.out == ""
    gate.touch()
    assert before.get(timeout=60) == 1
    begun(hold)
    after = working.send("gated", 2, str(gate), key)
    until(lambda: len(line(working, key, "gated")) == 2, "the run after, in line")
    assert [each.number for each in runs(working, key)] == [1]
    assert "for etcd-lock hold: sh …" in line(working, key, "gated")[0]
    (hold.folder / "go").touch()
    assert hold.wait() == 7
    assert after.get(timeout=60) == 2
    first, second = runs(working, key)
    name, token = hold.out.split()
    assert name.startswith(f"/{working.queue}/locks/gated/key={key}/write/")
    assert first.token < int(token) < second.token
    waited, held = hold.err.splitlines()
    assert waited.startswith(f"waiting for gated key={key}, next in line: held by ")
    assert f"for gated[{before.id}] since 2" in waited
    assert held == f"holding gated key={key}: fencing token {token}"


def test_it_keeps_out_each_of_a_limited_task(working: Project, run: Start, key: str) -> None:
    """Though that lets in two at once; the refusal names the holder by the reason that was given."""
    hold = run("hold", "limited_fails", arguments(key), "--reason", "deploy 1.4")
    until(lambda: "holding" in hold.err, "the hold")
    with pytest.raises(LockContended, match=r"for etcd-lock hold: deploy 1\.4"):
        working.send("limited_fails", 1, 0.0, key).get(timeout=60)
    assert hold.stop(signal.SIGINT) == 0
    assert working.send("limited_fails", 2, 0.0, key).get(timeout=60) == 2


def test_it_can_be_held_beside_shared_ones(working: Project, run: Start, key: str) -> None:
    """With ``--shared`` readers go on, and writers are kept out; alone it keeps the readers out, too."""
    name = f"/{working.queue}/locks/@shared/catalog%2F{key}"
    hold = run("hold", "reading", json.dumps([0, 0.0, key]), "--shared")
    until(lambda: "holding /catalog/" in hold.err, "the hold")
    assert working.send("reading", 1, 0.0, key).get(timeout=60) == 1
    writing = working.send("writing", 2, 0.0, key)
    until(lambda: writing.state == "RETRY", "the refusal")
    assert hold.stop() == 0
    assert writing.get(timeout=60) == 2
    alone = run("hold", name)
    until(lambda: "holding" in alone.err, "the hold")
    reading = working.send("reading", 3, 0.0, key)
    until(lambda: reading.state == "RETRY", "the refusal")
    assert alone.stop() == 0
    assert reading.get(timeout=60) == 3


def test_the_command_is_ended_when_the_lock_is_lost(working: Project, run: Start, key: str) -> None:
    """Its key deleted: SIGTERM, and SIGKILL after the grace, for all that it has started; and an exit of its own."""
    loop = "sleep 600 & echo $!; while :; do wait; done"
    obeys = run("hold", "waiting", arguments(key), "--", "sh", "-c", f"trap 'echo bye; exit 3' TERM; {loop}")
    defies = run(
        "hold", "waiting", arguments(key + "2"), "--kill-after", "0.3", "--", "sh", "-c", f"trap 'echo no' TERM; {loop}"
    )
    in_a_terminal = run(
        "hold", "waiting", arguments(key + "3"), "--", "sh", "-c", f"trap '' HUP; {loop}", before=_TERMINAL
    )
    unheard = run("hold", "waiting", arguments(key + "5"), "--", "sh", "-c", loop, before=_NOWHERE)
    four = (obeys, defies, in_a_terminal, unheard)
    idle = run("hold", "waiting", arguments(key + "4"))
    children = [Path("/proc") / until(partial(pid_in, each), "a start") for each in four]
    assert all(child.exists() for child in children)
    until(lambda: "holding" in idle.err, "the hold of none")
    with closing(working.connect()) as transport:
        contenders = [kv.key for kv in working.keys(f"locks/waiting/key={key}")]
        for contender in contenders:
            transport.delete(Delete(contender))
    assert len(contenders) == 5
    assert [each.wait() for each in (*four, idle)] == [125] * 5
    assert f"key {contenders[0]} was deleted. Ending sh\n" in obeys.err
    assert "sh ended with status 3, " in obeys.err
    assert "sh ended with status 137, " in defies.err
    assert (obeys.out.split()[1:], defies.out.split()[1:]) == (["bye"], ["no"])
    assert not any(map(is_alive, children)), "what they had started"
    assert line(working, key) == []


def pid_in(hold: Command) -> str:
    return next((line for line in hold.out.splitlines() if line.isdigit()), "")


def is_alive(process: Path) -> bool:
    try:
        return "Z" not in (process / "stat").read_text().rpartition(")")[2]
    except OSError:
        return False


def test_a_signal_is_passed_on_once(working: Project, run: Start, key: str) -> None:
    """To the command, which decides what becomes of it."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    holds = [
        run(
            "hold",
            "waiting",
            arguments(f"{key}-{number}"),
            "--",
            sys.executable,
            "-c",
            _HEARS.format(number=int(number)),
        )
        for number in numbers
    ]
    for hold, number in zip(holds, numbers, strict=True):
        begun(hold)
        hold.process.send_signal(number)
    assert [hold.wait() for hold in holds] == [5, 5, 5]
    assert [hold.out.split() for hold in holds] == [["ready", "heard"]] * 3


_HEARS = """
import signal, sys, time
heard = []
signal.signal({number}, lambda *_: (heard.append(1), print("heard", flush=True)))
print("ready", flush=True)
while not heard:
    time.sleep(0.02)
time.sleep(0.5)
sys.exit(5)
"""


def test_ctrl_c_in_a_terminal_reaches_it_once(working: Project, run: Start, key: str) -> None:
    """The terminal tells the command itself, and nobody tells it again."""
    script = _HEARS.format(number=int(signal.SIGINT))
    hold = run("hold", "waiting", arguments(key), "--", sys.executable, "-c", script, before=_TERMINAL)
    assert hold.wait() == 5, hold.out + hold.err
    assert hold.out.count("heard") == 1
    assert "holding waiting" in hold.out


def test_how_it_ends(working: Project, run: Start, key: str, tmp_path: Path) -> None:
    """By a signal to the command, by ``--timeout``, by Ctrl-C while it waits, by an etcd that is not there."""
    killed = run("hold", "waiting", arguments(key), "--", "sh", "-c", "kill -9 $$")
    assert killed.wait() == 128 + 9
    hold = run("hold", "waiting", arguments(key))
    until(lambda: "holding" in hold.err, "the hold")
    waits = run("hold", "waiting", arguments(key), "--", "true")
    late = run("hold", "waiting", arguments(key), "--timeout", "0.5", "--", "true")
    dead = run("hold", "waiting", arguments(key), "--", "true", project=_without_etcd(working))
    assert late.wait() == 124
    assert "did not come free within 0.5 s: it is held by" in late.err
    until(lambda: "waiting for" in waits.err, "its waiting")
    assert waits.stop(signal.SIGINT) == 130
    assert len(line(working, key)) == 1
    assert dead.wait() == 1
    assert "no etcd there" in dead.err
    assert hold.stop() == 0
    assert line(working, key) == []


def _without_etcd(project: Project) -> Project:
    return Project(project.broker_url, "http://127.0.0.1:1", project.folder, dict(project.settings))


def test_a_command_that_cannot_be_run(working: Project, run: Start, key: str) -> None:
    """Is told before anybody waits, with a shell's exit statuses."""
    missing = run("hold", "waiting", arguments(key), "--", "no-such-command")
    folder = run("hold", "waiting", arguments(key), "--", "/etc")
    assert (missing.wait(), folder.wait()) == (127, 126)
    assert "no-such-command: there is no such command" in missing.err
    assert "/etc: cannot be executed" in folder.err
