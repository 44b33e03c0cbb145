"""Workers before an etcd that refuses them: what they say, what becomes of the tasks, and what they cost it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
from celery import Celery

from celery_etcd_lock import SingletonTask
from celery_etcd_lock.exceptions import AuthRejected, EtcdRejected, PermissionDenied
from celery_etcd_lock.testing import EtcdServer, ServerTLS
from tests.etcd.test_gateway import Certificates
from tests.locks.test_doors import KINDS, OTHER_PASSWORD, PASSWORD, SECRETS, USER, etcdctl, guard, log_ins
from tests.servers import skip_or_fail
from tests.workers import Project, overlaps, until

NewProject = Callable[..., Project]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The transport."""
    if request.param == "grpc" and find_spec("grpc") is None:
        skip_or_fail("grpcio is not installed: pip install celery-etcd-lock[grpc]")
    return str(request.param)


pytestmark = pytest.mark.usefixtures("etcd")  # where there is none, nothing here can run


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls") / "ours", "ours")


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdServer]:
    """A server with the users and the role of docs/security.md."""
    with EtcdServer(extra_args=["--bcrypt-cost=4"]) as server:
        guard(server)
        yield server


def test_a_wrong_password_and_then_the_right_one(new_project: NewProject, guarded: EtcdServer, kind: str) -> None:
    """The worker starts, says once in each process what is wrong, runs no body without its lock, whatever
    `on_unavailable`, and asks etcd seldom. With the password put right every task runs, under a role for the
    namespace alone."""
    user, role = f"{USER}-{kind}", f"role-{kind}"
    project = new_project(guarded.url, etcd_lock_transport=kind, etcd_lock_username=user, etcd_lock_password=PASSWORD)
    etcdctl(guarded, "role", "add", role)
    etcdctl(guarded, "role", "grant-permission", role, "readwrite", "--prefix", f"/{project.queue}/")
    etcdctl(guarded, "user", "add", user, "--interactive=false", typing=OTHER_PASSWORD)
    etcdctl(guarded, "user", "grant-role", user, role)
    before, begun = log_ins(guarded), time.monotonic()
    worker = project.worker("-P", "prefork", "-c", "2")
    with pytest.raises(AuthRejected, match=f"does not accept user '{user}' with this password") as error:
        project.send("unavailable_fails", 0).get(timeout=60)
    assert not SECRETS.search(str(error.value))
    put_back = [project.send("unavailable_runs", number, key=f"k{number}") for number in range(10)]
    put_back += [project.send("waiting", number, 0.1) for number in range(4)]
    until(lambda: all(result.state == "RETRY" for result in put_back), "the putting back")
    assert project.runs() == []
    asked = log_ins(guarded) - before
    # Each process: at first, one, three, seven and fifteen seconds after that, and then every ten.
    assert 1 <= asked <= 2 * (5 + (time.monotonic() - begun) / 10)
    etcdctl(guarded, "user", "passwd", user, "--interactive=false", typing=PASSWORD)
    for result in put_back:
        result.get(timeout=60)
    assert len(project.runs("unavailable_runs")) == 10
    assert all(run.token for run in project.runs()), "under their locks"
    assert overlaps(project.runs("waiting")) == []
    said = [line for line in worker.output.splitlines() if "etcd_lock.unavailable" in line]
    assert 1 <= len(said) <= 2, "once for each process"
    assert all(f"'{user}'" in line and "etcd_lock_password" in line for line in said)
    assert not SECRETS.search(worker.output)


@pytest.mark.parametrize("case", ["no permission", "http to TLS"])
def test_refused_is_not_away(
    guarded: EtcdServer, certificates: Certificates, caplog: pytest.LogCaptureFixture, kind: str, case: str
) -> None:
    """`on_unavailable="run"` does not run the body, and one line says which setting or role to mend."""
    caplog.set_level(logging.DEBUG)
    with EtcdServer(tls=ServerTLS(*certificates.signed("server", "/O=etcd"))) as secure:
        app = Celery("doors", set_as_current=False)
        app.conf.update(
            etcd_lock_endpoints=secure.url.replace("https", "http") if case == "http to TLS" else guarded.url,
            etcd_lock_namespace="celery" if case == "http to TLS" else "elsewhere",
            etcd_lock_username=USER,
            etcd_lock_password=PASSWORD,
            etcd_lock_transport=kind,
            etcd_lock_eager=True,
            etcd_lock_on_unavailable="run",
        )
        ran: list[int] = []
        error, mend = {
            "no permission": (PermissionDenied, "role grant-permission ROLE readwrite --prefix /elsewhere/"),
            "http to TLS": (EtcdRejected, "write https:// in etcd_lock_endpoints"),
        }[case]

        @app.task(base=SingletonTask, name=f"refused-{kind}-{case}")
        def task(number: int) -> None:
            ran.append(number)

        for number in range(3):
            with pytest.raises(error, match=mend):
                task.apply((number,)).get()
    assert ran == []
    (said,) = [record.getMessage() for record in caplog.records if "etcd_lock.unavailable" in record.getMessage()]
    assert mend in said.splitlines()[0]
    assert "none runs without its lock" in said
    assert not SECRETS.search(caplog.text)
    app.close()


def test_tls_files_that_cannot_be_used_stop_the_worker(new_project: NewProject, certificates: Certificates) -> None:
    """With one clean line, that names the setting, and no key in it."""
    certfile, _ = certificates.signed("one", "/O=one")
    _, keyfile = certificates.signed("other", "/O=other")
    project = new_project(
        "https://127.0.0.1:2379",
        etcd_lock_use_ssl={"ca_certs": certificates.ca, "certfile": certfile, "keyfile": keyfile},
    )
    worker = project.worker("-P", "prefork", "-c", "1", ready=False)
    assert worker.process.wait(60) != 0
    (line,) = [line for line in worker.output.splitlines() if "etcd_lock_use_ssl" in line]
    assert keyfile in line
    assert "Traceback" not in worker.output
    assert not SECRETS.search(worker.output)
