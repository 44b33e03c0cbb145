"""The locks: etcd's own concurrency recipes. Knows nothing of Celery."""
