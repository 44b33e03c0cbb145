"""`beating`, with its schedule in a database: django-celery-beat on SQLite, in the file that ``DATABASE`` names."""

from __future__ import annotations

import os

import django
from django.conf import settings

settings.configure(
    DATABASES={
        "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["DATABASE"], "OPTIONS": {"timeout": 20}}
    },
    INSTALLED_APPS=["django_celery_beat"],
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    USE_TZ=True,
    TIME_ZONE="Europe/Berlin",
)
django.setup()

from tests.beat.beating import app  # noqa: E402 Django comes first

app.conf.update(
    beat_schedule={}, result_expires=None, beat_max_loop_interval=1,
    beat_scheduler="django_celery_beat.schedulers:DatabaseScheduler",
)  # fmt: skip
