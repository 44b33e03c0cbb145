"""Projects that use celery-etcd-lock."""
