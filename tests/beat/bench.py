"""Schedulers of beats in the test's own process, ticked by hand: real etcd, real broker, nobody who receives."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from celery import Celery
from redis import Redis

from celery_etcd_lock import SingletonTask, signals
from celery_etcd_lock.beat import EtcdScheduler
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Put, Range, Txn, prefix_end
from tests.workers import close_app, until

__all__ = ["Bench", "Sent"]


_SIGNALS = (signals.leader_elected, signals.leader_lost, signals.tick_sent, signals.tick_fenced)


def _nothing(*args: Any) -> None:
    """Nobody runs it."""


@dataclass(frozen=True)
class Sent:
    """A message in the queue."""

    id: str
    task: str
    entry: str
    due: str
    headers: Mapping[str, Any]
    args: list[Any]


@dataclass
class Bench:
    """An app with a namespace and a queue of its own, and any number of schedulers for it. To be closed."""

    redis_url: str
    etcd_url: str
    schedule: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    name: str = field(default_factory=lambda: f"q{uuid.uuid4().hex}")
    schedulers: list[EtcdScheduler] = field(default_factory=list)
    signalled: list[Any] = field(default_factory=list)
    """Records of beat's signals, in order."""

    def __post_init__(self) -> None:
        self.app = Celery("bench", broker=self.redis_url, set_as_current=False)
        self.app.conf.update(
            {
                "task_default_queue": self.name,
                "task_ignore_result": True,
                "result_expires": None,  # or Celery adds an entry that cleans up
                "broker_connection_max_retries": 1,
                "beat_schedule": self.schedule,
                "etcd_lock_endpoints": self.etcd_url,
                "etcd_lock_namespace": self.name,
                "etcd_lock_beat_ttl": 30,
                **self.settings,
            }
        )
        task: Any = self.app.task
        task(_nothing, name="plain", shared=False)
        task(_nothing, name="single", base=SingletonTask, shared=False)
        for each in _SIGNALS:
            each.connect(self._note, weak=False, dispatch_uid=self.name)

    def _note(self, sender: Celery, record: Any, **_: Any) -> None:
        if sender is self.app:
            self.signalled.append(record)

    def close(self) -> None:
        for scheduler in self.schedulers:
            scheduler.close()
        for each in _SIGNALS:
            each.disconnect(dispatch_uid=self.name)
        close_app(self.app)

    def scheduler(self, **options: Any) -> EtcdScheduler:
        """One more beat."""
        scheduler = EtcdScheduler(app=self.app, **options)
        self.schedulers.append(scheduler)
        return scheduler

    def leading(self, **options: Any) -> EtcdScheduler:
        """One more beat, which leads and has looked at its schedule."""
        scheduler = self.scheduler(**options)
        self.tick(scheduler, lambda: bool(scheduler.schedule))
        return scheduler

    def tick(self, scheduler: EtcdScheduler, condition: Callable[[], Any], *, seconds: float = 30) -> None:
        """Tick as Celery does, sleeping in between for as long as it is asked to, until `condition` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it did not come to pass within {seconds} s"
            time.sleep(min(max(scheduler.tick() or 0.0, 0.0), 0.2))

    def ticked(self, scheduler: EtcdScheduler, count: int = 1, entry: str | None = None) -> list[Sent]:
        """Tick until there are `count` more messages in the queue, of `entry` if given; all that there are."""
        there = len(self.sent(entry))
        self.tick(scheduler, lambda: len(self.sent(entry)) >= there + count)
        return self.sent(entry)

    def sent(self, entry: str | None = None) -> list[Sent]:
        """What is in the queue, the oldest first; of `entry`, if given."""
        with Redis.from_url(self.redis_url) as redis:
            raw: Any = redis.lrange(self.name, 0, -1)
        found = [_parsed(json.loads(each)) for each in reversed(raw)]
        return [each for each in found if entry in {None, each.entry}]

    def record(self, entry: str) -> dict[str, Any]:
        """What etcd has of `entry`; empty: nothing."""
        return self.records().get(entry, {})

    def records(self) -> dict[str, dict[str, Any]]:
        prefix = f"/{self.name}/beat/default/entry/"
        with closing(connect(self.etcd_url)) as transport:
            kvs = transport.range(Range(prefix, prefix_end(prefix))).kvs
        return {kv.key.removeprefix(prefix): json.loads(kv.value) for kv in kvs}

    def write(self, entry: str, **record: Any) -> None:
        """Put a record of `entry`, as somebody else has left it."""
        with closing(connect(self.etcd_url)) as transport:
            put = Put(f"/{self.name}/beat/default/entry/{entry}", json.dumps(record).encode())
            transport.txn(Txn([], [put]))

    def depose(self) -> None:
        """Revoke the lease of the beat that leads, as if it had been frozen for too long."""
        prefix = f"/{self.name}/beat/default/leader/"
        with closing(connect(self.etcd_url)) as transport:
            kvs = transport.range(Range(prefix, prefix_end(prefix), limit=1, sort="create")).kvs
            transport.lease_revoke(kvs[0].lease)

    def signals(self, kind: type) -> list[Any]:
        return [record for record in self.signalled if isinstance(record, kind)]

    def await_signal(self, kind: type, count: int = 1) -> None:
        until(lambda: len(self.signals(kind)) >= count, kind.__name__)


def _parsed(message: dict[str, Any]) -> Sent:
    headers = message["headers"]
    tick = headers.get("etcd_lock_beat") or {}
    body = json.loads(base64.b64decode(message["body"]))
    return Sent(headers["id"], headers["task"], tick.get("entry", ""), tick.get("due", ""), headers, body[0])
