"""What is checked inside the shop's own process, where Django is set up: ``python -m tests.example.inside NAME``.

Not in that of the tests: with Django's settings in its environment, Celery takes every app there for a Django project.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import django

import example_project.shop  # noqa: F401  says where Django's settings are

django.setup()

from django.core.management import call_command  # noqa: E402  Django comes first
from django.db.models import F  # noqa: E402
from django_celery_beat.models import PeriodicTask  # noqa: E402

from celery_etcd_lock import LockLost  # noqa: E402
from celery_etcd_lock.etcd import connect  # noqa: E402
from celery_etcd_lock.locks import HeldLock, Mutex, Session  # noqa: E402
from celery_etcd_lock.settings import Settings  # noqa: E402
from celery_etcd_lock.signals import ContendedRecord  # noqa: E402
from example_project.shop import receivers, schedule  # noqa: E402
from example_project.shop.celery import app  # noqa: E402
from example_project.shop.models import JobRun, Product  # noqa: E402


@contextmanager
def frozen_and_next() -> Iterator[tuple[HeldLock, HeldLock]]:
    """A holder that does not know that its lease has ended, as one that was frozen, and the next one."""
    transport = connect(Settings.from_app(app).endpoints)
    frozen = Session(transport, ttl=30, background=False)
    held = Mutex(frozen, "/inside/catalog").acquire()
    transport.lease_revoke(frozen.lease)
    with Session(transport, ttl=30) as session, Mutex(session, "/inside/catalog").acquire(timeout=10) as following:
        assert held.is_held(), "it has not heard of it"
        yield held, following
    transport.close()


def cents() -> list[int]:
    return list(Product.objects.order_by("sku").values_list("cents", flat=True))


def refused(lock: HeldLock, **values: object) -> bool:
    """Whether an update of all products under `lock` raises, and changes nothing."""
    before = list(Product.objects.order_by("sku").values())
    try:
        Product.objects.fenced(lock).update(**values)
    except LockLost:
        assert list(Product.objects.order_by("sku").values()) == before
        return True
    return False


def a_frozen_holder_writes_nothing() -> None:
    """From the moment the next holder has claimed the rows, or only one of them."""
    with frozen_and_next() as (frozen, following):
        assert Product.objects.fenced(frozen).update(cents=1) == 3, "nobody has been there since"
        assert Product.objects.filter(sku="B-200").fenced(following).update() == 1, "claims it, and changes no value"
        assert cents() == [1, 1, 1]
        assert refused(frozen, cents=2), "one of three is another's: none is written"
        assert Product.objects.filter(sku="A-100").fenced(frozen).update(cents=3) == 1
        assert Product.objects.fenced(following).update(cents=F("cents") + 10) == 3
        assert refused(frozen, cents=2)
        assert refused(frozen), "nor does it claim anything"
        assert cents() == [13, 11, 11]
        assert Product.objects.update(cents=9) == 3, "control: without the fence nothing refuses it"


def the_fence_stays_on() -> None:
    """Whatever the rows are narrowed down by afterwards, and in `bulk_update`."""
    with frozen_and_next() as (frozen, following):
        assert Product.objects.fenced(following).filter(cents__gt=0).exclude(sku="A-100").update(cents=5) == 2
        late = Product.objects.fenced(frozen).order_by("sku").filter(cents=5).all()
        product = Product.objects.get(sku="B-200")
        product.cents = 6
        for attempt in (lambda: late.update(cents=6), lambda: late.bulk_update([product], ["cents"])):
            try:
                attempt()
            except LockLost:
                continue
            raise AssertionError("it was let in")
        assert Product.objects.filter(cents=6).count() == 0
        assert Product.objects.fenced(following).bulk_update([product], ["cents"]) == 1
        assert Product.objects.fenced(frozen).filter(sku="none").update(cents=6) == 0, "no such row, as ever"


def a_lock_that_is_known_to_be_lost_is_not_tried() -> None:
    """Though nobody has written since."""
    with frozen_and_next() as (_, following):
        following.release()
        assert refused(following, cents=1)


def a_copy_is_no_job_of_its_own() -> None:
    """A message that comes twice after a death runs once: the copy that meets the run leaves the run's row alone."""
    met = ContendedRecord("a", "1", "/shop/locks/a/-", "another", "", "retry", waits=0, waited=0, pause=1)
    JobRun.objects.create(task_id="1", task="a", state=JobRun.State.RUNNING)
    receivers.met_another(record=met)
    assert [run.state for run in JobRun.objects.all()] == ["running"]
    receivers.met_another(record=met._replace(task_id="2"))
    assert JobRun.objects.get(task_id="2").state == "waiting", "control: another message"
    JobRun.objects.update(state=JobRun.State.SENT)
    receivers.met_another(record=met)
    assert JobRun.objects.get(task_id="1").state == "waiting"


def the_schedule_is_made_once() -> None:
    """Setting up again adds nothing, and leaves what somebody has changed."""
    assert PeriodicTask.objects.filter(name__in=[*schedule.EVERY, "nightly reports"]).count() == len(schedule.EVERY) + 1
    assert all(entry.task in app.tasks for entry in PeriodicTask.objects.exclude(name__startswith="celery."))
    PeriodicTask.objects.filter(name="import").update(enabled=False)
    there = PeriodicTask.objects.count()
    call_command("set_up")
    assert PeriodicTask.objects.count() == there
    assert not PeriodicTask.objects.get(name="import").enabled


def the_migrations_are_all_there() -> None:
    """What the models say is what the migrations make."""
    call_command("makemigrations", "--check", "--dry-run", verbosity=0)


CHECKS = {
    check.__name__: check
    for check in (
        a_frozen_holder_writes_nothing,
        the_fence_stays_on,
        a_lock_that_is_known_to_be_lost_is_not_tried,
        a_copy_is_no_job_of_its_own,
        the_schedule_is_made_once,
        the_migrations_are_all_there,
    )
}

if __name__ == "__main__":
    call_command("set_up")
    CHECKS[sys.argv[1]]()
