"""What the error of a publish says: that the message is wrong, or that the broker is out of reach."""

from __future__ import annotations

from typing import Final

from celery.beat import SchedulingError
from kombu import Connection
from kombu.exceptions import EncodeError, OperationalError

from celery_etcd_lock.exceptions import ConfigError, DuplicateTaskError

__all__ = ["is_broker", "is_permanent"]

_PERMANENT: Final = (ConfigError, DuplicateTaskError, EncodeError, LookupError, TypeError, ValueError)
"""What is wrong with the message itself, or with sending it at all: the next try would fail as well."""


def is_permanent(error: BaseException) -> bool:
    """Whether it is the message that is wrong, not the broker."""
    return isinstance(_cause(error), _PERMANENT)


def is_broker(error: BaseException, connection: Connection) -> bool:
    """Whether it is that `connection` does not reach the broker; a broker that refuses a message is reached."""
    return isinstance(_cause(error), (OperationalError, *connection.connection_errors))


def _cause(error: BaseException | None) -> BaseException | None:
    """What Celery has wrapped in a `SchedulingError`."""
    while isinstance(error, SchedulingError):
        error = error.__cause__ or error.__context__
    return error
