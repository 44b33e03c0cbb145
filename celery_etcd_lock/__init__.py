"""Locks for Celery tasks, in etcd."""

__version__ = "0.1.0"
