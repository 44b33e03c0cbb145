"""The gRPC transport against members that die, stop, forget, refuse; its streams and connections; forks and gevent."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import TLS, Delete, Put, Range, Txn, Watch, WatchReply, prefix_end
from celery_etcd_lock.etcd.gateway_codec import NoAnswer
from celery_etcd_lock.etcd.grpc import GrpcTransport, GrpcWatch
from celery_etcd_lock.etcd.grpc_channel import failure
from celery_etcd_lock.etcd.grpc_messages import messages
from celery_etcd_lock.exceptions import AuthRejected, ConfigError, EtcdRejected, EtcdUnavailable, NoSpace
from celery_etcd_lock.locks import Session
from celery_etcd_lock.settings import Settings
from celery_etcd_lock.testing import EtcdCluster, EtcdServer, ServerTLS
from tests.etcd.test_gateway import Certificates, Listener, etcdctl
from tests.quota import until_full
from tests.servers import skip_or_fail

grpc: Any = pytest.importorskip("grpc", reason="grpcio is not installed")  # in CI it is: the extra "test" has it

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _grpc(etcd: EtcdServer) -> None:
    try:
        GrpcTransport([etcd.url])
    except ConfigError as missing:
        skip_or_fail(missing)


@pytest.fixture
def dead() -> str:
    """A URL where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def stopped() -> Iterator[str]:
    """The URL of an etcd that is stopped: its port takes connections, and nobody answers."""
    with EtcdServer() as server:
        server.pause()
        yield server.url


def starting_at(transport: GrpcTransport, index: int) -> GrpcTransport:
    """The same, which would have begun with any endpoint, beginning with that one."""
    transport._cluster._current = index
    return transport


def follow(stream: GrpcWatch) -> tuple[WatchReply, threading.Thread, list[WatchReply | Exception]]:
    """The stream's first reply, a thread that reads on, and what it reads."""
    found: list[WatchReply | Exception] = []

    def read() -> None:
        try:
            found.extend(stream)
        except EtcdUnavailable as error:
            found.append(error)

    first = next(stream)
    thread = threading.Thread(target=read)
    thread.start()
    return first, thread, found


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def run(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`code` in a Python of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


# -- what cannot be meant


def test_options_are_checked(tmp_path: Path) -> None:
    """As by the gateway, before anything is sent; and gRPC cannot leave certificates unchecked."""
    with pytest.raises(ConfigError, match="has no scheme"):
        GrpcTransport(["localhost:2379"])
    with pytest.raises(ConfigError, match="more than 0"):
        GrpcTransport(["http://127.0.0.1:1"], timeout=0)
    with pytest.raises(ConfigError, match="go together"):
        GrpcTransport(["http://127.0.0.1:1"], username="root")
    with pytest.raises(ConfigError, match=r"ca_certs file /no/such\.pem"):
        GrpcTransport(["https://127.0.0.1:1"], tls=TLS(ca_certs="/no/such.pem"))
    with pytest.raises(ConfigError, match="checking certificates"):
        GrpcTransport(["https://127.0.0.1:1"], tls=TLS(cert_reqs="none"))


def test_without_the_package() -> None:
    """Every module can be imported; who wants the transport is told what to install."""
    for missing in ("grpc", "google.protobuf"):
        code = f"""
import sys
sys.modules[{missing!r}] = None
from celery_etcd_lock.etcd import connect, grpc_client
from celery_etcd_lock.exceptions import ConfigError
try:
    connect("http://127.0.0.1:1", transport="grpc")
except ConfigError as error:
    print(error)
"""
        done = run(code)
        assert "pip install celery-etcd-lock[grpc]" in done.stdout, done.stderr


def test_under_eventlet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sockets are eventlet's, gRPC is refused, and the way out named; a worker does not start."""
    monkeypatch.setitem(sys.modules, "eventlet.patcher", SimpleNamespace(is_monkey_patched=lambda name: True))
    for refused in (lambda: GrpcTransport(["http://127.0.0.1:1"]), Settings(transport="grpc").check_here):
        with pytest.raises(ConfigError, match="gateway"):
            refused()
    Settings(transport="grpc", enabled=False).check_here()


# -- members that fail


def test_nobody_there_ends_the_call_at_once(dead: str) -> None:
    """Refused everywhere: no waiting for the timeout, and nothing can have been carried out."""
    begun = time.monotonic()
    with closing(GrpcTransport([dead], timeout=60)) as transport:
        for call in (
            lambda: transport.range(Range("a")),
            lambda: transport.lease_renew(1),
            lambda: next(transport.watch(Watch("a"))),
            transport.status,
        ):
            with pytest.raises(EtcdUnavailable, match="connection refused") as error:
                call()
            assert not error.value.unanswered
            assert dead in str(error.value)
    assert time.monotonic() - begun < 20


def test_a_name_that_is_not_known() -> None:
    """Like nobody there."""
    with (
        closing(GrpcTransport(["http://no-such-host.invalid:2379"], timeout=10)) as transport,
        pytest.raises(EtcdUnavailable) as error,
    ):
        transport.range(Range("a"))
    assert not error.value.unanswered


def test_failover_from_a_dead_endpoint(etcd: EtcdServer, dead: str, prefix: str) -> None:
    """The next one is asked, and asked first from then on; nothing was left unanswered."""
    with closing(starting_at(GrpcTransport([dead, etcd.url]), 0)) as transport:
        assert not transport.txn(Txn([], [Put(prefix, b"")])).header.unanswered
        before = transport.requests
        transport.range(Range(prefix))
        assert transport.requests == before + 1
        assert [status.endpoint for status in transport.status()] == [etcd.url]
        stream = starting_at(transport, 0).watch(Watch(prefix))
        assert next(stream).events == ()
        stream.close()


def test_a_member_that_comes_back(prefix: str) -> None:
    """After a restart of the server the same transport goes on at once, and so do renewals and watches."""
    with EtcdServer() as server, closing(GrpcTransport([server.url], timeout=20)) as transport:
        transport.txn(Txn([], [Put(prefix, b"v")]))
        lease = transport.lease_grant(600).lease
        for _ in range(2):
            transport.lease_renew(lease)
            stream = transport.watch(Watch(prefix))
            next(stream)
            server.kill()
            with pytest.raises(EtcdUnavailable):
                transport.range(Range(prefix))
            with pytest.raises(EtcdUnavailable):
                next(stream)
            server.start()
            assert transport.range(Range(prefix)).kvs[0].value == b"v"
            assert transport.lease_renew(lease).ttl == 600


def test_a_stopped_member_does_not_hold_up_the_others(prefix: str) -> None:
    """SIGSTOP, one of three: reads, writes, renewals and new watches go on within the timeout; old watches end.

    And a session whose renewals went to that member is not lost.
    """
    with (
        EtcdCluster() as cluster,
        closing(GrpcTransport(cluster.endpoints, timeout=6)) as transport,
        closing(GrpcTransport(cluster.endpoints, timeout=6)) as renewing,
    ):
        stopped = next(member for member in cluster.members if member is not cluster.leader())
        index = cluster.members.index(stopped)
        transport.status()
        lease = transport.lease_grant(60).lease
        starting_at(transport, index).lease_renew(lease)
        stream = starting_at(transport, index).watch(Watch(prefix, prefix_end(prefix)))
        _, reading, found = follow(stream)
        session = Session(starting_at(renewing, index), ttl=10)
        renewed = session._deadline
        until(lambda: session._deadline > renewed, "a renewal")
        stopped.pause()
        renewed = session._deadline

        fresh = transport.watch(Watch(prefix))
        calls: list[Callable[[], object]] = [
            lambda: transport.lease_renew(lease),
            lambda: transport.range(Range(prefix + "a")),
            lambda: next(fresh),
            lambda: transport.delete(Delete(prefix + "a")),
        ]
        begun = time.monotonic()
        done = starting_at(transport, index).txn(Txn([], [Put(prefix + "a", b"", lease)]))
        assert time.monotonic() - begun < 6 + 2
        assert done.succeeded
        assert done.header.unanswered
        reading.join(20)
        assert isinstance(found[-1], EtcdUnavailable)
        assert stopped.url in str(found[-1])
        for call in calls:
            begun = time.monotonic()
            starting_at(transport, index)
            call()
            assert time.monotonic() - begun < 6 + 2
        fresh.close()
        assert len(transport.status()) == 2
        before = transport.requests
        assert not transport.range(Range(prefix)).header.unanswered
        assert transport.requests == before + 1

        until(lambda: session.lost or session._deadline > renewed, "a renewal by another member")
        assert not session.lost
        assert renewing._cluster._current != index
        session.close()

        stopped.resume()
        stopped.wait_healthy()
        assert starting_at(transport, index).range(Range(prefix + "b")).kvs == ()
        assert starting_at(transport, index).lease_renew(lease).ttl == 60


def test_a_leader_that_dies(prefix: str) -> None:
    """The call outlives the election: it is tried until it is answered."""
    with EtcdCluster() as cluster, closing(GrpcTransport(cluster.endpoints, timeout=30)) as transport:
        transport.txn(Txn([], [Put(prefix, b"1")]))
        lease = transport.lease_grant(60).lease
        cluster.leader().kill()
        assert transport.txn(Txn([], [Put(prefix, b"2")])).succeeded
        assert transport.lease_renew(lease).ttl == 60
        assert transport.range(Range(prefix)).kvs[0].value == b"2"
        assert len(transport.status()) == 2


def test_a_member_without_a_majority_says_so(prefix: str) -> None:
    """With the others stopped the last one answers, but there is nobody to ask: `EtcdUnavailable` in time."""
    with EtcdCluster() as cluster, closing(GrpcTransport([cluster.members[0].url], timeout=3)) as transport:
        for member in cluster.members[1:]:
            member.pause()
        begun = time.monotonic()
        with pytest.raises(EtcdUnavailable) as error:
            transport.txn(Txn([], [Put(prefix, b"")]))
        assert error.value.unanswered
        assert time.monotonic() - begun < 9


# -- what may have been carried out


def test_a_request_without_an_answer(etcd: EtcdServer, prefix: str) -> None:
    """It may have been carried out: the error says so, and so does the reply that another endpoint gives."""
    with (
        EtcdServer() as server,
        closing(GrpcTransport([server.url], timeout=1)) as alone,
        closing(GrpcTransport([server.url, etcd.url])) as transport,
    ):
        alone.status()
        transport.status()
        server.pause()
        begun = time.monotonic()
        with pytest.raises(EtcdUnavailable, match=server.url) as error:
            alone.txn(Txn([], [Put(prefix, b"")]))
        assert error.value.unanswered
        assert time.monotonic() - begun < 4
        assert starting_at(transport, 0).txn(Txn([], [Put(prefix, b"")])).header.unanswered
        assert not transport.txn(Txn([], [Put(prefix, b"")])).header.unanswered


def test_a_request_without_a_connection(etcd: EtcdServer, stopped: str, prefix: str) -> None:
    """It was not sent, and nothing is left unanswered, be there nobody who answers in time, or be there another."""
    with closing(GrpcTransport([stopped], timeout=1)) as transport:
        with pytest.raises(EtcdUnavailable, match="no connection") as error:
            transport.txn(Txn([], [Put(prefix, b"")]))
        assert not error.value.unanswered
    with closing(starting_at(GrpcTransport([stopped, etcd.url]), 0)) as transport:
        assert not transport.txn(Txn([], [Put(prefix, b"")])).header.unanswered


def test_a_server_killed_under_a_request(prefix: str) -> None:
    """The connection broke after the request was on its way: it may have been carried out."""
    with EtcdServer() as server, closing(GrpcTransport([server.url], timeout=30)) as transport:
        transport.range(Range(prefix))
        server.pause()
        with ThreadPoolExecutor(1) as thread:
            calling = thread.submit(transport.txn, Txn([], [Put(prefix, b"")]))
            until(lambda: _unread(server), "the request is in the server's socket")
            server.kill()
            with pytest.raises(EtcdUnavailable) as error:
                calling.result(20)
        assert error.value.unanswered


def _unread(server: EtcdServer) -> bool:
    """Whether bytes wait in one of the sockets of the server's clients' port."""
    port = f":{int(server.url.rpartition(':')[2]):04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(line[1].endswith(port) and int(line[4].partition(":")[2], 16) for line in lines)


def test_a_refusal_after_silence_is_not_the_last_word(etcd: EtcdServer, prefix: str) -> None:
    """One member is silent, the next says no: the first may yet say yes, so it counts as unanswered."""
    with EtcdServer() as server, closing(GrpcTransport([server.url, etcd.url], timeout=3)) as transport:
        transport.status()
        server.pause()
        with pytest.raises(EtcdUnavailable, match="duplicate key") as error:
            starting_at(transport, 0).txn(Txn([], [Put(prefix, b""), Put(prefix, b"")]))
        assert error.value.unanswered
        with pytest.raises(EtcdRejected, match="duplicate key"):
            transport.txn(Txn([], [Put(prefix, b""), Put(prefix, b"")]))


def test_a_call_ends_in_time_whatever_happens(stopped: str) -> None:
    """The timeout bounds the call over all endpoints, and a timeout of the call's own goes before."""
    with Listener() as other, closing(GrpcTransport([stopped, other], timeout=60)) as transport:
        for timeout in (0.01, 0.5):
            for call in (
                lambda within: transport.range(Range("a"), timeout=within),
                lambda within: transport.lease_renew(1, timeout=within),
            ):
                begun = time.monotonic()
                with pytest.raises(EtcdUnavailable):
                    call(timeout)
                assert time.monotonic() - begun < timeout + 3
        with pytest.raises(EtcdUnavailable) as error:
            transport.range(Range("a"), timeout=0)
        assert not error.value.unanswered


def test_a_slow_answer_is_not_that_of_the_next_renewal(prefix: str) -> None:
    """A renewal whose time ran out takes its late answer with it: the next one waits for its own."""
    with EtcdServer() as server, closing(GrpcTransport([server.url], timeout=20)) as transport:
        one, other = (transport.lease_grant(ttl).lease for ttl in (60, 70))
        assert transport.lease_renew(one).ttl == 60
        server.pause()
        for _ in range(3):
            with pytest.raises(EtcdUnavailable):
                transport.lease_renew(one, timeout=0.3)
        server.resume()
        for _ in range(3):
            assert (transport.lease_renew(other).lease, transport.lease_renew(one).ttl) == (other, 60)


def test_a_database_without_space(prefix: str) -> None:
    """`NoSpace`, with the way out; a delete still succeeds."""
    with (
        EtcdServer(extra_args=["--quota-backend-bytes=1000000"]) as server,
        closing(GrpcTransport([server.url])) as transport,
    ):
        transport.txn(Txn([], [Put(prefix, b"v")]))
        full = until_full(transport)
        assert "etcdctl alarm disarm" in str(full)
        assert not full.unanswered
        with pytest.raises(NoSpace):
            transport.lease_grant(60)
        assert transport.delete(Delete(prefix)).deleted == 1


def test_after_close(etcd: EtcdServer) -> None:
    """A closed transport opens nothing again."""
    transport = GrpcTransport([etcd.url])
    transport.close()
    for call in (lambda: transport.range(Range("a")), lambda: transport.lease_renew(1)):
        with pytest.raises(EtcdUnavailable, match="closed"):
            call()
    assert list(transport.watch(Watch("a"))) == []
    assert transport.requests == 0


def test_a_moment_after_close(etcd: EtcdServer) -> None:
    """Who had looked before it was closed, and calls after it, opens nothing again either."""
    transport = GrpcTransport([etcd.url])
    transport.range(Range("a"))
    threads = threading.active_count()
    transport.close()
    (member,) = transport._cluster.endpoints
    for call in (
        lambda: transport._cluster.calling("range", messages.RangeRequest(key=b"a"))(member, {}, 5),
        lambda: member.renew(1, {}, 5),
        lambda: member.watch(Watch("a"), {}),
    ):
        with pytest.raises(NoAnswer, match="closed"):
            call()
    assert threading.active_count() <= threads


@pytest.mark.parametrize(
    ("code", "details"),
    [
        ("UNAVAILABLE", "Socket closed"),
        ("UNAVAILABLE", "GOAWAY received; Error code: 0; Debug Text: max_age"),
        ("UNKNOWN", "Stream removed"),
        ("INTERNAL", "Received RST_STREAM with error code 2"),
        ("INTERNAL", "Exception deserializing response!"),
        ("RESOURCE_EXHAUSTED", "Received message larger than max (5000000 vs. 4194304)"),
        ("UNAVAILABLE", "etcdserver: request timed out"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded"),
    ],
)
def test_a_call_that_broke_may_have_been_carried_out(code: str, details: str) -> None:
    """Whatever gRPC calls it: no refusal."""
    meaning = failure("http://a", Said(code, details))
    assert isinstance(meaning, NoAnswer)
    assert meaning.sent


@pytest.mark.parametrize(
    ("code", "details"),
    [
        ("INTERNAL", "etcdserver: corrupt cluster"),
        ("UNKNOWN", "etcdserver: txn is wrong"),
        ("OUT_OF_RANGE", "mvcc: no"),
    ],
)
def test_a_refusal_of_etcds_is_one(code: str, details: str) -> None:
    """The control: the same codes, from etcd."""
    assert isinstance(failure("http://a", Said(code, details)), EtcdRejected)


class Said(grpc.RpcError):  # type: ignore[misc]
    """An error of gRPC's."""

    def __init__(self, code: str, details: str) -> None:
        self.code = lambda: grpc.StatusCode[code]
        self.details = lambda: details


def test_a_certificate_that_is_gone(certificates: Certificates, secure: EtcdServer, tmp_path: Path) -> None:
    """Read when a connection is opened, which may be long after it was checked: the error names it."""
    gone = tmp_path / "ca.pem"
    gone.write_bytes(Path(certificates.ca).read_bytes())
    with closing(GrpcTransport([secure.url], tls=TLS(ca_certs=str(gone)))) as transport:
        gone.unlink()
        with pytest.raises(ConfigError, match=r"ca\.pem cannot be read: .*No such file"):
            transport.range(Range("a"))


def test_something_else_that_listens(etcd: EtcdServer, prefix: str) -> None:
    """No gRPC there: said in time, with the endpoint; another endpoint is asked all the same."""
    with http_server() as server:
        url = f"http://127.0.0.1:{server.server_port}"
        with (
            closing(GrpcTransport([url], timeout=1)) as transport,
            pytest.raises(
                (EtcdUnavailable, EtcdRejected), match=r"is this etcd's client URL|is it https there"
            ) as error,
        ):
            transport.range(Range(prefix))
        assert url in str(error.value)
        with closing(starting_at(GrpcTransport([url, etcd.url]), 0)) as transport:
            assert not transport.txn(Txn([], [Put(prefix, b"")])).header.unanswered


@contextmanager
def http_server() -> Iterator[HTTPServer]:
    """A web server, which knows no HTTP/2."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# -- streams and connections


def started(server: EtcdServer, method: str) -> int:
    """How many calls of `method` the server has seen begin."""
    found = re.search(
        rf'^grpc_server_started_total{{grpc_method="{method}",.*}} (\d+)$', server.metrics(), re.MULTILINE
    )
    return int(found[1]) if found else 0


def connections(server: EtcdServer) -> int:
    """How many connections this process has to the server."""
    port = int(server.url.rpartition(":")[2])
    return sum(
        connection.raddr.port == port
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED
    )


def test_nothing_is_opened_before_it_is_needed() -> None:
    """Neither a connection nor a thread."""
    with EtcdServer() as server:
        threads = threading.active_count()
        transport = GrpcTransport([server.url])
        transport.watch(Watch("a")).close()
        transport.close()
        assert connections(server) == 0
        assert threading.active_count() == threads


def test_one_stream_for_all_watches_and_one_for_all_renewals(prefix: str) -> None:
    """A hundred watches and renewals: one connection, one stream of each kind; a watch closed ends on the server."""
    with EtcdServer() as server, closing(GrpcTransport([server.url])) as transport:
        leases = [transport.lease_grant(60).lease for _ in range(5)]
        with ThreadPoolExecutor(8) as threads:
            renewed = list(threads.map(lambda number: transport.lease_renew(leases[number % 5]).lease, range(100)))
        assert renewed == leases * 20
        streams = [transport.watch(Watch(f"{prefix}{number:03}")) for number in range(100)]
        readers = [follow(stream) for stream in streams]
        assert (started(server, "Watch"), started(server, "LeaseKeepAlive")) == (1, 1)
        assert connections(server) == 1
        assert "etcd_debugging_mvcc_watcher_total 100" in server.metrics()
        for number in range(0, 100, 2):
            streams[number].close()
        transport.txn(Txn([], [Put(f"{prefix}{number:03}", b"") for number in range(100)]))
        for number, (first, thread, found) in enumerate(readers):
            if number % 2:
                until(lambda found=found: found, "the event")  # type: ignore[misc]
                (reply,) = found
                assert isinstance(reply, WatchReply)
                assert [event.kv.key for event in reply.events] == [f"{prefix}{number:03}"]
            else:
                thread.join(20)
                assert found == []
            assert first.events == ()
        until(lambda: "etcd_debugging_mvcc_watcher_total 50" in server.metrics(), "closed watches are gone")
        transport.close()
        for _, thread, _ in readers:
            thread.join(20)
            assert not thread.is_alive()
        until(lambda: connections(server) == 0, "the connection is closed")
        assert started(server, "Watch") == 1


def test_a_connection_that_failed_is_closed(prefix: str) -> None:
    """Whatever breaks, threads and connections do not pile up."""
    with EtcdServer() as server, closing(GrpcTransport([server.url], timeout=10)) as transport:
        transport.range(Range(prefix))
        threads = threading.active_count()
        for _ in range(5):
            transport.lease_renew(transport.lease_grant(60).lease)
            stream = transport.watch(Watch(prefix))
            next(stream)
            server.pause()
            with pytest.raises(EtcdUnavailable):
                transport.range(Range(prefix), timeout=0.2)
            with pytest.raises(EtcdUnavailable):
                next(stream)
            server.resume()
            transport.range(Range(prefix))
        until(lambda: connections(server) == 1, "old connections are closed")
        until(lambda: threading.active_count() <= threads + 1, "threads of old streams have ended")


def test_a_watch_that_is_never_confirmed(stopped: str) -> None:
    """The first reply has the transport's timeout; `close` does not wait for it."""
    with closing(GrpcTransport([stopped], timeout=0.5)) as transport, pytest.raises(EtcdUnavailable) as error:
        next(transport.watch(Watch("a")))
    assert not error.value.unanswered
    with closing(GrpcTransport([stopped], timeout=60)) as transport:
        stream = transport.watch(Watch("a"))
        reading = threading.Thread(target=list, args=[stream])
        reading.start()
        until(lambda: stream._subscription, "it has asked")
        stream.close()
        reading.join(20)
        assert not reading.is_alive()


def test_a_quiet_watch_stays(etcd: EtcdServer, prefix: str) -> None:
    """Longer than the timeout without news is no failure."""
    with closing(GrpcTransport([etcd.url], timeout=0.3)) as transport:
        _, reading, found = follow(stream := transport.watch(Watch(prefix)))
        reading.join(1)
        assert reading.is_alive()
        transport.txn(Txn([], [Put(prefix, b"v")]), timeout=5)
        until(lambda: found, "the event")
        stream.close()
        reading.join(20)
        (reply,) = found
        assert isinstance(reply, WatchReply)
        assert reply.events[0].kv.value == b"v"


def test_a_process_ends_with_everything_open(etcd: EtcdServer) -> None:
    """Nobody closed anything: the interpreter still ends, at once and without a word."""
    code = """
import sys, threading
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Watch
transport = connect(sys.argv[1], transport="grpc")
transport.lease_renew(transport.lease_grant(60).lease)
stream = transport.watch(Watch("a"))
next(stream)
threading.Thread(target=list, args=[stream], daemon=True).start()
"""
    begun = time.monotonic()
    done = run(code, etcd.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - begun < 30


# -- user and password


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdServer]:
    """A server with users: root may do everything, limited nothing. Tokens live for two seconds."""
    with EtcdServer(extra_args=["--auth-token-ttl=2", "--bcrypt-cost=4"]) as server:
        etcdctl(server, "user", "add", "root:correct-horse")
        etcdctl(server, "user", "grant-role", "root", "root")
        etcdctl(server, "user", "add", "limited:battery")
        etcdctl(server, "auth", "enable")
        yield server


def as_root(server: EtcdServer) -> GrpcTransport:
    return GrpcTransport([server.url], username="root", password="correct-horse")


def test_logging_in(guarded: EtcdServer, prefix: str) -> None:
    """Once, before the first call, whichever thread that is; neither password nor token is shown to anybody."""
    with closing(as_root(guarded)) as transport:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: transport.range(Range(prefix)), range(8)))
        assert transport.requests == 9
        assert transport.lease_renew(transport.lease_grant(60).lease).ttl == 60
        assert transport.status()
        assert transport._cluster._headers
        token = transport._cluster._headers["token"]
        assert token
        for text in (repr(transport), repr(transport._cluster)):
            assert "correct-horse" not in text
            assert token not in text


@pytest.mark.parametrize("why", ["expired", "revoked", "garbage"])
def test_a_token_that_is_no_good_any_more(guarded: EtcdServer, prefix: str, why: str) -> None:
    """Expired, revoked by a change of password, unknown: log in again, and nobody notices, watches included."""
    with closing(as_root(guarded)) as transport:
        old, reading, found = follow(watching := transport.watch(Watch(prefix)))
        assert old.events == ()
        for verb in ("call", "watch"):
            transport.range(Range(prefix))
            token = transport._cluster._headers
            assert token
            if why == "expired":
                time.sleep(4)  # to ask whether it has would give it two seconds more
            elif why == "revoked":
                change = ["user", "passwd", "root", "--interactive=false"]
                etcdctl(guarded, "--user", "root:correct-horse", *change, typing="correct-horse")
            else:
                transport._cluster._headers = {**token, "token": "nonsense.1"}
            before = transport.requests
            if verb == "call":
                assert transport.range(Range(prefix)).kvs == ()
            else:
                stream = transport.watch(Watch(prefix))
                assert next(stream).events == ()
                stream.close()
            assert transport.requests == before + 3
        transport.txn(Txn([], [Put(prefix, b"")]))
        until(lambda: found, "the watch from before goes on")
        transport.delete(Delete(prefix))
        watching.close()
        reading.join(20)
        assert not any(isinstance(each, Exception) for each in found)


def test_watches_of_an_old_token_end_too(guarded: EtcdServer, prefix: str) -> None:
    """A new token means a new stream for new watches; when the transport closes, nothing is left of the old ones."""
    threads = set(threading.enumerate())
    transport = as_root(guarded)
    readers = []
    for number in range(3):
        transport._cluster._headers = None
        readers.append(follow(transport.watch(Watch(f"{prefix}{number}"))))
    transport.txn(Txn([], [Put(f"{prefix}{number}", b"") for number in range(3)]))
    for _, _, found in readers:
        until(lambda found=found: found, "the event")  # type: ignore[misc]
    transport.close()
    for _, reading, found in readers:
        reading.join(20)
        assert not reading.is_alive()
        assert [type(each) for each in found] == [WatchReply]
    until(lambda: set(threading.enumerate()) <= threads, "no thread is left")


def test_leases_outlive_tokens(guarded: EtcdServer) -> None:
    """Renewals go on although the token with which their stream was opened has long expired."""
    with closing(as_root(guarded)) as transport:
        lease = transport.lease_grant(3).lease
        end = time.monotonic() + 7
        while time.monotonic() < end:
            assert transport.lease_renew(lease).ttl == 3
            time.sleep(0.5)


def test_a_restarted_server_forgets_its_tokens(prefix: str) -> None:
    """So the next call logs in again."""
    with EtcdServer(extra_args=["--bcrypt-cost=4"]) as server:
        etcdctl(server, "user", "add", "root:correct-horse")
        etcdctl(server, "user", "grant-role", "root", "root")
        with closing(as_root(server)) as transport:
            transport.txn(Txn([], [Put(prefix, b"before there is auth")]))
            etcdctl(server, "auth", "enable")
            assert transport.range(Range(prefix)).count == 1
            server.stop()
            server.start()
            assert transport.range(Range(prefix), timeout=20).count == 1


def test_credentials_that_are_wrong(guarded: EtcdServer, prefix: str) -> None:
    """`AuthRejected` at once: a wrong password, no user at all, a user who may not."""
    for credentials, says in (
        (("root", "wrong-horse"), "does not accept user 'root'"),
        ((None, None), "set etcd's user name and password"),
        (("limited", "battery"), "permission denied"),
    ):
        with closing(
            GrpcTransport([guarded.url], timeout=60, username=credentials[0], password=credentials[1])
        ) as transport:
            for call in (lambda: transport.range(Range(prefix)), lambda: next(transport.watch(Watch(prefix)))):
                with pytest.raises(AuthRejected, match=says) as error:
                    call()
                assert "horse" not in str(error.value)


def test_a_refused_watch_does_not_disturb_others(guarded: EtcdServer, prefix: str) -> None:
    """Of watches on one stream, the refused one fails and the permitted ones go on."""
    etcdctl(guarded, "--user", "root:correct-horse", "role", "add", "reader")
    etcdctl(guarded, "--user", "root:correct-horse", "role", "grant-permission", "reader", "readwrite", f"{prefix}mine")
    etcdctl(guarded, "--user", "root:correct-horse", "user", "grant-role", "limited", "reader")
    with closing(GrpcTransport([guarded.url], username="limited", password="battery")) as transport:
        _, reading, found = follow(mine := transport.watch(Watch(f"{prefix}mine")))
        refused = [transport.watch(Watch(f"{prefix}theirs{number}")) for number in range(5)]
        allowed = [transport.watch(Watch(f"{prefix}mine")) for number in range(5)]

        def begin(stream: GrpcWatch) -> str:
            try:
                return str(next(stream).events)
            except AuthRejected as error:
                return str(error)

        with ThreadPoolExecutor(10) as threads:
            said = list(threads.map(begin, [each for pair in zip(refused, allowed, strict=True) for each in pair]))
        assert all("permission denied" in text for text in said[::2])
        assert said[1::2] == ["()"] * 5
        transport.txn(Txn([], [Put(f"{prefix}mine", b"")]))
        until(lambda: found, "the event")
        mine.close()
        reading.join(20)
        assert not any(isinstance(each, Exception) for each in found)


# -- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls") / "ours", "ours")


@pytest.fixture(scope="module")
def secure(certificates: Certificates) -> Iterator[EtcdServer]:
    """A server with a certificate."""
    with EtcdServer(tls=ServerTLS(*certificates.signed("server", "/O=etcd"))) as server:
        yield server


def test_tls(secure: EtcdServer, certificates: Certificates, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests, renewals and watches; with the CA named, and with the system's."""
    monkeypatch.setenv("SSL_CERT_FILE", certificates.ca)
    for tls in (TLS(ca_certs=certificates.ca), TLS(), None):
        with closing(GrpcTransport([secure.url], tls=tls)) as transport:
            transport.txn(Txn([], [Put(prefix, b"v")]))
            assert transport.range(Range(prefix)).kvs[0].value == b"v"
            assert transport.lease_renew(transport.lease_grant(60).lease).ttl == 60
            _, reading, found = follow(stream := transport.watch(Watch(prefix)))
            transport.delete(Delete(prefix))
            until(lambda: found, "the event")  # noqa: B023
            stream.close()
            reading.join(20)
            assert [type(each) for each in found] == [WatchReply]


def test_mutual_tls(certificates: Certificates, tmp_path: Path, prefix: str) -> None:
    """With a client certificate, one with a common name too, which the gateway refuses; without one, an error."""
    server_tls = ServerTLS(*certificates.signed("server2", "/O=etcd"), certificates.ca)
    with EtcdServer(tls=server_tls) as server:
        for name, subject in (("client", "/O=client"), ("named", "/CN=root")):
            certfile, keyfile = certificates.signed(name, subject)
            with closing(GrpcTransport([server.url], tls=TLS(certificates.ca, certfile, keyfile))) as transport:
                transport.txn(Txn([], [Put(prefix, b"v")]))
                stream = transport.watch(Watch(prefix))
                assert next(stream).events == ()
                stream.close()
        stranger = Certificates(tmp_path / "others", "others").signed("client", "/O=client")
        for tls in (TLS(certificates.ca), TLS(certificates.ca, *stranger)):
            with closing(GrpcTransport([server.url], timeout=60, tls=tls)) as transport:
                with pytest.raises(AuthRejected, match="certfile") as error:
                    transport.range(Range(prefix))
                assert server.url in str(error.value)


def test_a_common_name_is_a_user(certificates: Certificates, prefix: str) -> None:
    """etcd takes a client certificate's common name for the user, without a password."""
    tls = TLS(certificates.ca, *certificates.signed("root", "/CN=root"))
    server_tls = ServerTLS(*certificates.signed("server3", "/O=etcd"), certificates.ca)
    with EtcdServer(tls=server_tls, extra_args=["--bcrypt-cost=4"]) as server:
        assert tls.certfile
        assert tls.keyfile
        files = ["--cacert", certificates.ca, "--cert", tls.certfile, "--key", tls.keyfile]
        etcdctl(server, *files, "user", "add", "root:correct-horse")
        etcdctl(server, *files, "user", "grant-role", "root", "root")
        etcdctl(server, *files, "auth", "enable")
        with closing(GrpcTransport([server.url], tls=tls)) as transport:
            assert transport.txn(Txn([], [Put(prefix, b"v")])).succeeded
            stream = transport.watch(Watch(prefix))
            assert next(stream).events == ()
            stream.close()


def test_a_certificate_that_cannot_be_trusted(secure: EtcdServer, certificates: Certificates, tmp_path: Path) -> None:
    """Of another authority, or for another host: `AuthRejected`, at once, and nothing counts as unanswered."""
    other = Certificates(tmp_path / "others", "others")
    calls: list[Callable[[GrpcTransport], object]] = [
        lambda transport: transport.range(Range("a")),
        lambda transport: transport.lease_renew(1),
        lambda transport: next(transport.watch(Watch("a"))),
    ]
    for tls in (TLS(ca_certs=other.ca), TLS(), TLS(ca_certs=other.ca, cert_reqs="optional")):
        with closing(GrpcTransport([secure.url], timeout=60, tls=tls)) as transport:
            for call in calls:
                with pytest.raises(AuthRejected, match="check ca_certs") as error:
                    call(transport)
                assert secure.url in str(error.value)
    with (
        EtcdServer(tls=ServerTLS(*certificates.signed("elsewhere", "/O=etcd", "DNS:elsewhere.test"))) as server,
        closing(GrpcTransport([server.url, secure.url], timeout=60, tls=TLS(certificates.ca))) as transport,
    ):
        assert not starting_at(transport, 0).txn(Txn([], [Put("a", b"")])).header.unanswered
        assert [status.endpoint for status in transport.status()] == [secure.url]


def test_http_and_https_mixed_up(etcd: EtcdServer, secure: EtcdServer) -> None:
    """Plain to a TLS port, and the other way round: a closer look shows which, said at once."""
    for url, says in (
        (secure.url.replace("https", "http"), "write https://"),
        (etcd.url.replace("http", "https"), "is it http there"),
    ):
        with closing(GrpcTransport([url], timeout=60)) as transport:
            for call in (lambda: transport.range(Range("a")), lambda: next(transport.watch(Watch("a")))):
                with pytest.raises(EtcdRejected, match=says) as error:
                    call()
                assert url in str(error.value)


# -- forks and gevent

_FORKING = """
import os, sys, threading, warnings
from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Put, Range, Txn, Watch
from celery_etcd_lock.exceptions import ConfigError

warnings.simplefilter("ignore")
url, mode = sys.argv[1:]
transport = connect(url, transport="grpc")
if mode == "used":
    transport.lease_renew(transport.lease_grant(60).lease)
    stream = transport.watch(Watch("forked"))
    next(stream)
    seen = []
    reading = threading.Thread(target=lambda: seen.extend(stream))
    reading.start()

def child(number):
    transport.txn(Txn([], [Put("forked", b"%d" % number)]))
    transport.lease_renew(transport.lease_grant(60).lease)
    own = transport.watch(Watch("other"))
    assert next(own).events == ()
    own.close()
    if mode == "used":
        assert list(stream) == []
        stream.close()
    if number % 2:
        transport.close()

for number in range(4):
    pid = os.fork()
    if pid == 0:
        try:
            child(number)
        except ConfigError as error:
            print(error, flush=True)
            os._exit(3)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        sys.exit(0) if number < 2 else os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
print(int(transport.range(Range("forked")).kvs[0].value))
if mode == "used":
    while sum(len(reply.events) for reply in seen) < 4:
        assert reading.is_alive()
    stream.close()
    reading.join(20)
    transport.close()
"""


def test_a_child_uses_what_its_parent_has_not(etcd: EtcdServer) -> None:
    """As in a prefork pool: made in the parent, used in the children, each with a channel of its own."""
    done = run(_FORKING, etcd.url, "unused")
    assert (done.returncode, done.stdout.split()) == (0, ["0", "0", "0", "0", "3"]), done.stderr


def test_a_child_of_a_parent_that_watches(etcd: EtcdServer) -> None:
    """Where gRPC prepares for forks the child starts over and ends cleanly, and the parent's watch goes on."""
    done = run(_FORKING, etcd.url, "used", GRPC_ENABLE_FORK_SUPPORT="1")
    assert (done.returncode, done.stdout.split()) == (0, ["0", "0", "0", "0", "3"]), done.stderr


def test_a_child_of_a_parent_that_used_it_is_told(etcd: EtcdServer, prefix: str) -> None:
    """Where it does not, every call in the child is an error that says what to do, and does not hang."""
    with closing(connect(etcd.url)) as gateway:
        gateway.txn(Txn([], [Put("forked", b"0")]))
    code = _FORKING.replace("while sum", "while False and sum")
    done = run(code, etcd.url, "used", GRPC_ENABLE_FORK_SUPPORT="")
    said = done.stdout.splitlines()
    assert (done.returncode, said[1:8:2]) == (0, ["3"] * 4), done.stderr
    assert all("take the gateway" in line for line in said[0:8:2])


def test_under_gevent(etcd: EtcdServer, prefix: str) -> None:
    """Locks, renewals and watches in greenlets, while other greenlets go on."""
    code = """
from gevent import monkey
monkey.patch_all()
import sys, gevent
from celery_etcd_lock.locks import Mutex, Session
url, name = sys.argv[1:]
turns = inside = most = 0

def spin():
    global turns
    while True:
        turns += 1
        gevent.sleep(0.01)

def work():
    global inside, most
    for _ in range(5):
        with Mutex(session, name).acquire(timeout=30):
            inside += 1
            most = max(most, inside)
            gevent.sleep(0.02)
            inside -= 1

spinning = gevent.spawn(spin)
with Session.open(url, ttl=2, transport="grpc") as session, Session.open(url, ttl=2, transport="grpc") as other:
    held = Mutex(other, name).acquire()
    working = [gevent.spawn(work) for _ in range(10)]
    before = turns
    gevent.sleep(4)
    waited = turns - before
    assert not session.lost and inside == 0, session.reason
    assert held.release() == "released"
    gevent.joinall(working, timeout=60, raise_error=True)
    assert all(each.successful() for each in working)
print(most, waited > 100)
spinning.kill()
"""
    pytest.importorskip("gevent", reason="gevent is not installed") if not os.environ.get("CI") else None
    done = run(code, etcd.url, f"{prefix}lock")
    assert (done.returncode, done.stdout.split()) == (0, ["1", "True"]), done.stderr
