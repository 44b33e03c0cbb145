"""Metrics where there are several processes: what is shown must be of now, and of those that live.

In prometheus_client's multiprocess mode each process writes its values into files of its own, in the folder
``PROMETHEUS_MULTIPROC_DIR``, and whoever serves reads them all. Nobody asks the process at that moment: so what changes
with time is written again every second, by a thread that each process with something to show has.

What a dead process has written stays. For counters and histograms that is right (see `ended`). A gauge of what it held
is taken away: by a child that ends in good order, and for those killed by the worker's main process, which looks every
second.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from celery import bootsteps, signals
from prometheus_client import Gauge, multiprocess, values

from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.metrics.ended import add_up
from celery_etcd_lock.worker import forks

__all__ = ["Readings", "check_folder", "connect", "folder", "is_multiprocess", "remove_dead"]

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

_EVERY = 1.0
"""Seconds."""


def is_multiprocess() -> bool:
    """Whether prometheus_client is in multiprocess mode, which it decided when it was imported."""
    shared: Any = values.ValueClass
    return bool(shared._multiprocess)  # noqa: SLF001 it has no public way to know


def check_folder() -> None:
    """`ConfigError` if the folder of multiprocess mode is none: each value would fail, in a receiver, unseen."""
    if is_multiprocess():
        name = os.environ.get(_FOLDER, "")
        if not (name and Path(name).is_dir() and os.access(name, os.W_OK)):
            raise ConfigError(
                f"{_FOLDER} is {name!r}, which is no folder that can be written to: make it, empty, before the "
                "worker starts"
            )


def folder() -> Path:
    """Where the processes write."""
    return Path(os.environ[_FOLDER])


class Readings:
    """Gauges whose values are asked for: at each scrape, or in multiprocess mode every second."""

    def __init__(self) -> None:
        self._written = is_multiprocess()
        self.clear()

    def clear(self) -> None:
        """Show nothing; so begins a forked child, which has none of its parent's threads."""
        self._all: list[tuple[Gauge, Callable[[], float]]] = []
        self._starting = threading.Lock()
        self._started = False
        self._ended = False

    def add(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Let `gauge` show what `read` returns; ``nan``: nothing new."""
        if not self._written:
            gauge.set_function(read)
            return
        self._all.append((gauge, read))
        _write(gauge, read)
        with self._starting:
            if not self._started:
                self._started = True
                threading.Thread(target=self._keep_writing, name="etcd-lock-metrics", daemon=True).start()

    def end(self) -> None:
        """Write no more, take away what this process has written of what it holds now, and hand on its counts."""
        self._ended = True
        if self._written:
            _mark_dead(os.getpid())
            add_up(folder(), os.getpid())

    def _keep_writing(self) -> None:
        while not self._ended:
            time.sleep(_EVERY)
            for gauge, read in tuple(self._all):
                _write(gauge, read)


def _write(gauge: Gauge, read: Callable[[], float]) -> None:
    value = read()
    if not math.isnan(value):
        gauge.set(value)


def connect() -> None:
    """Have a worker refuse to start where its children's metrics would be lost, and remove what dead ones held."""
    signals.worker_init.connect(_add_step, weak=False)
    signals.worker_ready.connect(_watch, weak=False)


def remove_dead(place: Path) -> None:
    """Remove the gauges of processes that do not exist any more from the folder `place`."""
    for path in place.glob("gauge_live*_*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdecimal() and _is_dead(int(pid)):
            _mark_dead(int(pid))


def _mark_dead(pid: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # somebody else has
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


def _is_dead(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError, AttributeError):  # not a child of ours; macOS before Python 3.13
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


class CheckMetrics(bootsteps.Step):  # type: ignore[misc,unused-ignore]
    """Stops a prefork worker whose metrics nobody could read."""

    label = "etcd-lock-metrics"

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        if not forks(parent) or is_multiprocess():
            return
        late = _FOLDER in os.environ and " (It is set now, but prometheus_client had been imported before.)"
        raise click.ClickException(
            "celery_etcd_lock.metrics is connected, and the tasks of a prefork pool run in child processes, whose "
            f"metrics nobody could read: set {_FOLDER} to an empty folder before the worker starts, or start it "
            f"with -P threads{late or ''}"
        )


def _add_step(sender: Any = None, **_kwargs: Any) -> None:
    sender.app.steps["worker"].add(CheckMetrics)


def _watch(**_kwargs: Any) -> None:
    """The worker's children are there; they, and those that come, are looked at until it ends."""
    if is_multiprocess():
        threading.Thread(target=_keep_watching, args=(folder(),), name="etcd-lock-metrics-dead", daemon=True).start()


def _keep_watching(place: Path) -> None:
    while True:
        remove_dead(place)
        time.sleep(_EVERY)
