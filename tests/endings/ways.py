"""The rows and the columns: every way in which a body can end, and every pool that it can run in."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

__all__ = ["GOES_ON", "LIMIT", "POOLS", "SHORT_TTL", "SOFT", "TTL", "WAYS", "Pool", "Way", "possible"]

TTL = 30
"""Seconds: far more than it may take until a lock is free that anybody gives back."""

SHORT_TTL = 3
"""Seconds, where it is the lease's end that frees the lock."""

LIMIT = 1
"""Seconds: soft and hard time limits."""

SOFT = 1
"""Seconds: ``worker_soft_shutdown_timeout``."""

GOES_ON = 1.5
"""Seconds from the strike until a body is let go that is not going to be ended by Celery."""

ENDS = 20.0
"""The same for one that is: never reached, unless Celery does not end it."""


@dataclass(frozen=True)
class Way:
    """A way to end: by the body itself, unless one of `limit`, `revoke`, `child` and `worker` says what strikes it."""

    name: str
    title: str
    how: str = "return"
    """What the body does when it is let go."""
    late: bool = False
    """Whether the message is acknowledged when the task has run, and not before."""
    limit: Literal["", "soft_time_limit", "time_limit"] = ""
    revoke: str = ""
    """A signal's name."""
    child: bool = False
    """SIGKILL to the process that runs it, where that is not the whole worker."""
    worker: signal.Signals | None = None
    """To the whole worker."""
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    """Of the worker that is struck."""
    answered: bool = True
    """Whether Celery stores an end of it that a caller can wait for."""

    @property
    def strikes(self) -> bool:
        return bool(self.limit or self.revoke or self.child or self.worker)

    @property
    def ttl(self) -> int:
        return int(self.settings.get("etcd_lock_ttl", TTL))


WAYS = (
    Way("success", "success"),
    Way("exception", "exception", how="exception"),
    Way("retry", "`self.retry()`", how="retry"),
    Way("ignore", "`raise Ignore`", how="ignore", answered=False),
    Way("reject", "`raise Reject`", how="reject", answered=False),
    Way("requeue", "`raise Reject(requeue=True)`, `acks_late`", how="requeue", late=True),
    Way("replace", "`self.replace()`", how="replace"),
    Way("soft_limit", f"soft time limit ({LIMIT} s)", limit="soft_time_limit"),
    Way("hard_limit", f"hard time limit ({LIMIT} s)", limit="time_limit"),
    Way("revoke", "`revoke(terminate=True)`", revoke="SIGTERM"),
    Way("revoke_kill", '`revoke(terminate=True, signal="SIGKILL")`', revoke="SIGKILL"),
    Way("child", "SIGKILL, or the OOM killer, of the child", child=True),
    Way(
        "worker", "SIGKILL of the whole worker", worker=signal.SIGKILL, answered=False,
        settings={"etcd_lock_ttl": SHORT_TTL},
    ),
    Way("warm", "warm shutdown (SIGTERM)", worker=signal.SIGTERM),
    Way(
        "soft", f"soft shutdown (SIGQUIT, `worker_soft_shutdown_timeout={SOFT}`)", worker=signal.SIGQUIT,
        answered=False, settings={"worker_soft_shutdown_timeout": SOFT},
    ),
    Way("cold", "cold shutdown (SIGQUIT)", worker=signal.SIGQUIT, answered=False),
)  # fmt: skip


@dataclass(frozen=True)
class Pool:
    name: str
    title: str
    arguments: tuple[str, ...]
    slots: int
    """Bodies at once."""
    children: bool = False
    """Whether a body runs in a process of its own, which the worker outlives."""
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def worker(self, slots: int) -> tuple[str, ...]:
        """The arguments of a worker that runs so many bodies at once."""
        return (*self.arguments, "-c", str(slots)) if self.slots > 1 else self.arguments

    @property
    def patience(self) -> float:
        """Seconds from a strike until the body is let go. What it is makes no difference to when the lock is free."""
        return ENDS if self.children else GOES_ON


POOLS = (
    Pool("prefork", "prefork", ("-P", "prefork"), 4, children=True),
    Pool(
        "spawn", "prefork, spawned", ("-P", "prefork"), 4, children=True,
        settings={"worker_pool_start_method": "spawn"},
    ),
    Pool("threads", "threads", ("-P", "threads"), 16),
    Pool("solo", "solo", ("-P", "solo"), 1),
    Pool("gevent", "gevent", ("-P", "gevent"), 16),
)  # fmt: skip


def possible(pool: Pool, way: Way | None = None) -> bool:
    """Whether the Celery that is here has that: 5.5 brought soft shutdown, 5.7 spawned children."""
    celery = tuple(map(int, version("celery").split(".")[:2]))
    needed = (5, 7) if pool.settings else (5, 5) if way and "worker_soft_shutdown_timeout" in way.settings else (5, 4)
    return celery >= needed
