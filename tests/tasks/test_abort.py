"""Ending a body from outside: in the main thread by a signal, in another by an asynchronous exception."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from celery_etcd_lock import LockLost
from celery_etcd_lock.tasks.abort import Abort


def fire_soon(abort: Abort, started: threading.Event) -> threading.Thread:
    def fire() -> None:
        started.wait(10)
        abort.fire("staged")

    thread = threading.Thread(target=fire)
    thread.start()
    return thread


def sleeping(started: threading.Event) -> Callable[[], str]:
    def body() -> str:
        started.set()
        time.sleep(60)
        return "slept"

    return body


def spinning(started: threading.Event) -> Callable[[], str]:
    def body() -> str:
        started.set()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass
        return "spun"

    return body


@pytest.mark.parametrize("make_body", [sleeping, spinning])
def test_ends_a_body_in_the_main_thread(make_body: Callable[..., Any]) -> None:
    """A sleep of a minute ends at once, with the reason."""
    abort, started = Abort(), threading.Event()
    thread = fire_soon(abort, started)
    begun = time.monotonic()
    with pytest.raises(LockLost, match="staged"):
        abort.run(make_body(started))
    assert time.monotonic() - begun < 10
    thread.join()


def test_ends_a_body_in_another_thread() -> None:
    """Python code in a thread is ended, with the reason."""
    caught: list[str] = []

    def work() -> None:
        abort, started = Abort(), threading.Event()
        thread = fire_soon(abort, started)
        try:
            abort.run(spinning(started))
        except LockLost as lost:
            caught.append(str(lost))
        thread.join()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert caught == ["staged"]


def test_what_comes_before_the_body_keeps_it_from_starting() -> None:
    """A loss between acquire and body: the body does not run."""
    abort = Abort()
    abort.fire("early")
    with pytest.raises(LockLost, match="early"):
        abort.run(lambda: pytest.fail("must not run"))


def test_what_comes_after_the_body_hits_nobody() -> None:
    """Once the body is through, a loss raises nothing, in the main thread or another."""
    abort = Abort()
    assert abort.run(lambda: 1) == 1
    abort.fire("late")
    time.sleep(0)
    quiet: list[int] = []

    def work() -> None:
        late = Abort()
        late.run(lambda: None)
        late.fire("late")
        quiet.extend(range(1000))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert len(quiet) == 1000


def test_a_storm_around_the_end_of_the_body_stays_inside() -> None:
    """Fired at any instant around the end of the body, LockLost comes out of `run` or not at all. 2,000 tries."""
    outcomes = {"ran": 0, "lost": 0}

    def work() -> None:
        for _ in range(1000):
            abort, started = Abort(), threading.Event()
            thread = fire_soon(abort, started)
            try:
                abort.run(started.set)
                outcomes["ran"] += 1
            except LockLost:
                outcomes["lost"] += 1
            thread.join()

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert sum(outcomes.values()) == 2000
    assert Abort._in_main is None


def test_leaves_the_handler_that_was_there() -> None:
    """A project's own SIGURG handler still gets what is not ours."""
    came: list[int] = []
    before = signal.signal(signal.SIGURG, lambda number, _frame: came.append(number))
    try:
        abort = Abort()
        abort.run(lambda: signal.raise_signal(signal.SIGURG))
        assert came == [signal.SIGURG]
    finally:
        signal.signal(signal.SIGURG, before)


STORM = """
import gevent.monkey
gevent.monkey.patch_all()
import random, threading, time
import gevent
from celery_etcd_lock.exceptions import LockLost
from celery_etcd_lock.tasks.abort import Abort

wrong, lost = [], []

def sleeping(number):
    abort = Abort()
    aborts.append(abort)
    try:
        abort.run(lambda: time.sleep(0.02 * random.random()) or gevent.sleep(0.01))
    except LockLost as error:
        lost.append(number)
        if error.args != (f"staged {number}",):
            wrong.append((number, error.args))
    try:  # Celery's code, after the body
        gevent.sleep(0.02)
    except LockLost as error:
        wrong.append((number, "late"))

for round_ in range(20):
    aborts = []
    bodies = [gevent.spawn(sleeping, number) for number in range(50)]
    gevent.sleep(0)
    assert len(aborts) == 50
    victims = random.sample(range(50), 25)
    for number in victims:
        gevent.sleep(0.001 * random.random())
        threading.Thread(target=aborts[number].fire, args=(f"staged {number}",)).start()
    gevent.joinall(bodies, raise_error=True)
    wrong += [(number, "not fired") for number in lost if number not in victims]
    counts = len(lost)
    lost.clear()
    print(counts)
assert not wrong, wrong
begun = time.monotonic()
abort = Abort()
threading.Timer(0.2, abort.fire, ["main"]).start()
try:
    abort.run(lambda: time.sleep(60))
    raise SystemExit("slept")
except LockLost as error:
    assert str(error) == "main", error
assert time.monotonic() - begun < 30
print("done")
"""


def test_in_gevent_the_right_greenlet_is_ended_and_no_other() -> None:
    """1,000 bodies in greenlets of one thread, 500 of them fired at around their ends: none but these, none after."""
    done = subprocess.run([sys.executable, "-c", STORM], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    *ended, last = done.stdout.split()
    assert last == "done"
    assert 0 < sum(map(int, ended)) <= 500
