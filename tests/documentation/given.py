"""What the pages take for granted: the project that a reader has already, and names of it.

Each page runs in a folder of its own with a package ``proj`` in it, the reader's project. Its names, and those of
`GIVEN`, are there for the page's Python. `AFTERWARDS` is what must be true when the page is through.
"""

from __future__ import annotations

__all__ = ["AFTERWARDS", "BEFORE_TESTS", "ENVIRONMENT", "FILES", "GIVEN", "PROJECT"]

PROJECT = """
import os

from celery import Celery
from celery_etcd_lock import singleton_task

app = Celery("proj", broker="redis://localhost:6379/0", backend="redis://localhost:6379/0")
app.set_current()
app.conf.etcd_lock_endpoints = "http://127.0.0.1:2379"
app.conf.beat_schedule = {"nightly": {"task": "shop.sync", "schedule": 3600, "args": (1,)}}


@singleton_task(app=app, name="shop.sync", unique_on="account_id", on_conflict="skip")
def sync(account_id, full=False):
    return account_id
"""

BEFORE_TESTS = """
from proj import app, sync

app.conf.update(task_always_eager=True, etcd_lock_eager=True)
"""
"""At the top of a file of tests, as the page says in words."""

FILES = {
    "migrate.sh": "#!/bin/sh\nexit 0\n",
}

ENVIRONMENT = {
    "ETCD_LOCK_PASSWORD": "battery-staple",
    "LOCK_PASSWORD": "battery-staple",
    "ROOT_PASSWORD": "correct-horse",
}

GIVEN = {
    "README.md": """
stored = []
fetch = lambda account_id: ["first", "second"]
store = lambda page, fence: stored.append((page, fence))
""",
    "docs/beat.md": "write_report = print",
    "docs/fencing.md": "etcd_url, redis_url, db_path = 'http://127.0.0.1:2379', 'redis://localhost:6379/0', 'bank.db'",
    "docs/security.md": "import os",
}

AFTERWARDS = {
    "README.md": """
assert again.id == first.id, "unique_queued"
assert sync.lock_name((42,)).endswith(".sync/account_id=42"), sync.lock_name((42,))
""",
    "docs/settings.md": """
assert app.conf.task_annotations["shop.sync"]["on_conflict"] == "skip"
""",
}
