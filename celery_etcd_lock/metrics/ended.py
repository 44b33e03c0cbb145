"""What ended children have counted, in one file of each kind, so that a scrape does not cost more with each of them.

In multiprocess mode prometheus_client keeps the counters of every process that ever was, each in files of its own, and
reads them all at each scrape: with ``max_tasks_per_child`` there are soon thousands. So a child that ends in good order
adds its own to those of all that have ended before. Who reads at that moment must not see them twice, or not at all, so
it takes a lock: this is done only where `registry` serves, whose collector does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Metric, mmap_dict
from prometheus_client.multiprocess import MultiProcessCollector

__all__ = ["add_up", "registry_of"]

_LOCK = "celery_etcd_lock.lock"

_ADD_UP = ("counter", "histogram", "summary")

_File: Any = mmap_dict.MmapedDict  # it has no types


def registry_of(folder: Path) -> CollectorRegistry:
    """What all processes that write to `folder` have counted, those that have ended too."""
    (folder / _LOCK).touch()
    registry = CollectorRegistry()
    registry.register(_Together(None, str(folder)))  # type: ignore[no-untyped-call]
    return registry


class _Together(MultiProcessCollector):
    def collect(self) -> Iterable[Metric]:
        with _locked(Path(self._path), fcntl.LOCK_SH):
            return list(super().collect())  # type: ignore[no-untyped-call]


def add_up(folder: Path, pid: int) -> None:
    """The process `pid` ends: move what it has counted in `folder` to what others have that ended before."""
    with contextlib.suppress(FileNotFoundError), _locked(folder, fcntl.LOCK_EX):
        for kind in _ADD_UP:
            own = folder / f"{kind}_{pid}.db"
            if own.exists():
                total = _File(str(folder / f"{kind}_ended.db"))
                for key, value, *_ in _File.read_all_values_from_file(str(own)):
                    total.write_value(key, total.read_value(key)[0] + value, 0.0)
                total.close()
                own.unlink()


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """`FileNotFoundError`: nobody has asked for `registry_of`."""
    handle = os.open(folder / _LOCK, os.O_RDONLY)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        # Closing it would not do: a child that was forked meanwhile has it open too, and would keep the lock for life.
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
