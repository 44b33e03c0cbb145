"""etcd away, full, or with its doors locked: no tick without it, one word about it, and on as soon as it serves."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_etcd_lock.signals import LeaderElectedRecord, LeaderLostRecord
from celery_etcd_lock.testing import EtcdServer
from tests.beat.bench import Bench
from tests.quota import fill, make_room, small_etcd
from tests.servers import free_port

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


def test_a_wrong_password_and_the_right_one(
    new_bench: NewBench, own: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
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
    run("user", "grant-role", "beat", "root")
    run("auth", "enable")
    bench = new_bench(
        {"soon": SOON}, etcd_url=own.url, etcd_lock_username="beat", etcd_lock_password="wrong", etcd_lock_timeout=1
    )
    beat = bench.scheduler()
    ticks(beat, 2.5)
    (said,) = lines(caplog, "etcd_lock.beat_unavailable")
    assert "refuses" in said
    assert "wrong" not in said
    assert "etcd_lock_password" in said
    run("--user", "root:root", "user", "passwd", "beat", "--interactive=false", password="wrong")
    bench.tick(beat, lambda: bench.signals(LeaderElectedRecord))
