"""Commands of ``celery etcd-lock``, run in this process as Celery runs them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner

from celery_etcd_lock.cli import etcd_lock
from celery_etcd_lock.testing import EtcdServer

__all__ = ["Said", "app_with", "compact", "run"]


@dataclass(frozen=True)
class Said:
    status: int
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def app_with(endpoints: str | Sequence[str], **settings: Any) -> Celery:
    """`settings`: without their ``etcd_lock_``."""
    app = Celery("proj", broker="memory://", set_as_current=False)
    app.conf.update({f"etcd_lock_{name}": value for name, value in {"endpoints": endpoints, **settings}.items()})
    return app


def run(app: Celery, *arguments: str, columns: int = 80) -> Said:
    """Status, and all that was said on both outputs. An exception that is no exit is raised."""
    context = CLIContext(app, no_color=True, workdir=".")
    runner = CliRunner(env={"COLUMNS": str(columns)})
    done = runner.invoke(etcd_lock, list(arguments), obj=context, catch_exceptions=False)
    return Said(done.exit_code, done.output)


def compact(server: EtcdServer, upto: int) -> None:
    body = f'{{"revision": {upto}}}'.encode()
    with urllib.request.urlopen(f"{server.url}/v3/kv/compaction", body) as answer:
        assert answer.status == 200
