"""The real servers that tests share, and names of their own in them."""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import _state

from celery_etcd_lock.testing import EtcdNotFound, EtcdServer, find_etcd
from tests.contenders.driver import GoNotFound, build_go
from tests.servers import RedisNotFound, RedisServer, etcd3_environment, skip_or_fail
from tests.workers import collect_garbage

_BUILD_SECONDS = "go_build_seconds"
_LONGEST_BUILD = pytest.StashKey[float]()


def pytest_collection_finish() -> None:
    """What is there by now stays: garbage, which tests have collected some hundred times, is not looked for in it.

    With so little else to look through Python would do so by itself much more often, in the middle of any test: see
    `collect_garbage` for what comes of that.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 1_000_000)


@pytest.fixture(autouse=True)
def own_shared_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared tasks come back on every later app: not those of one test in another's."""
    state: Any = _state
    monkeypatch.setattr(state, "_on_app_finalizers", set(state._on_app_finalizers))


@pytest.fixture(scope="session")
def etcd() -> Iterator[EtcdServer]:
    """One real etcd for the whole run; whoever pauses or stops it uses a server of its own instead."""
    try:
        find_etcd()
    except EtcdNotFound as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    with EtcdServer() as server:
        yield server


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    """One real Redis for the whole run, as broker and result backend; each project has a queue of its own."""
    try:
        server = RedisServer()
    except RedisNotFound as missing:
        skip_or_fail(missing)
    with server:
        yield server
        collect_garbage()


@pytest.fixture(scope="session")
def go_contender(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contender by Go's ``concurrency``, built once for the whole run.

    Under ``CI`` a missing Go fails, unless ``WITHOUT_GO`` says why it could not be had.
    """
    began, folder = time.monotonic(), tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers of the run
    try:
        program = build_go(folder)
    except GoNotFound as missing:
        if reason := os.environ.get("WITHOUT_GO"):
            pytest.skip(f"{missing}: {reason}")
        skip_or_fail(missing)
    seconds = time.monotonic() - began
    getattr(pytestconfig, "workeroutput", {})[_BUILD_SECONDS] = seconds
    pytestconfig.stash[_LONGEST_BUILD] = seconds
    return program


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Under xdist: what a worker measured, for the summary."""
    seconds = getattr(node, "workeroutput", {}).get(_BUILD_SECONDS, 0.0)
    node.config.stash[_LONGEST_BUILD] = max(seconds, node.config.stash.get(_LONGEST_BUILD, 0.0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how long the Go build took: with an empty build cache it is most of what those tests cost."""
    if seconds := config.stash.get(_LONGEST_BUILD, 0.0):
        terminalreporter.write_line(f"building tests/contenders/main.go took {seconds:.1f} s")


@pytest.fixture(scope="session")
def with_etcd3() -> dict[str, str]:
    """The environment of a process that can import the real ``etcd3``."""
    return etcd3_environment()


@pytest.fixture
def prefix() -> str:
    """A part of the shared etcd's keys that is this test's alone."""
    return f"/test/{uuid.uuid4().hex}/"
