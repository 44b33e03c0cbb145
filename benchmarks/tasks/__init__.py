"""Celery tasks beside each other: a plain one, this package's, and those of celery-once, -singleton and -heimdall."""
