"""Celery tasks that hold a lock while they run.

Comes with every module of ours that knows Celery, and is light: whoever imports one has a worker check the settings
when it starts, and notice the deaths of its children.
"""

from __future__ import annotations

from typing import Any

from celery.signals import worker_init

_STEPS = ("celery_etcd_lock.worker:CheckSettings", "celery_etcd_lock.worker:Locks")
"""By name, as Celery's own: only a worker imports them."""


def _add_steps(sender: Any = None, **_kwargs: Any) -> None:
    sender.app.steps["worker"].update(_STEPS)


# A step raises, not this receiver: signals swallow exceptions.
worker_init.connect(_add_steps, weak=False)
