"""Django's settings, and with them Celery's and those of the locks. What differs between machines is read from the
environment: where Redis, etcd and the database are, and who may ask for the page.
"""

from __future__ import annotations

import os
from pathlib import Path

from django.core.management.utils import get_random_secret_key

ROOT = Path(__file__).resolve().parent.parent.parent

# One process serves the page, and nobody logs in: a key of its own for each start is enough.
SECRET_KEY = os.environ.get("SHOP_SECRET_KEY") or get_random_secret_key()
DEBUG = False
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]", *filter(None, os.environ.get("SHOP_HOSTS", "").split(","))]
ROOT_URLCONF = "example_project.shop.urls"
INSTALLED_APPS = ["django_celery_beat", "example_project.shop.apps.ShopConfig"]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
USE_TZ = True
TIME_ZONE = "UTC"

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("SHOP_DATABASE", str(ROOT / ".example" / "db.sqlite3")),
        "OPTIONS": {
            # Workers, beats and the page write at once. In this mode readers do not wait for writers; and a transaction
            # takes SQLite's own lock when it begins, where waiting for it works, and not in its middle, where it fails.
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
        },
    }
}

REDIS = os.environ.get("SHOP_REDIS", "redis://127.0.0.1:6379")
CACHES = {"default": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": f"{REDIS}/2"}}

CELERY_BROKER_URL = f"{REDIS}/0"
CELERY_RESULT_BACKEND = f"{REDIS}/1"
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TIMEZONE = TIME_ZONE
CELERY_TASK_IGNORE_RESULT = False
CELERY_RESULT_EXPIRES = 3600
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
# A message is acknowledged when its task has ended: that of a worker which is killed comes again. Redis gives it back
# after the visibility timeout, which is short here so that you need not wait an hour to see it. A task that takes
# longer is delivered twice; it runs once all the same, for its lock knows the message.
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "visibility_timeout": 30,
    # A worker looks for such messages every 5 seconds, and not every 100. (kombu before 5.7 does not know these.)
    "unacked_restore_interval": 5,
    "unacked_restore_throttle": 1,
    # One looks at a time; and of one that died while it looked, the others would wait for 300 seconds.
    "unacked_mutex_expire": 10,
}

# The schedule is in the database. Beats are started with `-S etcd_lock`, which wraps this scheduler.
CELERY_BEAT_SCHEDULER = "django_celery_beat.schedulers:DatabaseScheduler"
CELERY_BEAT_MAX_LOOP_INTERVAL = 5

# Where etcd is comes from the environment: CELERY_ETCD_LOCK_ENDPOINTS.
CELERY_ETCD_LOCK_NAMESPACE = os.environ.get("SHOP_NAMESPACE", "shop")
# Seconds for which a worker that was killed keeps its locks, and after which a beat that was killed is followed:
# shorter than the defaults, for who watches.
CELERY_ETCD_LOCK_TTL = 10
CELERY_ETCD_LOCK_TIMEOUT = 3
CELERY_ETCD_LOCK_BEAT_TTL = 9

# Seconds that each job takes here, where it has no real work.
SHOP_JOB_SECONDS = float(os.environ.get("SHOP_JOB_SECONDS", "1"))

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    # The page asks once a second: not a line for each.
    "loggers": {"django.server": {"level": "WARNING"}},
}
