"""etcd for pytest-celery: a container of it, and workers that know where it is.

For suites that run workers in containers with `pytest-celery <https://pytest-celery.readthedocs.io>`_; it needs the
extra ``celery-etcd-lock[pytest-celery]``, and Docker. In the topmost ``conftest.py``::

    pytest_plugins = ["celery_etcd_lock.testing.pytest_celery"]

or, in any other, ``from celery_etcd_lock.testing.pytest_celery import *``. The names are pytest-celery's way of naming,
and each fixture can be overridden as there. A container of etcd, of each test:

``default_etcd``            the container, an `EtcdContainer`. Made from ``default_etcd_cls``, ``default_etcd_image``,
                            ``default_etcd_command``, ``default_etcd_env``, ``default_etcd_ports``
``celery_etcd``             the node, an `EtcdTestNode`: ``celery_etcd.container.client`` speaks to it from the test
``celery_etcd_cluster``     the cluster, a `CeleryEtcdCluster`; None, by overriding it, is no etcd. While it is there
                            ``CELERY_ETCD_LOCK_ENDPOINTS`` in the test's own environment names it too, so that what the
                            test itself does (`held_elsewhere`, publishing with ``unique_queued``) goes to the same etcd
``celery_etcd_cluster_config``  its ``urls`` (from other containers) and ``host_urls`` (from the test)

And pytest-celery's own, overridden:

``celery_worker_cluster_config``  with etcd's beside the broker's and the backend's
``default_worker_container_cls``, ``default_worker_container_session_cls``  `EtcdLockWorkerContainer`
``default_worker_container``      of that class, so that its environment names etcd

The image of the worker stays yours to give (``celery_base_worker_image``): it must have celery-etcd-lock in it.
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from typing import Any

import pytest
from pytest_celery import (
    DEFAULT_WORKER_CONTAINER_TIMEOUT,
    DEFAULT_WORKER_VOLUME,
    CeleryTestCluster,
    CeleryTestContainer,
    CeleryTestNode,
    CeleryWorkerContainer,
)
from pytest_docker_tools import container, fxtr

from celery_etcd_lock.etcd import Transport, connect
from celery_etcd_lock.settings import ENDPOINTS_VARIABLE
from celery_etcd_lock.tasks.runtime import close_all

__all__ = [
    "ETCD_CONTAINER_TIMEOUT",
    "ETCD_ENV",
    "ETCD_IMAGE",
    "ETCD_PORTS",
    "ETCD_PREFIX",
    "CeleryEtcdCluster",
    "EtcdContainer",
    "EtcdLockWorkerContainer",
    "EtcdTestNode",
    "celery_etcd",
    "celery_etcd_cluster",
    "celery_etcd_cluster_config",
    "celery_worker_cluster_config",
    "default_etcd",
    "default_etcd_cls",
    "default_etcd_command",
    "default_etcd_env",
    "default_etcd_image",
    "default_etcd_ports",
    "default_worker_container",
    "default_worker_container_cls",
    "default_worker_container_session_cls",
]

ETCD_IMAGE = "quay.io/coreos/etcd:v3.5.16"
ETCD_PORTS: dict[str, int | None] = {"2379/tcp": None}  # None: whichever port of the host is free
ETCD_ENV: dict[str, str] = {}
ETCD_CONTAINER_TIMEOUT = 60
"""Seconds."""
ETCD_PREFIX = "http://"

_PORT = "2379/tcp"


class EtcdContainer(CeleryTestContainer):
    """A container that runs one etcd of its own. Override its class methods for another image or other options."""

    @property
    def client(self) -> Transport:
        """etcd as `celery_etcd_lock.etcd.connect` gives it, from the test. Whoever takes it closes it."""
        return connect(self.host_url)

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {"url": self.url, "host_url": self.host_url, "hostname": self.hostname, "port": self.port}

    @classmethod
    def command(cls, *args: str, debugpy: bool = False, wait_for_client: bool = True, **kwargs: Any) -> list[str]:
        """etcd and its options, then `args`; the rest is pytest-celery's, for components in Python."""
        return [
            "etcd",
            "--data-dir=/tmp/etcd",
            "--listen-client-urls=http://0.0.0.0:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--auto-compaction-mode=periodic",
            "--auto-compaction-retention=5m",
            "--unsafe-no-fsync",  # outlives a kill of the container all the same
            *args,
        ]

    @property
    def url(self) -> str:
        """Where it is for other containers of its network."""
        return f"{self.prefix()}{self.hostname}:{_PORT.partition('/')[0]}"

    @property
    def host_url(self) -> str:
        """Where it is for the test; not the same after a restart."""
        self._wait_port(_PORT)
        host, port = self.get_addr(_PORT)
        return f"{self.prefix()}{host}:{port}"

    @property
    def hostname(self) -> str:
        return str(self.attrs["Config"]["Hostname"])

    @property
    def port(self) -> int:
        """Of the host, which leads to 2379 in the container."""
        return int(self._wait_port(_PORT))

    @classmethod
    def version(cls) -> str:
        return cls.image().rpartition(":")[2]

    @classmethod
    def initial_env(cls) -> dict[str, str]:
        return ETCD_ENV

    @classmethod
    def image(cls) -> str:
        return ETCD_IMAGE

    @classmethod
    def ports(cls) -> dict[str, int | None]:
        return ETCD_PORTS

    @classmethod
    def prefix(cls) -> str:
        return ETCD_PREFIX

    def get_open_tcp_ports(self) -> list[str]:
        """2379, once etcd answers there and has a leader. (Asked from outside: etcd's image has no program to ask.)"""
        host, port = self.get_addr(_PORT)
        connection = http.client.HTTPConnection(host, port, timeout=2)
        try:
            connection.request("GET", "/health")
            healthy = b'"true"' in connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            healthy = False
        finally:
            connection.close()
        return [_PORT.partition("/")[0]] if healthy else []


class EtcdTestNode(CeleryTestNode):
    """One etcd of a test: what `CeleryTestBroker` is for a broker."""

    @classmethod
    def default_config(cls) -> dict[str, Any]:
        return {"url": "http://127.0.0.1:2379", "host_url": "http://127.0.0.1:2379"}


class CeleryEtcdCluster(CeleryTestCluster):
    """The etcd of a test, by default of one member.

    Several nodes have to be made members of one etcd cluster by their commands (``--initial-cluster``): workers are
    told of all of them as one, and etcds that do not know of each other keep nobody out.
    """

    @classmethod
    def default_config(cls) -> dict[str, Any]:
        return {"urls": ["http://127.0.0.1:2379"], "host_urls": ["http://127.0.0.1:2379"]}


class EtcdLockWorkerContainer(CeleryWorkerContainer):
    """A worker whose environment says where etcd is, if the test has one."""

    @classmethod
    def initial_env(cls, celery_worker_cluster_config: dict[str, Any], initial: Any = None) -> dict[str, Any]:
        """As pytest-celery's, and ``CELERY_ETCD_LOCK_ENDPOINTS``, unless `initial` has it."""
        env: dict[str, Any] = super().initial_env(celery_worker_cluster_config, initial)
        if config := celery_worker_cluster_config.get("celery_etcd_cluster_config"):
            env.setdefault(ENDPOINTS_VARIABLE, ",".join(config["urls"]))
        return env


default_etcd = container(
    image="{default_etcd_image}",
    ports=fxtr("default_etcd_ports"),
    environment=fxtr("default_etcd_env"),
    network="{default_pytest_celery_network.name}",
    wrapper_class=EtcdContainer,
    timeout=ETCD_CONTAINER_TIMEOUT,
    command=fxtr("default_etcd_command"),
)


@pytest.fixture
def default_etcd_cls() -> type[EtcdContainer]:
    """The class whose methods say how the container is made."""
    return EtcdContainer


@pytest.fixture
def default_etcd_image(default_etcd_cls: type[EtcdContainer]) -> str:
    """The image's name."""
    return default_etcd_cls.image()


@pytest.fixture
def default_etcd_command(default_etcd_cls: type[EtcdContainer]) -> list[str]:
    """What runs in the container."""
    return default_etcd_cls.command()


@pytest.fixture
def default_etcd_env(default_etcd_cls: type[EtcdContainer]) -> dict[str, str]:
    """Its environment."""
    return default_etcd_cls.initial_env()


@pytest.fixture
def default_etcd_ports(default_etcd_cls: type[EtcdContainer]) -> dict[str, int | None]:
    """Its ports, and those of the host that lead to them."""
    return default_etcd_cls.ports()


@pytest.fixture
def celery_etcd(default_etcd: EtcdContainer) -> Iterator[EtcdTestNode]:
    """The etcd of this test."""
    node = EtcdTestNode(default_etcd)
    yield node
    node.teardown()


@pytest.fixture
def celery_etcd_cluster(celery_etcd: EtcdTestNode) -> Iterator[CeleryEtcdCluster | None]:
    """The etcd of this test as a cluster; meanwhile it is that of the test's own process, too."""
    cluster = CeleryEtcdCluster(celery_etcd)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENDPOINTS_VARIABLE, ",".join(cluster.config()["host_urls"]))
        yield cluster
        close_all()  # what the test locked: its etcd ends here
    cluster.teardown()


@pytest.fixture
def celery_etcd_cluster_config(celery_etcd_cluster: CeleryEtcdCluster | None) -> dict[str, Any] | None:
    """Where etcd is: ``urls`` from other containers, ``host_urls`` from the test."""
    return celery_etcd_cluster.config() if celery_etcd_cluster else None


@pytest.fixture
def celery_worker_cluster_config(
    celery_broker_cluster_config: dict[str, Any] | None,
    celery_backend_cluster_config: dict[str, Any] | None,
    celery_etcd_cluster_config: dict[str, Any] | None,
) -> dict[str, Any]:
    """Where broker, backend and etcd are."""
    return {
        "celery_broker_cluster_config": celery_broker_cluster_config,
        "celery_backend_cluster_config": celery_backend_cluster_config,
        "celery_etcd_cluster_config": celery_etcd_cluster_config,
    }


@pytest.fixture
def default_worker_container_cls() -> type[EtcdLockWorkerContainer]:
    """The class whose methods say how the worker's container is made."""
    return EtcdLockWorkerContainer


@pytest.fixture(scope="session")
def default_worker_container_session_cls() -> type[EtcdLockWorkerContainer]:
    """The same, for how its image is built."""
    return EtcdLockWorkerContainer


default_worker_container = container(
    image="{celery_base_worker_image.id}",
    ports=fxtr("default_worker_ports"),
    environment=fxtr("default_worker_env"),
    network="{default_pytest_celery_network.name}",
    volumes={"{default_worker_volume.name}": DEFAULT_WORKER_VOLUME},
    wrapper_class=EtcdLockWorkerContainer,
    timeout=DEFAULT_WORKER_CONTAINER_TIMEOUT,
    command=fxtr("default_worker_command"),
)
