"""What this version leaves in etcd: ``python -m tests.golden.record`` writes it down, for a release that changes it.

The file, ``tests/golden/<version>.json``, is by situation: what keys there are in it, byte for byte, and which hang on
which lease. `tests/test_older_keys.py` puts them back, and asks whether the code of the day honours them.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

from celery import signals

from celery_etcd_lock import __version__
from celery_etcd_lock.beat import EtcdScheduler
from celery_etcd_lock.etcd import Transport, connect
from celery_etcd_lock.etcd.api import Delete, Put, Range, Txn, prefix_end
from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.locks.asked import Wish, asked_key
from celery_etcd_lock.tasks.runtime import close_all
from celery_etcd_lock.testing import EtcdServer
from tests.golden.shop import make, run

__all__ = ["COPY", "HERE", "Situations", "recorded"]

HERE = Path(__file__).parent
Situations: TypeAlias = dict[str, list[dict[str, str]]]
Look: TypeAlias = Callable[[], None]
"""Writes down what there is in etcd at this moment."""

_ALL = "/celery/"

COPY: dict[str, Any] = {
    "delivery_info": {"redelivered": True},
    "headers": {"etcd_lock": {"of": "t-charge", "nonce": "0123456789ab", "sent": 1.5}},
}
"""Of a message that was published once and delivered twice."""


def recorded(url: str) -> Situations:
    """What there is in etcd in each situation. The etcd at `url` is to be empty, and is emptied in between."""
    with closing(connect(url)) as transport, patch.object(socket, "gethostname", lambda: "worker-1"):
        return {situation.__name__.strip("_"): _keys(transport, url, situation) for situation in _SITUATIONS}


def _keys(transport: Transport, url: str, situation: Callable[[str, Look], None]) -> list[dict[str, str]]:
    seen: list[dict[str, str]] = []

    def look() -> None:
        kvs = transport.range(Range(_ALL, prefix_end(_ALL), sort="create")).kvs
        seen[:] = [{"key": kv.key, "value": kv.value.decode(), "lease": f"{kv.lease:x}"} for kv in kvs]

    situation(url, look)
    close_all()
    for kv in transport.range(Range(_ALL, prefix_end(_ALL))).kvs:
        if kv.lease:
            transport.lease_revoke(kv.lease)
    transport.txn(Txn([], [Delete(_ALL, prefix_end(_ALL))]))
    return seen


def _exclusive(url: str, look: Look) -> None:
    run(make(url), "shop.sync", "t-sync", 42, work=lambda _: look())


def _shared(url: str, look: Look) -> None:
    run(make(url), "shop.export", "t-export", 7, work=lambda _: look())


def _slots(url: str, look: Look) -> None:
    app = make(url)

    def first(_: Any) -> None:
        run(app, "shop.render", "t-render-2", 2, work=lambda _: look())

    run(app, "shop.render", "t-render-1", 1, work=first)


def _at_least_for(url: str, look: Look) -> None:
    run(make(url), "shop.import", "t-import", 42)
    look()


def _queued(url: str, look: Look) -> None:
    make(url).tasks["shop.invoice"].delay(42)
    look()


def _waiting(url: str, look: Look) -> None:
    app = make(url)
    with closing(Session.open(url)) as session, Mutex(session, "/celery/locks/shop.index/value=42").acquire():
        run(app, "shop.index", "t-index", 42)
        look()


def _put_back(url: str, look: Look) -> None:
    app = make(url)
    with closing(Session.open(url)) as session, Mutex(session, "/celery/locks/shop.charge/value=42").acquire():
        run(app, "shop.charge", "t-charge", 42, **COPY)
        look()


def _ending(url: str, look: Look) -> None:
    def receiver(**_: Any) -> None:
        look()

    signals.task_success.connect(receiver)
    try:
        run(make(url), "shop.charge", "t-charge", 42, **COPY)
    finally:
        signals.task_success.disconnect(receiver)


def _done(url: str, look: Look) -> None:
    run(make(url), "shop.charge", "t-charge", 42, **COPY)
    look()


def _asked(url: str, look: Look) -> None:
    with closing(Session.open(url)) as session, Mutex(session, "/celery/locks/maintenance").acquire() as held:
        wish = Wish("ops@worker-1", "2026-11-26T10:00:00+00:00", held.fencing_token)
        session.txn(Txn([], [Put(asked_key("celery", held.key), wish.encoded(), session.lease)]))
        look()


def _beat(url: str, look: Look, until: str = "sent") -> None:
    app = make(url)
    published: list[str] = []

    def receiver(headers: Any, **_: Any) -> None:
        published.append(headers["id"])
        if until == "sending":
            look()

    signals.before_task_publish.connect(receiver)
    scheduler = EtcdScheduler(app=app)
    try:
        while not published:
            time.sleep(min(max(scheduler.tick(), 0.0), 0.2))
        if until == "sent":
            look()
    finally:
        signals.before_task_publish.disconnect(receiver)
        scheduler.close()


def _beat_in_the_middle(url: str, look: Look) -> None:
    _beat(url, look, until="sending")


_SITUATIONS = (
    _exclusive,
    _shared,
    _slots,
    _at_least_for,
    _queued,
    _waiting,
    _put_back,
    _ending,
    _done,
    _asked,
    _beat,
    _beat_in_the_middle,
)


if __name__ == "__main__":
    with EtcdServer() as server:
        found = recorded(server.url)
    (HERE / f"{__version__}.json").write_text(json.dumps(found, indent=1) + "\n")
