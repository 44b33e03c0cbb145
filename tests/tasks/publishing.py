"""Publishing the tasks of `queued_tasks` from the test's own process, and looking at what came of it."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from celery import Celery

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import KeyValue, Range, Watch, prefix_end
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.tasks.runtime import Runtime
from tests.tasks.queued_tasks import make
from tests.workers import Project

__all__ = ["IMPORTS", "Publisher", "publishing", "race"]

IMPORTS: dict[str, Any] = {"imports": ["queued_tasks"]}
"""The setting of a project whose worker is to run them."""


class Publisher:
    """A client of `project` that has its tasks: as attributes, by name."""

    def __init__(self, project: Project, **settings: Any) -> None:
        self.project = project
        self.app = Celery("publisher", broker=project.broker_url, backend=project.broker_url, set_as_current=False)
        self.app.conf.update(
            {
                "task_default_queue": project.queue,
                "etcd_lock_endpoints": project.etcd_url,
                **{key: value for key, value in project.settings.items() if key.startswith("etcd_lock_")},
                **settings,
            }
        )
        self.tasks = make(self.app)
        self.namespace = Settings.from_app(self.app).namespace
        self._etcd = connect(project.etcd_url)
        self._redis = redis.Redis.from_url(project.broker_url)

    def __getattr__(self, name: str) -> Any:
        return self.tasks[name]

    def messages(self) -> int:
        """How many are in the queue, none having been taken."""
        return int(self._redis.llen(self.project.queue))  # type: ignore[arg-type,unused-ignore]

    def purge(self) -> None:
        """As ``celery purge`` does."""
        self._redis.delete(self.project.queue)

    def marks(self, kind: str = "queued") -> list[KeyValue]:
        """What stands in etcd."""
        prefix = f"/{self.namespace}/{kind}/"
        return list(self._etcd.range(Range(prefix, prefix_end(prefix))).kvs)

    def mark(self, key: str, kind: str = "queued") -> KeyValue | None:
        """The one whose name ends with `key`."""
        return next((kv for kv in self.marks(kind) if kv.key.endswith(key)), None)

    def lasts(self, mark: KeyValue | None) -> int:
        """Seconds that its lease was granted."""
        assert mark is not None
        return self._etcd.lease_time_to_live(mark.lease).granted_ttl

    def history(self, since: int, until: Callable[[list[tuple[str, str, int]]], bool]) -> list[tuple[str, str, int]]:
        """What has happened to the keys of locks and marks after revision `since`: key, kind of event, revision."""
        seen: list[tuple[str, str, int]] = []
        prefix = f"/{self.namespace}/"
        stream = self._etcd.watch(Watch(prefix, prefix_end(prefix), start_revision=since + 1))
        for reply in stream:
            seen += [
                (event.kv.key, event.kind, event.kv.mod_revision)
                for event in reply.events
                if "/sessions/" not in event.kv.key
            ]
            if until(seen):
                break
        stream.close()
        return seen

    def close(self) -> None:
        Runtime.of(self.app).close()
        self._etcd.close()
        self._redis.close()
        self.app.close()
        # As `Project.close` does.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


@contextmanager
def publishing(project: Project, **settings: Any) -> Iterator[Publisher]:
    publisher = Publisher(project, **settings)
    try:
        yield publisher
    finally:
        publisher.close()


def race(broker: str, conf: dict[str, Any], key: str, gate: Any, ids: Any) -> None:
    """Eight threads that publish `key` once all processes have come to `gate`; the ids that they got go into `ids`."""
    app = Celery("racer", broker=broker, backend=broker, set_as_current=False)
    app.conf.update(conf)
    task = make(app)["until_start"]
    task.delay(0, key=key + "-warm")
    gate.wait(60)
    threads = [threading.Thread(target=lambda: ids.put(task.delay(1, key=key).id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids.close()
    ids.join_thread()
