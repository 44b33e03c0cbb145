"""What can be wrong with etcd or the settings: one clear line on stderr, status 1, and never a long wait."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from celery_etcd_lock.testing import EtcdServer
from tests.cli.installed import app_with, here
from tests.etcd.test_gateway import etcdctl

COMMANDS = [("ls",), ("show", "shop.sync"), ("why", "some-id"), ("sessions",), ("beat",)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_no_etcd_there(command: tuple[str, ...]) -> None:
    said = here(app_with("http://127.0.0.1:1"), *command)
    assert (said.status, said.out) == (1, "")
    assert said.err == "Error: no etcd there: http://127.0.0.1:1: connection refused\n"


def test_no_etcd_where_nobody_has_said_that_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which setting it is that is missing."""
    monkeypatch.delenv("CELERY_ETCD_LOCK_ENDPOINTS", raising=False)
    app = app_with("")
    app.conf.etcd_lock_endpoints = None
    said = here(app, "ls")
    if said.status == 0:
        pytest.skip("somebody's etcd runs here")
    assert "127.0.0.1:2379" in said.err
    assert "set etcd_lock_endpoints" in said.err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_an_etcd_that_is_silent(own: EtcdServer, command: tuple[str, ...]) -> None:
    """The setting bounds the wait."""
    own.pause()
    try:
        began = time.monotonic()
        said = here(app_with(own.url, timeout=0.2, beat_ttl=15), *command)
        assert time.monotonic() - began < 10
    finally:
        own.resume()
    assert (said.status, said.out) == (1, "")
    assert said.err.startswith("Error: no etcd member answered within 0.2 s: ")
    assert said.err.count("\n") == 1


def test_who_is_not_let_in(own: EtcdServer) -> None:
    """A wrong password; a user whose role has no such permission, and what to grant."""
    etcdctl(own, "user", "add", "root:correct-horse")
    etcdctl(own, "user", "grant-role", "root", "root")
    etcdctl(own, "user", "add", "limited:battery")
    etcdctl(own, "auth", "enable")
    try:
        wrong = here(app_with(own.url, username="limited", password="staple"), "ls")
        assert (wrong.status, wrong.out, wrong.err.count("\n")) == (1, "", 1)
        assert "etcd_lock_username, etcd_lock_password" in wrong.err
        denied = here(app_with(own.url, username="limited", password="battery"), "ls")
        assert (denied.status, denied.out, denied.err.count("\n")) == (1, "", 1)
        assert "etcdctl role grant-permission ROLE read --prefix /celery/" in denied.err
        assert here(app_with(own.url, username="root", password="correct-horse"), "ls").status == 0
    finally:
        etcdctl(own, "--user", "root:correct-horse", "auth", "disable")


def test_settings_that_cannot_be_meant() -> None:
    """A line for each."""
    said = here(app_with("http://127.0.0.1:1", ttl="30", tl=5), "ls")
    assert (said.status, said.out) == (1, "")
    assert said.err.startswith("Error: ")
    assert "etcd_lock_ttl" in said.err
    assert "etcd_lock_tl is no setting" in said.err
    assert said.err.count("\n") == 2


def test_a_command_that_there_is_not() -> None:
    """As elsewhere in `celery`: what is near."""
    said = here(app_with("http://127.0.0.1:1"), "sesions")
    assert said.status == 2
    assert "sessions" in said.err


@pytest.fixture(scope="module")
def own() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server
