"""For tests, yours and ours: real etcd servers, an in-memory switch, and somebody who holds a task's lock.

Nothing here imports a test framework but `pytest_celery`, which nothing else imports; `celery_etcd_lock.pytest_plugin`
makes fixtures of it.
"""

from celery_etcd_lock.testing.holding import held_elsewhere, memory_locks
from celery_etcd_lock.testing.servers import EtcdCluster, EtcdNotFound, EtcdServer, ServerTLS, find_etcd

__all__ = ["EtcdCluster", "EtcdNotFound", "EtcdServer", "ServerTLS", "find_etcd", "held_elsewhere", "memory_locks"]
