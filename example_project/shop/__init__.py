"""A small Django shop whose tasks run under locks."""

from example_project.shop.celery import app as celery_app

__all__ = ["celery_app"]
