"""The gateway transport against members that die, stop, forget, refuse; and its sockets across forks."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import TLS, Delete, Put, Range, Txn, Watch, WatchReply, prefix_end
from celery_etcd_lock.etcd.gateway import GatewayTransport, GatewayWatch
from celery_etcd_lock.exceptions import AuthRejected, ConfigError, EtcdRejected, EtcdUnavailable, NoSpace
from celery_etcd_lock.testing import EtcdCluster, EtcdServer, ServerTLS
from tests.quota import until_full

pytestmark = pytest.mark.usefixtures("etcd")  # where there is none, nothing here can run


def http(body: bytes, status: str = "200 OK", kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


class Listener:
    """Something at `url` that listens and is no etcd: `answer` has each connection once a request came on it.

    Then it is closed. Without an `answer` it stays as it is. A context manager, for the URL.
    """

    def __init__(self, answer: Callable[[socket.socket], None] | None = None) -> None:
        self._answer = answer
        self._server = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> str:
        return f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        for sock in (self._server, *self._connections):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in (self._server, *self._connections):
            sock.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self._connections.append(connection)
                if self._answer:
                    thread = threading.Thread(target=self._serve, args=[connection, self._answer])
                    self._threads.append(thread)
                    thread.start()

    def _serve(self, connection: socket.socket, answer: Callable[[socket.socket], None]) -> None:
        with connection, suppress(OSError):
            request = b""
            while not _complete(request):
                more = connection.recv(65_536)
                if not more:
                    return
                request += more
            answer(connection)


def _complete(request: bytes) -> bool:
    head, end, body = request.partition(b"\r\n\r\n")
    length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(end) and len(body) >= int(length[0].split(b":")[1])


@pytest.fixture
def dead() -> str:
    """A URL where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def starting_at(transport: GatewayTransport, index: int) -> GatewayTransport:
    """The same, which would have begun with any endpoint, beginning with that one."""
    transport._cluster._current = index
    return transport


def follow(stream: GatewayWatch) -> tuple[WatchReply, threading.Thread, list[WatchReply | Exception]]:
    """The stream's first reply, a thread that reads on, and what it reads."""
    found: list[WatchReply | Exception] = []

    def read() -> None:
        try:
            found.extend(stream)
        except EtcdUnavailable as error:
            found.append(error)

    first = next(iter(stream))
    thread = threading.Thread(target=read)
    thread.start()
    return first, thread, found


# -- what cannot be meant


@pytest.mark.parametrize(
    ("endpoints", "says"),
    [
        ([], "write one like http://127.0.0.1:2379"),
        (["localhost:2379"], "write http://localhost:2379 or https://localhost:2379"),
        (["etcd"], "write http://etcd or"),
        (["etcd://host:2379"], "neither http nor https"),
        (["http://"], "names no host"),
        (["http://host:port"], "is no URL"),
        (["http://host:2379/v3"], "something behind host and port"),
        (["http://host:2379?x=y"], "something behind host and port"),
        (["http://a:2379", "memory://"], "neither http nor https"),
        (["http://user:secret@host:2379"], "set user name and password by themselves"),
        (["user:secret@host:2379"], "has no scheme"),
        (["http://user:secret@host:port"], "is no URL"),
    ],
)
def test_endpoints_are_checked(endpoints: list[str], says: str) -> None:
    """A URL that cannot be meant is an error that says what to write, and repeats no password."""
    with pytest.raises(ConfigError) as error:
        GatewayTransport(endpoints)
    assert says in str(error.value)
    assert "secret" not in str(error.value)


def test_options_are_checked(tmp_path: Path) -> None:
    """So are timeout, credentials and TLS files, before anything is sent."""
    url, secure = ["http://127.0.0.1:1"], ["https://127.0.0.1:1"]
    empty = tmp_path / "empty.pem"
    empty.touch()
    with pytest.raises(ConfigError, match="more than 0"):
        GatewayTransport(url, timeout=0)
    with pytest.raises(ConfigError, match="go together"):
        GatewayTransport(url, username="root")
    with pytest.raises(ConfigError, match="write https://"):
        GatewayTransport(url, tls=TLS())
    with pytest.raises(ConfigError, match="without a certfile"):
        GatewayTransport(secure, tls=TLS(keyfile="k.pem"))
    with pytest.raises(ConfigError, match=r"ca_certs file /no/such\.pem"):
        GatewayTransport(secure, tls=TLS(ca_certs="/no/such.pem"))
    with pytest.raises(ConfigError, match="ca_certs file"):
        GatewayTransport(secure, tls=TLS(ca_certs=str(empty)))
    with pytest.raises(ConfigError, match=r"certfile /no/such\.pem"):
        GatewayTransport(secure, tls=TLS(certfile="/no/such.pem"))


def test_endpoints_are_told_as_given(etcd: EtcdServer) -> None:
    """For messages, with the slash at the end; one given twice is asked once."""
    with closing(connect(f" {etcd.url}/, {etcd.url}")) as transport:
        assert transport.endpoints == (f"{etcd.url}/", etcd.url)
        assert len(transport.status()) == 1
        assert repr(transport) == f"<GatewayTransport {etcd.url}/,{etcd.url}>"


# -- members that fail


def test_nobody_there_ends_the_call_at_once(dead: str) -> None:
    """Refused everywhere: no waiting for the timeout, and nothing can have been carried out."""
    begun = time.monotonic()
    with closing(GatewayTransport([dead], timeout=60)) as transport:
        for call in (
            lambda: transport.range(Range("a")),
            lambda: next(iter(transport.watch(Watch("a")))),
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
        closing(GatewayTransport(["http://no-such-host.invalid:2379"], timeout=60)) as transport,
        pytest.raises(EtcdUnavailable) as error,
    ):
        transport.range(Range("a"))
    assert not error.value.unanswered


def test_failover_from_a_dead_endpoint(etcd: EtcdServer, dead: str, prefix: str) -> None:
    """The next one is asked, and asked first from then on; nothing was left unanswered."""
    with closing(starting_at(GatewayTransport([dead, etcd.url]), 0)) as transport:
        assert not transport.txn(Txn([], [Put(prefix, b"")])).header.unanswered
        before = transport.requests
        transport.range(Range(prefix))
        assert transport.requests == before + 1
        assert [status.endpoint for status in transport.status()] == [etcd.url]
        stream = starting_at(transport, 0).watch(Watch(prefix))
        assert next(iter(stream)).events == ()
        stream.close()


def test_a_member_that_comes_back(prefix: str) -> None:
    """After a restart of the server the same transport goes on, in spite of its old connections."""
    with EtcdServer() as server, closing(GatewayTransport([server.url], timeout=20)) as transport:
        transport.txn(Txn([], [Put(prefix, b"v")]))
        server.kill()
        with pytest.raises(EtcdUnavailable):
            transport.range(Range(prefix))
        server.start()
        assert transport.range(Range(prefix)).kvs[0].value == b"v"


def test_a_stopped_member_does_not_hold_up_the_others(prefix: str) -> None:
    """SIGSTOP, one of three: reads, writes, renewals and new watches go on within the timeout; old watches end."""
    with EtcdCluster() as cluster, closing(GatewayTransport(cluster.endpoints, timeout=6)) as transport:
        stopped = next(member for member in cluster.members if member is not cluster.leader())
        index = cluster.members.index(stopped)
        lease = transport.lease_grant(60).lease
        stream = starting_at(transport, index).watch(Watch(prefix, prefix_end(prefix)))
        _, reading, found = follow(stream)
        stopped.pause()

        begun = time.monotonic()
        done = starting_at(transport, index).txn(Txn([], [Put(prefix + "a", b"", lease)]))
        assert time.monotonic() - begun < 6 + 2
        assert done.succeeded
        assert done.header.unanswered
        reading.join(20)
        assert isinstance(found[-1], EtcdUnavailable)
        assert stopped.url in str(found[-1])

        calls: list[Callable[[], object]] = [
            lambda: transport.range(Range(prefix + "a")),
            lambda: transport.lease_renew(lease),
            lambda: next(iter(fresh)),
            lambda: transport.delete(Delete(prefix + "a")),
        ]
        fresh = transport.watch(Watch(prefix))
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


def test_a_leader_that_dies(prefix: str) -> None:
    """The call outlives the election: it is tried until it is answered."""
    with EtcdCluster() as cluster, closing(GatewayTransport(cluster.endpoints, timeout=30)) as transport:
        transport.txn(Txn([], [Put(prefix, b"1")]))
        cluster.leader().kill()
        assert transport.txn(Txn([], [Put(prefix, b"2")])).succeeded
        assert transport.range(Range(prefix)).kvs[0].value == b"2"
        assert len(transport.status()) == 2


def test_a_member_without_a_majority_says_so(prefix: str) -> None:
    """With the others stopped the last one answers, but there is nobody to ask: `EtcdUnavailable` in time."""
    with EtcdCluster() as cluster, closing(GatewayTransport([cluster.members[0].url], timeout=3)) as transport:
        for member in cluster.members[1:]:
            member.pause()
        begun = time.monotonic()
        with pytest.raises(EtcdUnavailable):
            transport.txn(Txn([], [Put(prefix, b"")]))
        assert time.monotonic() - begun < 9


# -- what may have been carried out


@pytest.mark.parametrize(
    "answer",
    [
        None,
        lambda connection: None,
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Le"),
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"),
        lambda connection: connection.sendall(b"-ERR unknown command 'POST'\r\n"),
        lambda connection: connection.sendall(http(b"")),
        lambda connection: connection.sendall(http(b"", "400 Bad Request")),
        lambda connection: connection.sendall(http(b"<h1>down</h1>", "502 Bad Gateway", "text/html")),
        lambda connection: connection.sendall(
            http(b'{"code":14,"message":"etcdserver: request timed out"}', "503 Service Unavailable")
        ),
    ],
    ids=["never", "closes", "half a head", "half a body", "no HTTP", "empty", "empty 400", "proxy", "timed out"],
)
def test_a_request_without_an_answer(
    answer: Callable[[socket.socket], None] | None, etcd: EtcdServer, prefix: str
) -> None:
    """It may have been carried out: the error says so, and so does the reply that another endpoint gives."""
    with Listener(answer) as url:
        with closing(GatewayTransport([url], timeout=1)) as transport:
            begun = time.monotonic()
            with pytest.raises(EtcdUnavailable, match=url) as error:
                transport.txn(Txn([], [Put(prefix, b"")]))
            assert error.value.unanswered
            assert time.monotonic() - begun < 4
        with closing(starting_at(GatewayTransport([url, etcd.url]), 0)) as transport:
            assert transport.txn(Txn([], [Put(prefix, b"")])).header.unanswered
            assert not transport.txn(Txn([], [Put(prefix, b"")])).header.unanswered


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("503 Service Unavailable", b'{"code":14,"message":"etcdserver: no leader"}'),
        ("500 Internal Server Error", b'{"error":"not a primary lessor","message":"not a primary lessor","code":2}'),
        ("429 Too Many Requests", b'{"code":8,"message":"etcdserver: too many requests"}'),
        ("200 OK", b'{"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader"}}\n'),
    ],
)
def test_what_the_member_surely_did_not_do(status: str, error: bytes, etcd: EtcdServer, prefix: str) -> None:
    """Errors of the moment are tried elsewhere, and count as answered."""
    with (
        Listener(lambda connection: connection.sendall(http(error, status))) as url,
        closing(starting_at(GatewayTransport([url, etcd.url]), 0)) as transport,
    ):
        assert not transport.txn(Txn([], [Put(prefix, b"")])).header.unanswered


def test_a_refusal_after_silence_is_not_the_last_word(etcd: EtcdServer, prefix: str) -> None:
    """One member is silent, the next says no: the first may yet say yes, so it counts as unanswered."""
    with Listener() as url, closing(starting_at(GatewayTransport([url, etcd.url], timeout=3), 0)) as transport:
        with pytest.raises(EtcdUnavailable, match="duplicate key") as error:
            transport.txn(Txn([], [Put(prefix, b""), Put(prefix, b"")]))
        assert error.value.unanswered
        with pytest.raises(EtcdRejected, match="duplicate key"):
            transport.txn(Txn([], [Put(prefix, b""), Put(prefix, b"")]))


def test_a_call_ends_in_time_whatever_happens() -> None:
    """The timeout bounds the call over all endpoints, and a timeout of the call's own goes before."""
    with Listener() as one, Listener() as two, closing(GatewayTransport([one, two], timeout=60)) as transport:
        for timeout in (0.01, 0.5):
            begun = time.monotonic()
            with pytest.raises(EtcdUnavailable):
                transport.range(Range("a"), timeout=timeout)
            assert time.monotonic() - begun < timeout + 3
        with pytest.raises(EtcdUnavailable) as error:
            transport.range(Range("a"), timeout=0)
        assert not error.value.unanswered


def test_a_database_without_space(prefix: str) -> None:
    """`NoSpace`, with the way out; a delete still succeeds."""
    with (
        EtcdServer(extra_args=["--quota-backend-bytes=1000000"]) as server,
        closing(GatewayTransport([server.url])) as transport,
    ):
        transport.txn(Txn([], [Put(prefix, b"v")]))
        full = until_full(transport)
        assert "etcdctl alarm disarm" in str(full)
        assert not full.unanswered
        with pytest.raises(NoSpace):
            transport.lease_grant(60)
        assert transport.delete(Delete(prefix)).deleted == 1


def test_after_close() -> None:
    """A closed transport opens nothing again."""
    with Listener() as url:
        transport = GatewayTransport([url])
        transport.close()
        with pytest.raises(EtcdUnavailable, match="closed"):
            transport.range(Range("a"))
        assert list(transport.watch(Watch("a"))) == []
        assert transport.requests == 0


# -- what is not etcd


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (http(b"<html><body>Welcome to nginx</body></html>", kind="text/html"), "Welcome to nginx"),
        (http(b'{"hello":"world"}'), "is this etcd's client URL?"),
        (http(b"[1]"), "is this etcd's client URL?"),
        (http(b"404 page not found\n", "404 Not Found", "text/plain"), "--enable-grpc-gateway=false"),
        (http(b'{"code":5, "message":"Not Found"}', "404 Not Found"), "--enable-grpc-gateway=false"),
        (http(b"", "302 Found"), ""),
        (http(b"Client sent an HTTP request to an HTTPS server.\n", "400 Bad Request", "text/plain"), "write https://"),
    ],
)
def test_something_else_that_speaks_http(answer: bytes, says: str, etcd: EtcdServer, prefix: str) -> None:
    """Said at once, with the endpoint and what to check; another endpoint is asked all the same."""
    with Listener(lambda connection: connection.sendall(answer)) as url:
        if says:
            with closing(GatewayTransport([url], timeout=60)) as transport:
                with pytest.raises(EtcdRejected) as error:
                    transport.range(Range(prefix))
                assert url in str(error.value)
                assert says in str(error.value)
        with closing(starting_at(GatewayTransport([url, etcd.url]), 0)) as transport:
            assert transport.range(Range(prefix)).kvs == ()


def test_the_gateway_switched_off() -> None:
    """etcd without its gateway is said to be that."""
    with (
        EtcdServer(extra_args=["--enable-grpc-gateway=false"]) as server,
        closing(GatewayTransport([server.url], timeout=60)) as transport,
        pytest.raises(EtcdRejected, match="--enable-grpc-gateway=false"),
    ):
        transport.range(Range("a"))


# -- watches on the wire


def test_messages_split_and_merged() -> None:
    """A message is a line, however the chunks fall."""
    created = b'{"result":{"header":{"revision":"7"},"created":true}}\n'
    events = b"".join(
        b'{"result":{"header":{"revision":"%d"},"events":[{"kv":{"key":"YQ==","mod_revision":"%d"}}]}}\n' % (n, n)
        for n in (8, 9, 10)
    )
    last = b'{"result":{"header":{"revision":"11"},"events":[{"type":"DELETE","kv":{"key":"YQ=="}}]}}\n'

    def answer(connection: socket.socket) -> None:
        connection.sendall(CHUNKED + chunk(created[:10]))
        connection.sendall(chunk(created[10:] + events[:100]))
        connection.sendall(chunk(events[100:] + last[:-1]))
        connection.sendall(chunk(last[-1:]))
        for byte in created:
            connection.sendall(chunk(bytes([byte])))
        connection.sendall(b"0\r\n\r\n")

    with Listener(answer) as url, closing(GatewayTransport([url])) as transport:
        stream = iter(transport.watch(Watch("a")))
        replies = [next(stream) for _ in range(6)]
        with pytest.raises(EtcdUnavailable, match="ended"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)
    assert [reply.header.revision for reply in replies] == [7, 8, 9, 10, 11, 7]
    assert [len(reply.events) for reply in replies] == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    "message",
    [
        b'{"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader","http_status":"x"}}\n',
        b'{"result":{"header":{"revision":"8"},"canceled":true,"cancel_reason":"etcdserver: no leader"}}\n',
        b'{"result":{"header":{"revision":"8"},"canceled":true}}\n',
        b"",
    ],
)
def test_a_watch_that_the_server_ends(message: bytes) -> None:
    """An error, a cancellation, the end of the stream: `EtcdUnavailable`, and nothing that may happen late."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(CHUNKED + chunk(b'{"result":{"header":{"revision":"7"},"created":true}}\n'))
        if message:
            connection.sendall(chunk(message))

    with Listener(answer) as url, closing(GatewayTransport([url])) as transport:
        stream = iter(transport.watch(Watch("a")))
        assert next(stream).header.revision == 7
        with pytest.raises(EtcdUnavailable, match=url) as error:
            next(stream)
        assert not error.value.unanswered


def test_a_watch_that_is_never_confirmed() -> None:
    """The first reply has the transport's timeout; `close` does not wait for it."""
    with Listener() as url:
        with closing(GatewayTransport([url], timeout=0.5)) as transport, pytest.raises(EtcdUnavailable):
            next(iter(transport.watch(Watch("a"))))
        with closing(GatewayTransport([url], timeout=60)) as transport:
            stream = transport.watch(Watch("a"))
            reading = threading.Thread(target=list, args=[stream])
            reading.start()
            while not transport._cluster.endpoints[0].streams:
                time.sleep(0.01)
            stream.close()
            reading.join(20)
            assert not reading.is_alive()


def test_a_quiet_watch_stays(etcd: EtcdServer, prefix: str) -> None:
    """Longer than the timeout without news is no failure."""
    with closing(GatewayTransport([etcd.url], timeout=0.3)) as transport:
        _, reading, found = follow(stream := transport.watch(Watch(prefix)))
        reading.join(1)
        assert reading.is_alive()
        transport.txn(Txn([], [Put(prefix, b"v")]), timeout=5)
        while not found:
            time.sleep(0.01)
        stream.close()
        reading.join(20)
        (reply,) = found
        assert isinstance(reply, WatchReply)
        assert reply.events[0].kv.value == b"v"


def test_a_member_that_dies_under_a_watch(prefix: str) -> None:
    """The stream breaks, and says so."""
    with EtcdServer() as server, closing(GatewayTransport([server.url])) as transport:
        _, reading, found = follow(transport.watch(Watch(prefix)))
        server.kill()
        reading.join(20)
        assert isinstance(found[-1], EtcdUnavailable)


# -- user and password


def etcdctl(server: EtcdServer, *args: str, typing: str = "") -> None:
    assert server.etcdctl
    command = [str(server.etcdctl), "--endpoints", server.url, *args]
    subprocess.run(command, check=True, capture_output=True, input=typing, text=True)


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdServer]:
    """A server with users: root may do everything, limited nothing. Tokens live for two seconds."""
    with EtcdServer(extra_args=["--auth-token-ttl=2", "--bcrypt-cost=4"]) as server:
        etcdctl(server, "user", "add", "root:correct-horse")
        etcdctl(server, "user", "grant-role", "root", "root")
        etcdctl(server, "user", "add", "limited:battery")
        etcdctl(server, "auth", "enable")
        yield server


def test_logging_in(guarded: EtcdServer, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    """Once, before the first call; and neither password nor token is shown to anybody."""
    caplog.set_level(logging.DEBUG)
    with closing(GatewayTransport([guarded.url], username="root", password="correct-horse")) as transport:
        assert transport.txn(Txn([], [Put(prefix, b"v")])).succeeded
        assert transport.requests == 2
        assert transport.range(Range(prefix)).kvs[0].value == b"v"
        assert transport.requests == 3
        assert transport._cluster._headers
        token = transport._cluster._headers["Authorization"]
        assert token
        assert transport.lease_renew(transport.lease_grant(60).lease).ttl == 60
        assert transport.status()
        for text in (repr(transport), repr(transport._cluster), caplog.text):
            assert "correct-horse" not in text
            assert token not in text


def test_one_login_for_all_threads(guarded: EtcdServer, prefix: str) -> None:
    """Whoever comes while one logs in waits for it."""
    with closing(GatewayTransport([guarded.url], username="root", password="correct-horse")) as transport:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: transport.range(Range(prefix)), range(8)))
        assert transport.requests == 9


@pytest.mark.parametrize("why", ["expired", "revoked", "garbage"])
def test_a_token_that_is_no_good_any_more(guarded: EtcdServer, prefix: str, why: str) -> None:
    """Expired, revoked by a change of password, unknown: log in again, and nobody notices."""
    with closing(GatewayTransport([guarded.url], username="root", password="correct-horse")) as transport:
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
                transport._cluster._headers = {**token, "Authorization": "nonsense.1"}
            before = transport.requests
            if verb == "call":
                assert transport.range(Range(prefix)).kvs == ()
            else:
                stream = transport.watch(Watch(prefix))
                assert next(iter(stream)).events == ()
                stream.close()
            assert transport.requests == before + 3


def test_a_restarted_server_forgets_its_tokens(prefix: str) -> None:
    """So the next call logs in again."""
    with EtcdServer(extra_args=["--bcrypt-cost=4"]) as server:
        etcdctl(server, "user", "add", "root:correct-horse")
        etcdctl(server, "user", "grant-role", "root", "root")
        with closing(GatewayTransport([server.url], username="root", password="correct-horse")) as transport:
            transport.txn(Txn([], [Put(prefix, b"before there is auth")]))
            etcdctl(server, "auth", "enable")
            assert transport.range(Range(prefix)).count == 1
            server.stop()
            server.start()
            assert transport.range(Range(prefix), timeout=20).count == 1


def test_credentials_that_are_wrong(guarded: EtcdServer, prefix: str) -> None:
    """`AuthRejected` at once: a wrong password, no user at all, a user who may not."""
    with closing(GatewayTransport([guarded.url], timeout=60, username="root", password="wrong-horse")) as transport:
        for call in (lambda: transport.range(Range(prefix)), lambda: next(iter(transport.watch(Watch(prefix))))):
            with pytest.raises(AuthRejected, match="does not accept user 'root'") as error:
                call()
            assert "wrong-horse" not in str(error.value)
    with closing(GatewayTransport([guarded.url], timeout=60)) as transport:
        for call in (lambda: transport.range(Range(prefix)), lambda: next(iter(transport.watch(Watch(prefix))))):
            with pytest.raises(AuthRejected, match="set etcd's user name and password"):
                call()
    with closing(GatewayTransport([guarded.url], timeout=60, username="limited", password="battery")) as transport:
        for call in (lambda: transport.range(Range(prefix)), lambda: next(iter(transport.watch(Watch(prefix))))):
            with pytest.raises(AuthRejected, match="permission denied"):
                call()


# -- TLS


class Certificates:
    """A certificate authority, and what it signed, in a directory; made with the openssl program."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        folder.mkdir()
        self.ca = str(folder / "ca.crt")
        usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]  # Python 3.13 insists on it
        self._openssl("req", "-x509", *self._new_key("ca"), *usage, "-subj", f"/CN={name}", "-out", "ca.crt")

    def _openssl(self, *args: str) -> None:
        subprocess.run(["openssl", *args], cwd=self.folder, check=True, capture_output=True)

    def _new_key(self, name: str) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]

    def signed(self, name: str, subject: str, hosts: str = "IP:127.0.0.1", *, days: int = 2) -> tuple[str, str]:
        """Certificate and key, as paths."""
        (self.folder / "extensions").write_text(
            f"subjectAltName={hosts}\nextendedKeyUsage=serverAuth,clientAuth\nauthorityKeyIdentifier=keyid\n"
        )
        self._openssl("req", *self._new_key(name), "-subj", subject, "-out", f"{name}.csr")
        signer = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", str(days), "-extfile", "extensions"]
        self._openssl("x509", "-req", "-in", f"{name}.csr", *signer, "-out", f"{name}.crt")
        return str(self.folder / f"{name}.crt"), str(self.folder / f"{name}.key")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls") / "ours", "ours")


@pytest.fixture(scope="module")
def secure(certificates: Certificates) -> Iterator[EtcdServer]:
    """A server with a certificate."""
    with EtcdServer(tls=ServerTLS(*certificates.signed("server", "/O=etcd"))) as server:
        yield server


@pytest.fixture(scope="module")
def mutual(certificates: Certificates) -> Iterator[EtcdServer]:
    """A server that wants one of its clients too."""
    with EtcdServer(tls=ServerTLS(*certificates.signed("server2", "/O=etcd"), certificates.ca)) as server:
        yield server


def test_tls(secure: EtcdServer, certificates: Certificates, prefix: str) -> None:
    """Requests and watches, and a watch's close from another thread."""
    with closing(GatewayTransport([secure.url], tls=TLS(ca_certs=certificates.ca))) as transport:
        transport.txn(Txn([], [Put(prefix, b"v")]))
        assert transport.range(Range(prefix)).kvs[0].value == b"v"
        first, reading, found = follow(stream := transport.watch(Watch(prefix)))
        assert first.events == ()
        transport.delete(Delete(prefix))
        while not found:
            time.sleep(0.01)
        stream.close()
        reading.join(20)
        assert not reading.is_alive()
        assert [type(each) for each in found] == [WatchReply]


def test_mutual_tls(mutual: EtcdServer, certificates: Certificates, prefix: str) -> None:
    """With a client certificate; without one, an error that says so."""
    certfile, keyfile = certificates.signed("client", "/O=client")
    with closing(GatewayTransport([mutual.url], tls=TLS(certificates.ca, certfile, keyfile))) as transport:
        transport.txn(Txn([], [Put(prefix, b"v")]))
        stream = transport.watch(Watch(prefix))
        assert next(iter(stream)).events == ()
        stream.close()
    with closing(GatewayTransport([mutual.url], timeout=60, tls=TLS(certificates.ca))) as transport:
        with pytest.raises(AuthRejected, match=r"(asks for a|refuses our) client certificate") as error:
            transport.range(Range(prefix))
        assert mutual.url in str(error.value)


def test_a_common_name_is_no_user(certificates: Certificates, prefix: str) -> None:
    """etcd's gateway refuses client certificates with a common name once there are users: the error says so."""
    tls = TLS(certificates.ca, *certificates.signed("named", "/CN=root"))
    server_tls = ServerTLS(*certificates.signed("server3", "/O=etcd"), certificates.ca)
    with EtcdServer(tls=server_tls, extra_args=["--bcrypt-cost=4"]) as server:
        assert tls.certfile
        assert tls.keyfile
        files = ["--cacert", certificates.ca, "--cert", tls.certfile, "--key", tls.keyfile]
        etcdctl(server, *files, "user", "add", "root:correct-horse")
        etcdctl(server, *files, "user", "grant-role", "root", "root")
        etcdctl(server, *files, "auth", "enable")
        with closing(GatewayTransport([server.url], timeout=60, tls=tls)) as transport:
            for call in (lambda: transport.range(Range(prefix)), lambda: next(iter(transport.watch(Watch(prefix))))):
                with pytest.raises(AuthRejected, match="use a certificate without one"):
                    call()


def test_a_certificate_that_cannot_be_trusted(secure: EtcdServer, certificates: Certificates, tmp_path: Path) -> None:
    """Of another authority, of nobody known, for another host: `AuthRejected`, at once; unless told not to look."""
    other = Certificates(tmp_path / "others", "others")
    for tls in (TLS(ca_certs=other.ca), TLS(), None, TLS(ca_certs=other.ca, cert_reqs="optional")):
        with closing(GatewayTransport([secure.url], timeout=60, tls=tls)) as transport:
            for call in (lambda: transport.range(Range("a")), lambda: next(iter(transport.watch(Watch("a"))))):
                with pytest.raises(AuthRejected, match="check ca_certs") as error:
                    call()
                assert secure.url in str(error.value)
    with EtcdServer(tls=ServerTLS(*certificates.signed("elsewhere", "/O=etcd", "DNS:elsewhere.test"))) as server:
        with (
            closing(GatewayTransport([server.url], timeout=60, tls=TLS(ca_certs=certificates.ca))) as transport,
            pytest.raises(AuthRejected, match="host name"),
        ):
            transport.range(Range("a"))
        with closing(GatewayTransport([server.url], tls=TLS(cert_reqs="none"))) as transport:
            assert transport.range(Range("a")).kvs == ()


def test_one_bad_certificate_among_good_ones(
    secure: EtcdServer, certificates: Certificates, tmp_path: Path, prefix: str
) -> None:
    """The endpoint is passed over, and nothing counts as unanswered."""
    other = Certificates(tmp_path / "others", "others")
    with (
        EtcdServer(tls=ServerTLS(*other.signed("server", "/O=etcd"))) as bad,
        closing(GatewayTransport([bad.url, secure.url], tls=TLS(ca_certs=certificates.ca))) as transport,
    ):
        assert not starting_at(transport, 0).txn(Txn([], [Put(prefix, b"")])).header.unanswered


def test_http_to_a_tls_port(secure: EtcdServer) -> None:
    """The member hangs up, and a closer look shows why: said at once."""
    url = secure.url.replace("https", "http")
    with closing(GatewayTransport([url], timeout=60)) as transport:
        for call in (lambda: transport.range(Range("a")), lambda: next(iter(transport.watch(Watch("a"))))):
            with pytest.raises(EtcdRejected, match="write https://") as error:
                call()
            assert url in str(error.value)


def test_tls_to_an_http_port(etcd: EtcdServer) -> None:
    """No handshake, and a closer look shows that it speaks plain HTTP: said at once."""
    url = etcd.url.replace("http", "https")
    with closing(GatewayTransport([url], timeout=60)) as transport:
        for call in (lambda: transport.range(Range("a")), lambda: next(iter(transport.watch(Watch("a"))))):
            with pytest.raises(EtcdRejected, match="is it http there") as error:
                call()
            assert url in str(error.value)


def test_tls_to_what_answers_in_plain() -> None:
    """What answers a handshake in plain text speaks no TLS: said at once."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1)
                    connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    url = f"https://127.0.0.1:{server.getsockname()[1]}"
    with closing(GatewayTransport([url], timeout=60)) as transport:
        for call in (lambda: transport.range(Range("a")), lambda: next(iter(transport.watch(Watch("a"))))):
            with pytest.raises(EtcdRejected, match="is it http there") as error:
                call()
            assert url in str(error.value)
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


# -- forks


def in_a_child(work: Callable[[], None]) -> None:
    """Run `work` in a forked process; fails as it does."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["plain", "TLS"])
def test_forks(kind: str, request: pytest.FixtureRequest, certificates: Certificates, prefix: str) -> None:
    """A child uses the transport while its parent watches and sends: neither gets what is the other's."""
    server: EtcdServer = request.getfixturevalue("secure" if kind == "TLS" else "etcd")
    tls = TLS(ca_certs=certificates.ca) if kind == "TLS" else None
    stop = threading.Event()

    def parent_sends() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            transport.txn(Txn([], [Put(f"{prefix}parent", str(number).encode())]))
            assert transport.range(Range(f"{prefix}parent")).kvs[0].value == str(number).encode()

    with closing(GatewayTransport([server.url], tls=tls)) as transport, ThreadPoolExecutor(2) as threads:
        transport.txn(Txn([], [Put(prefix, b"")]))
        _, reading, found = follow(stream := transport.watch(Watch(f"{prefix}child")))
        sending = [threads.submit(parent_sends) for _ in range(1)]

        def child() -> None:
            for number in range(5):
                value = str(number).encode()
                transport.txn(Txn([], [Put(f"{prefix}child", value)]))
                assert transport.range(Range(f"{prefix}child")).kvs[0].value == value
            own = transport.watch(Watch(prefix))
            assert next(iter(own)).events == ()
            own.close()
            assert list(stream) == []
            stream.close()
            transport.close()
            transport.close()

        for _ in range(10):
            in_a_child(child)
        stop.set()
        for done in sending:
            done.result(20)
        while sum(len(each.events) for each in found if isinstance(each, WatchReply)) < 50:
            assert reading.is_alive()
            time.sleep(0.01)
        stream.close()
        reading.join(20)
        assert not any(isinstance(each, Exception) for each in found)
        assert transport.range(Range(prefix)).count == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_keeps_no_descriptor_of_its_parent(etcd: EtcdServer, prefix: str) -> None:
    """Idle connections and watches of the parent are closed in the child, and work on in the parent."""
    with closing(GatewayTransport([etcd.url])) as transport:
        transport.range(Range(prefix))
        _, reading, found = follow(stream := transport.watch(Watch(prefix)))
        before = transport.requests
        sockets = _sockets()
        assert sockets

        def child() -> None:
            assert not sockets & _sockets()

        in_a_child(child)
        transport.txn(Txn([], [Put(prefix, b"")]))
        assert transport.requests == before + 1
        while not found:
            assert reading.is_alive()
            time.sleep(0.01)
        stream.close()
        reading.join(20)


def _sockets() -> set[str]:
    """The inodes of the sockets this process is connected by."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found
