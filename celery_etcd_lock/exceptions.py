"""Every error this package raises, one tree under `EtcdLockError`.

All of them survive pickle, and those that can end a task survive a JSON result too: Celery stores
``type(exc).__module__``, ``__name__`` and ``args``, and calls ``cls(*args)`` on the other side. So what
an error knows is in its ``args``, and its message is made from them. A class's docstring is its message
when it is raised without arguments. Imports nothing.
"""

from __future__ import annotations

__all__ = [
    "AuthRejected",
    "Compacted",
    "ConfigError",
    "DuplicateTaskError",
    "EtcdLockError",
    "EtcdRejected",
    "EtcdUnavailable",
    "LeaseNotFound",
    "LockContended",
    "LockLost",
    "LockTimeout",
    "NoSpace",
    "PermissionDenied",
    "UnstableKeyError",
]


class EtcdLockError(Exception):
    """Something went wrong with a lock."""

    def __str__(self) -> str:
        if self.args:
            return ", ".join(map(str, self.args))
        return (type(self).__doc__ or "").partition("\n")[0]


class ConfigError(EtcdLockError):
    """A setting or an option cannot be used as it stands."""


class UnstableKeyError(ConfigError):
    """An argument has no stable form from which a lock's key could be made."""


class LockContended(EtcdLockError):
    """Somebody else holds the lock.

    ``args == (key, holder, since)``, all strings: the lock's name in etcd, who holds it as far as the
    holder said (``""`` if it did not), and since when it has been in line (ISO 8601, UTC; ``""`` if unknown).
    """

    task_id = ""
    """The holder's Celery task id, where it said one. Stays in this process: not in `args`."""

    def __init__(self, key: str = "", holder: str = "", since: str = "") -> None:
        super().__init__(key, holder, since)

    @property
    def key(self) -> str:
        return str(self.args[0])

    @property
    def holder(self) -> str:
        return str(self.args[1])

    @property
    def since(self) -> str:
        return str(self.args[2])

    _verb = "is held"

    def __str__(self) -> str:
        by = f" by {self.holder}" if self.holder else " by somebody else"
        since = f" since {self.since}" if self.since else ""
        return f"{self.key or 'the lock'} {self._verb}{by}{since}"


class LockTimeout(LockContended):
    """The lock was waited for, and did not come free in time."""

    _verb = "did not come free in time: it is held"


class LockLost(EtcdLockError):
    """The lock is no longer certain to be ours."""


class EtcdUnavailable(EtcdLockError):
    """No etcd member answered in time.

    `unanswered` is True when the request may have reached a member, and so may still be carried out,
    even minutes from now; False when it surely was not.
    """

    def __init__(self, message: str = "no etcd member answered in time", unanswered: bool = False) -> None:
        super().__init__(message, unanswered)

    @property
    def unanswered(self) -> bool:
        return bool(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])


class NoSpace(EtcdUnavailable):
    """etcd's database has reached its quota: it refuses writes until it is compacted, defragmented and disarmed."""


class EtcdRejected(EtcdLockError):
    """etcd answered, and the answer is no. ``args == (message, code)``, `code` being gRPC's."""

    def __init__(self, message: str = "etcd refused the request", code: int = 2) -> None:
        super().__init__(message, code)

    @property
    def code(self) -> int:
        return int(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])


class AuthRejected(EtcdRejected):
    """etcd does not accept the user, the password or the certificate, or the user may not do this."""


class PermissionDenied(AuthRejected):
    """etcd knows the user, and no role of that user allows this."""


class LeaseNotFound(EtcdRejected):
    """The lease has expired or was revoked."""


class Compacted(EtcdRejected):
    """The revision asked for has been compacted away."""


class DuplicateTaskError(EtcdLockError):
    """The same task is queued already: `task_id` is the id it has there. ``args == (task, task_id)``."""

    def __init__(self, task: str = "", task_id: str = "") -> None:
        super().__init__(task, task_id)

    @property
    def task_id(self) -> str:
        return str(self.args[1])

    def __str__(self) -> str:
        return f"{self.args[0]} is queued already, as {self.task_id}"
