"""The shop's tasks, and for each the lock that it needs."""

from __future__ import annotations

import random
import time
import uuid
from functools import partial

from celery import group, shared_task
from django.conf import settings
from django.core.cache import cache
from django.db import transaction
from django.db.models import Count, F, Max, Sum
from django.utils import timezone

from celery_etcd_lock import Conflict, SingletonTask, singleton_task
from example_project.shop.models import Account, JobRun, Order, Product, Report, Stock, Tick
from example_project.shop.receivers import written_down

PAGES = ("books", "games", "garden")
KEPT = 1000
"""Rows of what was: orders, and what became of messages."""


def work() -> None:
    """What a real shop would do for longer."""
    time.sleep(settings.SHOP_JOB_SECONDS)


@shared_task(name="shop.nightly_reports")
def nightly_reports() -> int:
    """Beat sends this one; it sends a report for each account, side by side."""
    reports = [nightly_report.s(pk) for pk in Account.objects.values_list("pk", flat=True)]
    group(reports).apply_async()
    return len(reports)


@singleton_task(
    name="shop.nightly_report",
    bind=True,
    unique_on="account_id",
    on_conflict=Conflict.retry(backoff=0.3, backoff_max=2),
)
def nightly_report(self: SingletonTask, account_id: int) -> int:
    """One report at a time for each account, and every one that is asked for is made: who comes meanwhile comes again.

    Its row is claimed before anything is read for it, so that what a frozen run worked out long ago is refused.
    """
    with written_down(self):
        report, _ = Report.objects.get_or_create(account_id=account_id, day=timezone.localdate())
        mine = Report.objects.filter(pk=report.pk).fenced(self.lock)
        mine.update()
        found = Order.objects.filter(account_id=account_id).aggregate(orders=Count("pk"), cents=Sum("cents"))
        work()
        mine.update(orders=found["orders"], cents=found["cents"] or 0, written=F("written") + 1)
        return int(found["orders"])


@singleton_task(name="shop.import_products", bind=True, lock_key="all", on_conflict="skip")
def import_products(self: SingletonTask) -> int:
    """The supplier's list. Two at once would mix their stocks; and one that comes meanwhile has nothing to add."""
    with written_down(self):
        work()
        return int(Stock.objects.fenced(self.lock).update(pieces=F("pieces") + 5))


@singleton_task(
    name="shop.warm_cache",
    bind=True,
    lock_key="/catalog",
    lock_mode="shared",
    on_conflict=Conflict.wait(timeout=5, then="retry"),
)
def warm_cache(self: SingletonTask, page: str) -> int:
    """Reads the catalog and keeps a page of it. Any number of these run beside each other, none beside the writer."""
    with written_down(self):
        rows = list(Product.objects.values_list("sku", "name", "cents"))
        work()
        cache.set(f"catalog:{page}", rows, 3600)
        return len(rows)


@singleton_task(
    name="shop.change_prices",
    bind=True,
    lock_key="/catalog",
    on_conflict=Conflict.wait(timeout=5, then="retry"),
)
def change_prices(self: SingletonTask, percent: int = 1) -> int:
    """Writes the catalog, alone: no page is made of old prices and new ones."""
    with written_down(self):
        changed = Product.objects.fenced(self.lock).update(cents=F("cents") * (100 + percent) / 100)
        work()
        cache.delete_many([f"catalog:{page}" for page in PAGES])
        return int(changed)


@singleton_task(
    name="shop.call_partner",
    bind=True,
    lock_key="all",
    lock_limit=2,
    on_conflict=Conflict.wait(timeout=5, then="retry"),
)
def call_partner(self: SingletonTask, order_id: int) -> bool:
    """Sends an order to a partner, who takes two calls at once and no more, however many workers there are."""
    with written_down(self):
        work()
        order = Order.objects.filter(pk=order_id, state=Order.State.NEW)
        return bool(order.update(state=Order.State.SENT, reference=uuid.uuid4().hex))


@shared_task(name="shop.place_order")
def place_order() -> int:
    """A customer's order, which beat sends here so that there is something to see; and the partner hears of it."""
    account = random.choice(Account.objects.all())
    product = random.choice(Product.objects.all())
    with transaction.atomic():
        order = Order.objects.create(account=account, product=product, quantity=1, cents=product.cents)
        transaction.on_commit(partial(call_partner.delay, order.pk))
    for model in (Order, JobRun, Tick):
        newest = model.objects.aggregate(newest=Max("pk"))["newest"] or 0
        model.objects.filter(pk__lte=newest - KEPT).delete()
    return int(order.pk)
