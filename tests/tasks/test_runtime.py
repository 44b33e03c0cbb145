"""One session for each process and app, whoever wants it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery import Celery

from celery_etcd_lock import EtcdUnavailable
from celery_etcd_lock.tasks.runtime import Runtime
from celery_etcd_lock.testing import EtcdServer

THREADS = 12


def test_a_pool_waits_for_an_etcd_that_hangs_once() -> None:
    """Who stands in line for the session that could not be opened is told so, and does not try in turn."""
    with EtcdServer() as own:
        app: Any = Celery("hangs", set_as_current=False)
        app.conf.update(etcd_lock_endpoints=own.url, etcd_lock_timeout=1)
        runtime = Runtime.of(app)
        own.pause()

        def fails(_: int) -> bool:
            try:
                runtime.session()
            except EtcdUnavailable:
                return True
            return False

        began = time.monotonic()
        with ThreadPoolExecutor(THREADS) as pool:
            assert all(pool.map(fails, range(THREADS)))
        assert time.monotonic() - began < THREADS / 2, "a second each if they did"
        own.resume()
        assert runtime.session().remaining() > 0
        runtime.close()
        app.close()
