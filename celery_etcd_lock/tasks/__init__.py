"""Celery tasks that hold a lock while they run."""
