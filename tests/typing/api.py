"""Never run: type checkers read it, as a user's code. `make check` fails when what it says is not so.

It holds with celery-types and without, for mypy and pyright at their strictest: `make types` asks all four. Each
``type: ignore`` is a mistake that they must find. What needs celery-types is in `with_celery_types.py`.
"""

from __future__ import annotations

from celery import Celery
from typing_extensions import assert_type

import celery_etcd_lock
from celery_etcd_lock import Conflict, SingletonTask, current_lock, singleton_task
from celery_etcd_lock.compat import QueueOnce, clear_locks
from celery_etcd_lock.locks import Election, HeldLock, Leader, Leadership, Mutex, RWLock, Semaphore, Session

app = Celery()


@singleton_task
def bare(account_id: int, full: bool = False) -> str:
    return str(account_id)


@singleton_task(unique_on="account_id", on_conflict="skip", acks_late=True, app=app)
def called(account_id: int) -> int:
    return account_id


@singleton_task(bind=True, on_conflict=Conflict.retry(backoff=1, backoff_max=10))
def bound(self: SingletonTask, day: str) -> float:
    self.lock.assert_held()
    return self.lock.remaining()


assert_type(bare(1), str)
bare.delay(1, full=True)
bare.delay("1")  # type: ignore[arg-type]
bare.delay()  # type: ignore[call-arg]
bare.s(1, full=True)
bare.s(ful=True)  # type: ignore[call-arg]
assert_type(called(1), int)
called.apply_async((1,), countdown=3)
called.apply_async((1,), {}, "id", None, None, called.si(2), "shadow", on_conflict=Conflict.skip(), lock_at_least_for=3)
called.apply_async([1], on_conflict={"name": "skip"}, on_lost="warn", on_unavailable="run", on_duplicate="raise")
assert_type(bound("2026-01-01"), float)
bound.delay(day="2026-01-01")
bound.delay(1)  # type: ignore[arg-type]


@singleton_task(unique_one="account_id")  # type: ignore[call-overload,untyped-decorator]
def misspelt(account_id: int) -> int:
    return account_id


@singleton_task(unique_queued="until_start", on_duplicate="raise", on_conflict="coalesce")
def queued_once(account_id: int) -> int:
    return account_id


@singleton_task(unique_queued="until_begin")  # type: ignore[call-overload,untyped-decorator]
def queued_till_when(account_id: int) -> int:
    return account_id


@singleton_task(lock_mode="shared", lock_key="/catalog")
def reads(account_id: int) -> int:
    return account_id


@singleton_task(lock_limit=3)
def limited(account_id: int) -> int:
    return account_id


@singleton_task(lock_at_least_for=2, lock_at_most_for=0.5, on_conflict="wait")
def timed(account_id: int) -> int:
    return account_id


@singleton_task(lock_at_most_for="1 h")  # type: ignore[call-overload,untyped-decorator]
def mistimed(account_id: int) -> int:
    return account_id


@singleton_task(lock_mode="shred")  # type: ignore[call-overload,untyped-decorator]
def misread(account_id: int) -> int:
    return account_id


@singleton_task(on_lost="abourt")  # type: ignore[call-overload,untyped-decorator]
def wrong(account_id: int) -> int:
    return account_id


clear_locks(app)


class OfAClass(QueueOnce):
    once = {"graceful": True}  # noqa: RUF012 as their documentation has it


def by_itself(session: Session) -> int:
    with Mutex(session, "/maintenance").acquire(timeout=5) as held:
        assert_type(held, HeldLock)
        return held.fencing_token


def the_others(session: Session) -> None:
    with RWLock(session, "/catalog").read().acquire(timeout=5) as reading, RWLock(session, "/b").write() as writing:
        assert_type((reading, writing), tuple[HeldLock, HeldLock])
    with Semaphore(session, "/gpu", limit=4).acquire(blocking=False) as held:
        assert_type(held, HeldLock)
    with Election(session, "/scheduler").campaign("host-1", timeout=5) as leadership:
        assert_type(leadership, Leadership)
        leadership.proclaim("host-1, ready")
    with Election(session, "/scheduler").observe() as leaders:
        for leader in leaders:
            assert_type(leader, Leader)
    Semaphore(session, "/gpu")  # type: ignore[call-arg]


str(celery_etcd_lock.singelton_task)  # type: ignore[attr-defined]
token: int = current_lock.fencing_token
