"""What workers and beats in containers run; pytest-celery puts this file into them.

Everything is written down in the backend's Redis, in the order in which it happened: no clocks are compared. A body
that waits is let go on by the test, not by a clock.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import redis
from celery import shared_task
from celery.utils.log import get_task_logger
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_etcd_lock import Conflict, LockLost, singleton_task

RECORD = "record"

log = get_task_logger(__name__)

# Larger tokens win, as every store that a lock protects should have it: 1 if written, 0 if refused.
FENCED_PUT = """
if tonumber(redis.call('HGET', KEYS[1], 'token') or 0) > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'by', ARGV[2])
return 1
"""


def store() -> Any:
    """Gives up after a second, and resolves no name later on: a lost lock can end no body that hangs in there."""
    url = urlsplit(os.environ["CELERY_RESULT_BACKEND"])
    address = socket.gethostbyname(url.hostname or "")
    return redis.Redis(address, url.port or 6379, socket_timeout=1, retry=Retry(NoBackoff(), 0))


def note(store: Any, what: str, **more: Any) -> None:
    store.rpush(RECORD, json.dumps({"what": what, "host": socket.gethostname(), **more}))


def let_go(store: Any, mark: str) -> bool:
    with suppress(redis.RedisError):
        return bool(store.exists(f"go {mark}"))
    return False


def put(store: Any, name: str, token: int, mark: str) -> None:
    written = store.eval(FENCED_PUT, 1, f"row {name}", token, mark)
    note(store, "written" if written else "refused", mark=mark, token=token)


@singleton_task(bind=True, unique_on="name", on_conflict=Conflict.retry(countdown=0.5))
def write(self: Any, name: str, mark: str) -> str:
    """Hold the lock on `name` until the test says "go `mark`", and write; if it is lost, try to write all the same."""
    here, token = store(), self.lock.fencing_token
    log.warning("began %s", mark)
    note(here, "began", mark=mark, token=token)
    try:
        while not let_go(here, mark):
            time.sleep(0.05)
    except LockLost:
        log.warning("gave up %s", mark)
        with suppress(redis.RedisError):
            note(here, "lost", mark=mark, token=token)
            put(here, name, token, mark)
        raise
    put(here, name, token, mark)
    return mark


def count(counter: str) -> None:
    """Count as nobody should: two that do so at once count one."""
    here = store()
    before = int(here.get(counter) or 0)
    time.sleep(0.1)
    here.set(counter, before + 1)
    note(here, "counted", counter=counter)


@singleton_task(lock_key="all", on_conflict=Conflict.retry(backoff=0.2, backoff_max=1))
def count_alone(counter: str) -> None:
    count(counter)


@shared_task
def count_beside(counter: str) -> None:
    count(counter)


@singleton_task(unique_on="name", on_conflict=Conflict.skip(result="skipped"), unique_queued="until_start")
def once(name: str) -> str:
    return "run"


@shared_task(bind=True, ignore_result=True)
def tick(self: Any) -> None:
    """What the beats send; due when, says the header."""
    note(store(), "tick", due=(self.request.headers or {})["etcd_lock_beat"]["due"], id=self.request.id)
