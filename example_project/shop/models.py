"""What the shop keeps: accounts, products, orders and reports; and, for the page, what became of each message."""

from __future__ import annotations

from django.db import models

from example_project.shop.fenced import Fenced


class Account(models.Model):
    name = models.CharField(max_length=80, unique=True)

    def __str__(self) -> str:
        return str(self.name)


class Product(Fenced):
    """A row of the catalog, whose prices are written under the lock ``/catalog``.

    A fenced row belongs to one lock: tokens of two locks say nothing of each other, and one that is held would be
    refused. So what the import writes, under another lock, is in a model of its own.
    """

    sku = models.CharField(max_length=20, unique=True)
    name = models.CharField(max_length=80)
    cents = models.PositiveIntegerField()

    def __str__(self) -> str:
        return str(self.sku)


class Stock(Fenced):
    """Written by the import, under its lock."""

    product = models.OneToOneField(Product, models.CASCADE)
    pieces = models.PositiveIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.pieces} of {self.product}"


class Order(models.Model):
    class State(models.TextChoices):
        NEW = "new"
        SENT = "sent"

    account = models.ForeignKey(Account, models.CASCADE, related_name="orders")
    product = models.ForeignKey(Product, models.CASCADE)
    quantity = models.PositiveSmallIntegerField(default=1)
    cents = models.PositiveIntegerField()
    state = models.CharField(max_length=8, choices=State.choices, default=State.NEW)
    reference = models.CharField(max_length=40, blank=True)
    created = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"order {self.pk}"


class Report(Fenced):
    """An account's day, written under the lock of that account."""

    account = models.ForeignKey(Account, models.CASCADE, related_name="reports")
    day = models.DateField()
    orders = models.PositiveIntegerField(default=0)
    cents = models.PositiveBigIntegerField(default=0)
    written = models.PositiveIntegerField(default=0)

    class Meta:
        constraints = (models.UniqueConstraint(fields=["account", "day"], name="one_report_a_day"),)

    def __str__(self) -> str:
        return f"{self.account} {self.day}"


class JobRun(models.Model):
    """One message of a task and what became of it; a message that is run again after a death has another row.

    `started` and `ended` are written by the task's body, that is while it holds its lock.
    """

    class State(models.TextChoices):
        SENT = "sent"
        WAITING = "waiting"
        RUNNING = "running"
        DONE = "done"
        SKIPPED = "skipped"
        FAILED = "failed"
        CUT_SHORT = "cut short"

    task_id = models.CharField(max_length=80, db_index=True)
    task = models.CharField(max_length=80)
    lock = models.CharField(max_length=200, blank=True, db_index=True)
    press = models.CharField(max_length=40, blank=True, db_index=True)
    state = models.CharField(max_length=10, choices=State.choices, default=State.SENT)
    sent = models.DateTimeField(auto_now_add=True)
    started = models.DateTimeField(null=True)
    ended = models.DateTimeField(null=True)
    worker = models.CharField(max_length=80, blank=True)
    pid = models.PositiveIntegerField(null=True)
    token = models.BigIntegerField(null=True)
    waits = models.PositiveIntegerField(default=0)
    because = models.CharField(max_length=200, blank=True)

    class Meta:
        ordering = ("-pk",)

    def __str__(self) -> str:
        return f"{self.task} {self.state}"


class Tick(models.Model):
    """A message that a beat has sent, as a worker got it."""

    entry = models.CharField(max_length=200)
    due = models.DateTimeField()
    task_id = models.CharField(max_length=80)
    received = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-pk",)
        constraints = (models.UniqueConstraint(fields=["entry", "due", "task_id"], name="a_message_once"),)

    def __str__(self) -> str:
        return f"{self.entry} {self.due}"
