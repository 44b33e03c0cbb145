"""A lent client: what becomes of its channel and token. The real `etcd3` at the end, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import TLS, Put, Range, Txn, Watch
from celery_etcd_lock.exceptions import AuthRejected, ConfigError, EtcdUnavailable
from celery_etcd_lock.locks import Mutex, Session
from celery_etcd_lock.testing import EtcdServer

grpc: Any = pytest.importorskip("grpc", reason="grpcio is not installed")  # in CI it is: the extra "test" has it

ROOT = Path(__file__).resolve().parents[2]


def channel_to(server: EtcdServer) -> Any:
    return grpc.insecure_channel(server.url.removeprefix("http://"))


@pytest.fixture
def lent(etcd: EtcdServer) -> Iterator[SimpleNamespace]:
    """A client as ours sees one: a channel, and no token."""
    client = SimpleNamespace(channel=channel_to(etcd), metadata=None)
    yield client
    client.channel.close()


def run(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`code` in a Python of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip


# -- what cannot be meant


@pytest.mark.parametrize(
    "given",
    [{"endpoints": "http://a:1"}, {"username": "root", "password": "x"}, {"tls": TLS()}],
)
def test_a_client_brings_all_of_its_own(given: dict[str, Any]) -> None:
    """Endpoint, user or TLS beside it: which of them would be meant?"""
    with pytest.raises(ConfigError, match="leave out either it or them"):
        connect(client=lambda: None, **given)
    with pytest.raises(ConfigError, match="leave out either it or them"):
        Session.open(client=lambda: None, **given)


def refusal(client: str | Callable[[], Any]) -> str:
    with closing(connect(client=client)) as transport:
        calls: list[Callable[[], object]] = [
            lambda: transport.range(Range("a")),
            lambda: next(iter(transport.watch(Watch("a")))),
            lambda: transport.lease_renew(1),
        ]
        said = set()
        for call in calls:
            with pytest.raises(ConfigError) as error:
                call()
            said.add(str(error.value))
        (text,) = said
        return text


def test_a_function_that_gives_no_client() -> None:
    """At the first request: which function, and what it gave or raised."""

    def fails() -> None:
        raise RuntimeError("no vault today")

    assert re.search(r"lambda.* gives a str, and not an etcd3.Etcd3Client", refusal(lambda: "client"))
    assert re.search(r"lambda.* gives nothing \(None\)", refusal(lambda: None))
    assert re.search(r"fails gives no etcd3.Etcd3Client: RuntimeError: no vault today", refusal(fails))


def test_a_path_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such module, no such name, and a client that was made when its module was imported."""
    project = ModuleType("lending_project")
    project.client = SimpleNamespace(channel=None, metadata=None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lending_project", project)
    assert "cannot be imported: ModuleNotFoundError: No module named 'no_such_project'" in refusal("no_such_project.x")
    assert "cannot be imported: AttributeError" in refusal("lending_project:clinet")
    assert "made when its module was imported, perhaps before a fork" in refusal("lending_project.client")


# -- the channel and the token


def test_the_channel_stays_open(etcd: EtcdServer, lent: SimpleNamespace, prefix: str) -> None:
    """Locks and watches on it; after our session its owner uses it as before, and no thread of ours is left."""
    asked = []

    def lend() -> SimpleNamespace:
        asked.append(1)
        return lent

    threads = set(threading.enumerate())
    with Session.open(client=lend, ttl=5) as session:
        with Mutex(session, f"{prefix}lock").acquire() as held:
            assert held.is_held()
            with Session.open(etcd.url) as other, pytest.raises(Exception, match="is held by"):
                Mutex(other, f"{prefix}lock").acquire(blocking=False)
        stream = session.transport.watch(Watch(prefix))
        assert next(iter(stream)).events == ()
    assert asked == [1]
    deadline = time.monotonic() + 20
    while left := [each for each in set(threading.enumerate()) - threads if each.name.startswith("etcd-lock")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    healthy = lent.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert healthy(b"", timeout=20)  # and only now: whoever was the last to use it would have closed it


def test_a_token_that_the_client_has(etcd: EtcdServer) -> None:
    """It goes with every call; one that is refused is asked for anew, once, and if that is the same, it is said."""
    seen: list[Mapping[str, str]] = []

    class Refusing(grpc.RpcError):  # type: ignore[misc]
        def code(self) -> Any:
            return grpc.StatusCode.UNAUTHENTICATED

        def details(self) -> str:
            return "etcdserver: invalid auth token"

    class Channel:
        """Lets nobody in but those with the token `good`."""

        def __init__(self, real: Any) -> None:
            self._real = real

        def unary_unary(self, method: str, **options: Any) -> Any:
            call = self._real.unary_unary(method, **options)
            if "Health" in method:
                return call

            def checked(message: Any, timeout: float, metadata: tuple[tuple[str, str], ...]) -> Any:
                seen.append(dict(metadata))
                if dict(metadata).get("token") != "good":
                    raise Refusing
                return call(message, timeout=timeout)

            return checked

    channel = channel_to(etcd)

    def lending(*tokens: str) -> Callable[[], SimpleNamespace]:
        given = iter(tokens)
        return lambda: SimpleNamespace(channel=Channel(channel), metadata=(("token", next(given)),))

    for tokens in (["good"], ["old", "good"]):
        seen.clear()
        with closing(connect(client=lending(*tokens))) as transport:
            transport.range(Range("a"))
            transport.range(Range("a"))
        assert [each["token"] for each in seen] == [*tokens, "good"]
        assert all(each["hasleader"] == "true" for each in seen)
    with closing(connect(client=lending(*["old"] * 4))) as transport:
        for _ in range(2):
            seen.clear()
            with pytest.raises(AuthRejected, match="make a new client each time") as error:
                transport.range(Range("a"))
            assert "old" not in str(error.value)
            assert len(seen) == 1
    channel.close()


def test_a_client_that_takes_too_long_to_make(lent: SimpleNamespace, prefix: str) -> None:
    """The timeout holds for that too; made once, however many have asked meanwhile, it is used when it is there."""
    ready, asked = threading.Event(), []

    def slow() -> SimpleNamespace:
        asked.append(1)
        assert ready.wait(60)
        return lent

    with closing(connect(client=slow, timeout=0.5)) as transport:
        for _ in range(2):
            begun = time.monotonic()
            with pytest.raises(EtcdUnavailable, match="too long to make its client") as error:
                transport.txn(Txn([], [Put(prefix, b"")]))
            assert not error.value.unanswered
            assert time.monotonic() - begun < 5
        ready.set()
        assert transport.txn(Txn([], [Put(prefix, b"")]), timeout=20).succeeded
        assert asked == [1]


def test_what_grpc_says_while_it_is_made(prefix: str) -> None:
    """Nobody there is no mistake of the project's, wrapped in the client's own error or not: it is tried again."""

    class ConnectionFailedError(Exception):
        pass

    closed = grpc.insecure_channel("127.0.0.1:1")

    def bare() -> Any:
        closed.unary_unary("/a/b")(b"", timeout=5)

    def wrapped() -> Any:
        try:
            bare()
        except grpc.RpcError:
            raise ConnectionFailedError  # noqa: B904 as etcd3 does it

    for lend in (bare, wrapped):
        with closing(connect(client=lend, timeout=5)) as transport, pytest.raises(EtcdUnavailable) as error:
            transport.range(Range("a"))
        assert not error.value.unanswered
        assert "refused" in str(error.value)
    closed.close()


# -- forks

_FORKING = """
import os, sys, warnings
from types import SimpleNamespace
import grpc
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Put, Range, Txn
from celery_etcd_lock.exceptions import ConfigError

warnings.simplefilter("ignore")
address, mode = sys.argv[1:]
made = []

def lend():
    print("lent in", "parent" if os.getpid() == parent else "child", flush=True)
    if mode != "same" or not made:
        made.append(SimpleNamespace(channel=grpc.insecure_channel(address), metadata=None))
    return made[-1]

parent = os.getpid()
transport = connect(client=lend)
if mode != "unused":
    transport.range(Range("forked"))
pid = os.fork()
if pid == 0:
    try:
        for _ in range(3):
            print(transport.txn(Txn([], [Put("forked", b"")])).succeeded, flush=True)
    except ConfigError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
transport.range(Range("forked"))
"""


@pytest.mark.parametrize(
    ("mode", "support", "said"),
    [
        ("unused", "", ["lent in child", "True", "True", "True", "lent in parent"]),
        # never asked in the child: a client that logs in would hang there
        ("used", "", ["lent in parent", "take the gateway"]),
        ("used", "1", ["lent in parent", "lent in child", "True", "True", "True"]),
        ("same", "1", ["lent in parent", "lent in child", "let it make one in each process"]),
    ],
)
def test_forks(etcd: EtcdServer, mode: str, support: str, said: list[str]) -> None:
    """Asked once in each process that uses it, not before; a client of the parent's is not used in the child."""
    done = run(_FORKING, etcd.url.removeprefix("http://"), mode, GRPC_ENABLE_FORK_SUPPORT=support)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(said), lines
    assert all(part in line for part, line in zip(said, lines, strict=True)), lines


# -- the real package


@pytest.mark.alone  # tokens that live for two seconds, in pure Python
@pytest.mark.together
def test_the_real_package(with_etcd3: dict[str, str]) -> None:
    """All of `with_etcd3.py`, the contract suite among it, in a process that can import etcd3 0.12.0."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/etcd/with_etcd3.py"],
        cwd=ROOT, env=os.environ | with_etcd3, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed in", done.stdout, re.MULTILINE), done.stdout


def test_the_real_package_that_cannot_be_imported(with_etcd3: dict[str, str]) -> None:
    """Beside a protobuf that is not in pure Python, or not installed at all: the error says why, and what to do."""
    code = """
import warnings
warnings.simplefilter("ignore")
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Range
from celery_etcd_lock.exceptions import ConfigError
def lend():
    import etcd3
    return etcd3.client()
for client in (lend, "etcd3.client"):
    try:
        connect(client=client).range(Range("a"))
    except ConfigError as error:
        print(error)
"""
    done = run(code, **with_etcd3 | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "upb"})
    assert done.stdout.count("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python") == 2, done.stderr
    assert done.stdout.count('leave the client out and set etcd_lock_transport="grpc"') == 2
    done = run(code, PYTHONPATH="", PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="python")
    assert done.stdout.count("there is no module 'etcd3': pip install etcd3") == 2, done.stderr
