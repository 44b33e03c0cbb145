"""etcd away, full, or with its doors locked: no tick without it, one word about it, and on as soon as it serves."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_etcd_lock.beat.outage import Outage
from celery_etcd_lock.exceptions import EtcdUnavailable
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.signals import LeaderElectedRecord, LeaderLostRecord
from celery_etcd_lock.tasks.spell import Spell
from celery_etcd_lock.testing import EtcdServer
from tests.beat.bench import Bench
from tests.clock import Clock
from tests.quota import fill, make_room, small_etcd
from tests.servers import free_port
from tests.workers import until

NewBench = Callable[..., Bench]
SOON = {"task": "plain", "schedule": 0.3}


@pytest.fixture
def own() -> Iterator[EtcdServer]:
    """An etcd that may be stopped."""
    with EtcdServer() as server:
        yield server


def lines(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.getMessage().startswith(name)]


def ticks(beat: Any, seconds: float) -> None:
    """Tick for so long, as Celery does."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(min(max(beat.tick() or 0.0, 0.0), 0.1))


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_an_etcd_that_is_away_for_longer_than_the_lease(
    new_bench: NewBench, own: EtcdServer, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Nothing is sent meanwhile, that is said once, and what is due then is sent once, by whoever is elected."""
    bench = new_bench({"soon": SOON}, etcd_url=own.url, etcd_lock_beat_ttl=3, etcd_lock_timeout=1)
    beat = bench.leading()
    bench.ticked(beat)
    if how == "killed":
        own.kill()
    else:
        own.pause()
    ticks(beat, 0.5)  # one tick may have been marked already
    there = len(bench.sent())
    ticks(beat, 5.0)
    assert len(bench.sent()) == there
    assert len(bench.signals(LeaderLostRecord)) == 1
    if how == "killed":
        own.start()
    else:
        own.resume()
    bench.ticked(beat, 2)
    assert len(lines(caplog, "etcd_lock.beat_unavailable")) == 1
    assert len(lines(caplog, "etcd_lock.beat_available")) == 1
    assert len(bench.signals(LeaderElectedRecord)) == 2
    ids = [each.id for each in bench.sent()]
    assert len(set(ids)) == len(ids)


def test_a_short_absence_costs_no_leadership(new_bench: NewBench, own: EtcdServer) -> None:
    bench = new_bench({"soon": SOON}, etcd_url=own.url, etcd_lock_timeout=1)
    beat = bench.leading()
    bench.ticked(beat)
    own.kill()
    ticks(beat, 1.0)
    own.start()
    bench.ticked(beat, 2)
    assert not bench.signals(LeaderLostRecord)


def test_a_beat_that_starts_without_etcd_waits_for_it(new_bench: NewBench, caplog: pytest.LogCaptureFixture) -> None:
    bench = new_bench({"soon": SOON}, etcd_url=f"http://127.0.0.1:{free_port()}", etcd_lock_timeout=1)
    beat = bench.scheduler()
    ticks(beat, 2.5)
    (said,) = lines(caplog, "etcd_lock.beat_unavailable")
    assert "This beat (default) sends nothing now" in said
    assert "Set etcd_lock_endpoints" in said
    assert not bench.sent()


def test_an_outage_is_spoken_of_once_a_minute(new_bench: NewBench, caplog: pytest.LogCaptureFixture) -> None:
    """And when it is over, for how long it was; the next one is a new one."""
    clock = Clock()
    outage = Outage(Settings.from_app(new_bench({}).app))
    outage._spell = Spell(1.0, clock)
    for _ in range(125):
        outage.fails(EtcdUnavailable("nobody"))
        clock.now += 1
    said = lines(caplog, "etcd_lock.beat_unavailable")
    assert ["still no etcd" in each for each in said] == [False, True, True]
    assert "for 120 s" in said[2]
    assert outage.lasts
    outage.over()
    outage.over()
    assert lines(caplog, "etcd_lock.beat_available") == ["etcd_lock.beat_available: etcd is back after 125 s"]
    outage.fails(EtcdUnavailable("nobody"))
    assert len(lines(caplog, "etcd_lock.beat_unavailable")) == 4


def test_an_etcd_that_is_full(new_bench: NewBench, caplog: pytest.LogCaptureFixture) -> None:
    """It refuses the mark, so nothing is sent; said once, with what etcd says. It goes on when there is room again."""
    with small_etcd() as full:
        bench = new_bench({"soon": SOON}, etcd_url=full.url)
        beat = bench.leading()
        bench.ticked(beat)
        refusal = fill(full)
        ticks(beat, 1.0)
        there = len(bench.sent())
        ticks(beat, 2.0)
        assert len(bench.sent()) == there
        (said,) = lines(caplog, "etcd_lock.beat_unavailable")
        assert "refuses" in said
        assert "quota" in said
        make_room(full, refusal)
        bench.ticked(beat)


def test_doors_that_are_locked_and_opened(
    new_bench: NewBench, own: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A password that is wrong, then a role that grants nothing: each is said, and it goes on when it is let in."""
    etcdctl = own.etcdctl
    if etcdctl is None:
        pytest.skip("no etcdctl beside this etcd")

    def run(*arguments: str, password: str = "") -> None:
        subprocess.run(
            [etcdctl, "--endpoints", own.url, *arguments], check=True, input=password.encode(), capture_output=True,
            env={**os.environ, "ETCDCTL_API": "3"},
        )  # fmt: skip

    run("user", "add", "root:root")
    run("user", "grant-role", "root", "root")
    run("user", "add", "beat:right")
    run("role", "add", "beat")
    run("user", "grant-role", "beat", "beat")
    run("auth", "enable")
    bench = new_bench(
        {"soon": SOON}, etcd_url=own.url, etcd_lock_username="beat", etcd_lock_password="wrong", etcd_lock_timeout=1
    )
    beat = bench.scheduler()
    ticks(beat, 1.5)
    (said,) = lines(caplog, "etcd_lock.beat_unavailable")
    assert "refuses" in said
    assert "wrong" not in said
    assert "etcd_lock_password" in said
    run("--user", "root:root", "user", "passwd", "beat", "--interactive=false", password="wrong")

    def asks() -> bool:
        beat._outage._spell._said -= 60  # that was a minute ago
        ticks(beat, 0.2)
        return "permission" in caplog.text

    until(asks, "that the role is what it lacks")
    said = lines(caplog, "etcd_lock.beat_unavailable")[-1]
    assert f"role grant-permission ROLE readwrite --prefix /{bench.name}/" in said
    run("--user", "root:root", "role", "grant-permission", "beat", "readwrite", "--prefix", f"/{bench.name}/")
    bench.tick(beat, lambda: bench.signals(LeaderElectedRecord))
    bench.ticked(beat)
    assert len(lines(caplog, "etcd_lock.beat_available")) == 1
