"""Metrics for Prometheus: receivers of the signals, on a registry of prometheus_client's. Extra ``[prometheus]``.

In the module that makes the app, so that workers (and beat) run it before they start; and whoever serves takes
`registry()`, in whatever way the project serves metrics::

    from celery.signals import worker_ready
    from celery_etcd_lock import metrics
    from prometheus_client import start_http_server

    metrics.connect()

    @worker_ready.connect
    def serve(**kwargs):
        start_http_server(9200, registry=metrics.registry())

Under prefork that is the worker's main process, and prometheus_client's multiprocess mode brings them there from the
children.

`tally` counts without knowing of Prometheus, `families` is what Prometheus sees, `processes` keeps it right where there
are several processes, and `ended` keeps it small. Labels are names of tasks, outcomes and names of beats: never a key,
an argument or an id.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from celery_etcd_lock.exceptions import ConfigError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from celery_etcd_lock.metrics.families import Families

__all__ = ["connect", "registry"]

_connected: Families | None = None


def connect(registry: CollectorRegistry | None = None) -> None:
    """Begin to count: every app of this process, and of the children it forks, in `registry`.

    None: prometheus_client's own ``REGISTRY``. Called again it does nothing. `ConfigError` if prometheus_client is not
    installed, if ``PROMETHEUS_MULTIPROC_DIR`` is no folder, and if it is called again for another registry. A prefork
    worker without multiprocess mode does not start, and says so.
    """
    global _connected  # noqa: PLW0603 once for the process: signals are too
    if importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError(
            "celery_etcd_lock.metrics.connect() needs prometheus_client, which is not installed: "
            "pip install celery-etcd-lock[prometheus]"
        )
    import prometheus_client

    from celery_etcd_lock.metrics import processes
    from celery_etcd_lock.metrics.families import Families

    wanted = prometheus_client.REGISTRY if registry is None else registry
    if _connected is not None:
        if _connected.registry is not wanted:
            raise ConfigError(
                "celery_etcd_lock.metrics.connect() was called before, for another registry: call it once, for the "
                "registry that is served"
            )
        return
    processes.check_folder()
    families = Families(wanted, processes.Readings())
    families.connect()
    processes.connect()
    _connected = families


def registry() -> CollectorRegistry:
    """The registry to serve: in multiprocess mode one of all processes' metrics, else that given to `connect`.

    `ConfigError` before `connect`. In multiprocess mode all that these processes count is in it, the project's own
    metrics too, as in a ``MultiProcessCollector``. Do not serve one of those beside it, from the same folder: children
    that end in good order hand on what they have counted, and it would at times see that twice, or not at all.
    """
    if _connected is None:
        raise ConfigError("celery_etcd_lock.metrics.registry() was called before celery_etcd_lock.metrics.connect()")
    from celery_etcd_lock.metrics import ended, processes

    return ended.registry_of(processes.folder()) if processes.is_multiprocess() else _connected.registry
