"""The project of the tests with metrics, served by the worker's main process or by beat, as users do it."""

from __future__ import annotations

import os
from typing import Any

from celery.signals import beat_init, worker_ready
from project import define  # type: ignore[import-not-found]  # as the workers find it
from prometheus_client import start_http_server

from celery_etcd_lock import Conflict, metrics

metrics.connect()

put_back = define("put_back", on_conflict=Conflict.retry(countdown=2))
in_slot = define("in_slot", on_conflict=Conflict.wait(timeout=60))
gives_up = define("gives_up", on_conflict=Conflict.wait(timeout=0.5, then="fail"))


@beat_init.connect
@worker_ready.connect
def serve(**_: Any) -> None:
    start_http_server(int(os.environ["METRICS_PORT"]), addr="127.0.0.1", registry=metrics.registry())
