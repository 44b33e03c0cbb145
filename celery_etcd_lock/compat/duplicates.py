"""What users of the two packages catch, under the names and with the attributes that they know.

Both are `celery_etcd_lock.DuplicateTaskError` too, so that the ``except`` may be changed before the task is.
"""

from __future__ import annotations

from celery_etcd_lock import exceptions

__all__ = ["AlreadyQueued", "DuplicateTaskError"]


class DuplicateTaskError(exceptions.DuplicateTaskError):
    """celery-singleton's: the same task is queued or runs already, as `task_id`. ``args == (message, task_id)``."""

    def __init__(self, message: str = "", task_id: str = "") -> None:
        super().__init__(message, task_id)

    def __str__(self) -> str:
        return str(self.args[0])


class AlreadyQueued(exceptions.DuplicateTaskError):
    """celery-once's: the same task is queued or runs already. ``args == (countdown, task, task_id)``.

    `countdown`: seconds until it does not count any more, if nothing is heard of it until then. It counts again and
    again for as long as it runs.
    """

    def __init__(self, countdown: float = 0.0, task: str = "", task_id: str = "") -> None:
        super().__init__(task, task_id)
        self.args = (countdown, task, task_id)

    @property
    def countdown(self) -> float:
        return float(self.args[0])

    @property
    def task_id(self) -> str:
        return str(self.args[2])

    @property
    def message(self) -> str:
        return str(self)

    def __str__(self) -> str:
        known = f", as {self.task_id}" if self.task_id else ""
        return (
            f"{self.args[1] or 'the task'} is queued already{known}: for {self.countdown:.0f} s more, if nothing is "
            "heard of it until then"
        )
