"""The schedule that the shop begins with. It is in the database, and there it may be changed."""

from __future__ import annotations

import json
from typing import Any

from django_celery_beat.models import CrontabSchedule, IntervalSchedule, PeriodicTask

from example_project.shop import tasks

EVERY: dict[str, tuple[int, Any, list[str]]] = {
    "an order": (5, tasks.place_order, []),
    "import": (20, tasks.import_products, []),
    "new prices": (60, tasks.change_prices, []),
    **{f"cache: {page}": (15, tasks.warm_cache, [page]) for page in tasks.PAGES},
}
"""What is sent all the time: seconds, task, arguments."""


def make() -> int:
    """Make the entries that are not there; what somebody has changed stays. Returns how many were made."""
    made = 0
    for name, (seconds, task, args) in EVERY.items():
        interval, _ = IntervalSchedule.objects.get_or_create(every=seconds, period=IntervalSchedule.SECONDS)
        values = {"task": task.name, "interval": interval, "args": json.dumps(args)}
        made += PeriodicTask.objects.get_or_create(name=name, defaults=values)[1]
    night, _ = CrontabSchedule.objects.get_or_create(minute="0", hour="3")
    values = {"task": tasks.nightly_reports.name, "crontab": night}
    made += PeriodicTask.objects.get_or_create(name="nightly reports", defaults=values)[1]
    return int(made)
