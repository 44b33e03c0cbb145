"""Real servers, a real worker, and ``celery etcd-lock`` as a process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from celery_etcd_lock.testing import EtcdServer
from tests.servers import RedisServer
from tests.workers import Project, project

__all__ = ["Command"]


@pytest.fixture(scope="module")
def working(redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The project of the tests, with a worker that serves all tests of a module. Its TTL is 3 seconds.

    No longer than that: whoever asks all workers of this broker is not to hear of it.
    """
    with project(redis.url, etcd.url, tmp_path_factory.mktemp("working"), etcd_lock_ttl=3) as opened:
        opened.worker("-P", "prefork", "-c", "4")
        yield opened


class Command:
    """``celery -A project etcd-lock …``, running, away from the terminal of the tests."""

    def __init__(self, project: Project, folder: Path, *arguments: str, before: tuple[str, ...] = ()) -> None:
        self.folder = folder
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", "celery", "-A", "project", "etcd-lock", *arguments],
                env=project.environment, cwd=folder, stdout=out, stderr=err, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    @property
    def out(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text()

    def wait(self) -> int:
        return self.process.wait(60)

    def kill(self) -> None:
        """It, and all that it has started, if it runs yet."""
        with suppress(psutil.NoSuchProcess):
            itself = psutil.Process(self.process.pid)
            for process in [*itself.children(recursive=True), itself]:
                process.kill()
        self.wait()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()


@pytest.fixture
def run(working: Project, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts ``celery etcd-lock`` with these arguments; in the project `working`, unless another is given."""
    started: list[Command] = []

    def run_(*arguments: str, project: Project = working, before: tuple[str, ...] = ()) -> Command:
        folder = tmp_path / f"command-{len(started)}"
        folder.mkdir()
        started.append(Command(project, folder, *arguments, before=before))
        return started[-1]

    yield run_
    for command in started:
        command.kill()
