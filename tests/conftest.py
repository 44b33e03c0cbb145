"""The real etcd that tests share, and names of their own in it."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_etcd_lock.testing import EtcdNotFound, EtcdServer, find_etcd
from tests.contenders.driver import GoNotFound, build_go
from tests.servers import etcd3_environment, skip_or_fail

_BUILD_SECONDS = pytest.StashKey[float]()


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
def with_etcd3() -> dict[str, str]:
    """The environment of a process that can import the real ``etcd3``."""
    return etcd3_environment()


@pytest.fixture(scope="session")
def go_contender(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contender by Go's ``concurrency``, built once for the whole run.

    Under ``CI`` a missing Go fails, unless ``WITHOUT_GO`` says why it could not be had.
    """
    began = time.monotonic()
    try:
        program = build_go(tmp_path_factory.mktemp("go"))
    except GoNotFound as missing:
        if reason := os.environ.get("WITHOUT_GO"):
            pytest.skip(f"{missing}: {reason}")
        skip_or_fail(missing)
    pytestconfig.stash[_BUILD_SECONDS] = time.monotonic() - began
    return program


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how long the Go build took: with an empty build cache it is most of what those tests cost."""
    if (seconds := config.stash.get(_BUILD_SECONDS, None)) is not None:
        terminalreporter.write_line(f"building tests/contenders/main.go took {seconds:.1f} s")


@pytest.fixture
def prefix() -> str:
    """A part of the shared etcd's keys that is this test's alone."""
    return f"/test/{uuid.uuid4().hex}/"
