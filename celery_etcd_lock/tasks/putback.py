"""Putting a message back: the same task again, a little later, as if nothing had happened to it.

The same id, arguments, headers, options and `retries`: the author's ``max_retries`` is not used up. (``Task.retry``
would do that, and writes to the task instance, which all threads share.) What we count travels in the message's
header ``etcd_lock``: see `message`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from celery.exceptions import Retry

from celery_etcd_lock.tasks.message import Waits, unix_time, with_waits

if TYPE_CHECKING:
    from celery import Celery, Task
    from celery.app.task import Context

__all__ = ["countdown_ceiling", "expires_within", "put_back"]


def put_back(
    task: Task[Any, Any], request: Context, waits: Waits, reason: Exception, countdown: float, *, again: bool = False
) -> Retry:
    """Send the message of `request` again, to run in `countdown` seconds; returns what the caller has to raise.

    If the broker refuses it that error comes instead, and the task ends as FAILURE with it. `again`: there may be
    copies of the message.
    """
    headers = with_waits(request, waits, again=again)
    signature = task.signature_from_request(
        request,
        countdown=countdown,
        retries=request.retries,
        headers=headers,
        ignore_result=request.ignore_result,  # what was asked for this one message: Celery 5.4 forgets it
    )
    # Celery takes the task that runs for the parent of what has none; but this is no child of itself.
    request.called_directly = True
    try:
        signature.apply_async()
    finally:
        request.called_directly = False
    when: Any = countdown
    return Retry(f"Retry in {countdown:.1f}s: {reason}", exc=reason, when=when, sig=signature)


def expires_within(request: Context, seconds: float) -> bool:
    """Whether the message of `request` will have expired by then."""
    expires = unix_time(request.expires)
    return expires is not None and expires <= time.time() + seconds


def countdown_ceiling(app: Celery) -> float:
    """The longest countdown, in seconds, that the broker of `app` surely does not deliver twice.

    Half its visibility timeout: a message that waits in a worker for longer is given to another worker, too,
    each of which would put it back in turn. RabbitMQ cuts off a consumer after 30 minutes in much the same way.
    """
    options = app.conf.broker_transport_options or {}
    configured = options.get("visibility_timeout")
    if configured:
        return float(configured) / 2
    redis = str(app.conf.broker_url or "").startswith(("redis", "sentinel"))
    return 1800.0 if redis else 900.0
