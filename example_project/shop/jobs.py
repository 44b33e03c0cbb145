"""The jobs that the page has a button for, and sending one of them many times."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from example_project.shop import tasks
from example_project.shop.models import Account, JobRun, Order, Product

TIMES = 10
"""How often a press of the button sends the same job."""


@dataclass(frozen=True)
class Job:
    task: Any
    title: str
    tells: str
    """What to expect of ten at once."""
    args: Callable[[], tuple[Any, ...]] = tuple


JOBS = {
    "report": Job(
        tasks.nightly_report,
        "Nightly report",
        "one account, on_conflict=retry: all ten run, one at a time",
        lambda: (Account.objects.order_by("pk").first().pk,),
    ),
    "import": Job(tasks.import_products, "Import", "on_conflict=skip: one runs, who comes meanwhile is skipped"),
    "warm": Job(
        tasks.warm_cache,
        "Warm the cache",
        "lock_mode=shared: side by side, but not beside new prices",
        lambda: (tasks.PAGES[0],),
    ),
    "prices": Job(tasks.change_prices, "Change prices", "the same lock, exclusive: alone, not beside a reader"),
    "partner": Job(tasks.call_partner, "Call the partner", "lock_limit=2: two at a time", lambda: (_an_order(),)),
}


def press(name: str, times: int = TIMES) -> str:
    """Send the same job so often, at once. Returns what all of them are known by in `JobRun.press`."""
    job, pressed = JOBS[name], uuid.uuid4().hex
    args = job.args()
    ids = [str(uuid.uuid4()) for _ in range(times)]
    # Before they are sent: a worker may be quicker than whoever would write them down afterwards.
    JobRun.objects.bulk_create(JobRun(task_id=each, task=job.task.name, press=pressed) for each in ids)
    for each in ids:
        job.task.apply_async(args, task_id=each)
    return pressed


def _an_order() -> int:
    order = Order.objects.order_by("-pk").first()
    if order is None:
        product = Product.objects.order_by("pk")[0]
        order = Order.objects.create(account=Account.objects.order_by("pk")[0], product=product, cents=product.cents)
    return int(order.pk)
