"""A real Prometheus for tests: finds a prometheus, or installs one, and runs it. And its ``promtool``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tests.servers import Server, fetching, free_port, install, skip_or_fail

__all__ = ["PrometheusNotFound", "PrometheusServer", "do_without", "find_prometheus"]

_CONFIG = """\
global:
  scrape_interval: 200ms
  scrape_timeout: 200ms
scrape_configs:
  - job_name: celery
    static_configs:
      - targets: [{targets}]
"""


class PrometheusNotFound(RuntimeError):
    """There is no such program on this machine, and none could be installed."""


def find_prometheus(program: str = "prometheus", *, fetch: bool = True) -> Path:
    """The `program` to run, ``prometheus`` or ``promtool``: from PATH, else (as root, where there is one) by apt-get.

    `fetch` False: from PATH. `PrometheusNotFound` says what to install.
    """
    found = shutil.which(program)
    if found is None and fetch:
        with fetching():
            found = shutil.which(program)
            if found is None:
                install("prometheus")
                found = shutil.which(program)
    if found is None:
        raise PrometheusNotFound(
            f"no {program} on this machine: install Prometheus (on Debian: apt-get install prometheus)"
        )
    return Path(found)


def do_without(missing: object) -> NoReturn:
    """Skip the test. Under ``CI`` it fails instead, unless ``WITHOUT_PROMETHEUS`` says why there is none."""
    import pytest

    if reason := os.environ.get("WITHOUT_PROMETHEUS"):
        pytest.skip(f"{missing}: {reason}")
    skip_or_fail(missing)


class PrometheusServer(Server):
    """One real prometheus that scrapes `targets`, as ``host:port``, five times a second; a context manager."""

    def __init__(self, targets: Sequence[str]) -> None:
        super().__init__(find_prometheus())
        self._targets = targets

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, timeout: float = 60.0) -> None:
        """Start the server and wait until it answers; `RuntimeError`, with what it said, if it does not."""
        folder = self._own_folder()
        (folder / "prometheus.yml").write_text(_CONFIG.format(targets=", ".join(self._targets)))
        deadline = time.monotonic() + timeout
        while True:
            self.port = free_port()
            self._spawn(folder)
            while self.running and time.monotonic() < deadline:
                with suppress(OSError):
                    urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).close()
                    return
                time.sleep(0.05)
            self.kill()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.binary} did not start; it said:\n{self._log()[-2000:]}")
            time.sleep(0.1)  # the port was taken: another one

    def kill(self) -> None:
        """SIGKILL, and wait for the end. No error if it does not run."""
        if self._process is not None:
            if self.running:
                self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What its HTTP API answers: of each series ``metric``, its labels, and ``value``, a time and a string."""
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=30) as reply:
            result: list[dict[str, Any]] = json.load(reply)["data"]["result"]
        return result

    def _spawn(self, folder: Path) -> None:
        arguments = [
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        with (folder / self.log_name).open("wb") as log:
            self._process = subprocess.Popen(
                [self.binary, *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, start_new_session=True,
            )  # fmt: skip
