"""Broker, backend, etcd, workers and beats, each in a container of its own, new for every test."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import docker
import pytest
from celery import Celery
from pytest_celery import (
    DEFAULT_WORKER_CONTAINER_TIMEOUT,
    DEFAULT_WORKER_VOLUME,
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestSetup,
    CeleryTestWorker,
    CeleryWorkerCluster,
    RedisTestBackend,
    RedisTestBroker,
)
from pytest_docker_tools import build, container, fxtr

from celery_etcd_lock.testing.pytest_celery import *  # noqa: F403 - the fixture set under test, as a user takes it
from celery_etcd_lock.testing.pytest_celery import EtcdTestNode
from tests.servers import skip_or_fail
from tests.smoke import tasks
from tests.smoke.fleet import (
    BEAT_TTL,
    TTL,
    BeatContainer,
    Fleet,
    OtherWorkerContainer,
    QuietRedisContainer,
    WorkerContainer,
)
from tests.smoke.images import SAID, BuildContext, build_arguments
from tests.workers import collect_garbage


@pytest.fixture(scope="session")
def docker_client() -> Iterator[Any]:
    """The engine; without one the tests are skipped, and under ``CI`` fail."""
    missing = ""
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        missing = f"no Docker engine: {error}"
    if missing:
        collect_garbage()  # it leaves a socket open
        skip_or_fail(missing)
    with pytest.MonkeyPatch.context() as patch:
        # It takes a machine with a /.dockerenv for a container of the engine's own, whose ports it then would not ask.
        patch.setattr("pytest_docker_tools.wrappers.container.tests_inside_container", lambda: False)
        yield client
    client.close()


# Images.


@pytest.fixture(scope="session")
def worker_context(tmp_path_factory: pytest.TempPathFactory) -> BuildContext:
    context = BuildContext(tmp_path_factory.mktemp("worker"))
    context.take_this()
    return context


@pytest.fixture(scope="session")
def old_worker_context(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> BuildContext:
    context = BuildContext(tmp_path_factory.mktemp("old-worker"))
    pytestconfig.stash[SAID] = f"the old worker has celery-etcd-lock of {context.take_old()}, and the oldest Celery"
    return context


celery_base_worker_image = build(
    path="{worker_context}",
    tag="celery-etcd-lock/smoke:new",
    buildargs=build_arguments(),
)

old_worker_image = build(
    path="{old_worker_context}",
    tag="celery-etcd-lock/smoke:old",
    buildargs=build_arguments(),
)


# Broker and backend: Redis alone, of pytest-celery's.


@pytest.fixture
def default_redis_broker_cls() -> type[QuietRedisContainer]:
    return QuietRedisContainer


@pytest.fixture
def default_redis_backend_cls() -> type[QuietRedisContainer]:
    return QuietRedisContainer


@pytest.fixture
def celery_broker_cluster(celery_redis_broker: RedisTestBroker) -> CeleryBrokerCluster:
    return CeleryBrokerCluster(celery_redis_broker)


@pytest.fixture
def celery_backend_cluster(celery_redis_backend: RedisTestBackend) -> CeleryBackendCluster:
    return CeleryBackendCluster(celery_redis_backend)


# Workers: one, and another.

_ALIKE: dict[str, Any] = {
    "environment": fxtr("default_worker_env"),
    "network": "{default_pytest_celery_network.name}",
    "volumes": {"{default_worker_volume.name}": DEFAULT_WORKER_VOLUME},
    "timeout": DEFAULT_WORKER_CONTAINER_TIMEOUT,
}
"""As pytest-celery's own worker container has it."""


@pytest.fixture  # type: ignore[no-redef] # as a user overrides it, too
def default_worker_container_cls() -> type[WorkerContainer]:
    return WorkerContainer


default_worker_container = container(
    image="{celery_base_worker_image.id}",
    wrapper_class=WorkerContainer,
    command=fxtr("default_worker_command"),
    **_ALIKE,
)

other_worker_container = container(
    image="{celery_base_worker_image.id}",
    wrapper_class=OtherWorkerContainer,
    command=OtherWorkerContainer.command(),
    **_ALIKE,
)

old_worker_container = container(
    image="{old_worker_image.id}",
    wrapper_class=OtherWorkerContainer,
    command=OtherWorkerContainer.command(),
    **_ALIKE,
)


@pytest.fixture
def celery_other_worker(
    other_worker_container: OtherWorkerContainer, default_worker_app: Celery
) -> Iterator[CeleryTestWorker]:
    worker = CeleryTestWorker(other_worker_container, app=default_worker_app)
    yield worker
    worker.teardown()


@pytest.fixture
def celery_old_worker(
    old_worker_container: OtherWorkerContainer, default_worker_app: Celery
) -> Iterator[CeleryTestWorker]:
    worker = CeleryTestWorker(old_worker_container, app=default_worker_app)
    yield worker
    worker.teardown()


@pytest.fixture
def celery_worker_cluster(
    celery_worker: CeleryTestWorker, celery_other_worker: CeleryTestWorker
) -> Iterator[CeleryWorkerCluster]:
    cluster = CeleryWorkerCluster(celery_worker, celery_other_worker)
    yield cluster
    cluster.teardown()


@pytest.fixture
def default_worker_tasks(default_worker_tasks: set[ModuleType]) -> set[ModuleType]:
    return {*default_worker_tasks, tasks}


@pytest.fixture
def default_worker_app(default_worker_app: Celery) -> Celery:
    default_worker_app.conf.update(
        broker_connection_retry_on_startup=True,
        # A worker that was cut off has to notice it when it is back: its old connections may not answer any more.
        broker_transport_options={"socket_timeout": 5, "socket_connect_timeout": 5, "health_check_interval": 5},
        redis_socket_timeout=5,
        redis_socket_connect_timeout=5,
        etcd_lock_ttl=TTL,
        etcd_lock_timeout=1,
        etcd_lock_beat_ttl=BEAT_TTL,
        beat_schedule={"tick": {"task": tasks.tick.name, "schedule": 1.0, "options": {"queue": "one"}}},
    )
    return default_worker_app


# Beats: two of them.

one_beat = container(
    image="{celery_base_worker_image.id}",
    wrapper_class=BeatContainer,
    command=BeatContainer.command(),
    **_ALIKE,
)

other_beat = container(
    image="{celery_base_worker_image.id}",
    wrapper_class=BeatContainer,
    command=BeatContainer.command(),
    **_ALIKE,
)


@pytest.fixture
def fleet(
    celery_setup: CeleryTestSetup, celery_etcd: EtcdTestNode, default_pytest_celery_network: Any
) -> Iterator[Fleet]:
    fleet = Fleet(celery_setup, celery_etcd, default_pytest_celery_network)
    yield fleet
    fleet.close()
