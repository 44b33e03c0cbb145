"""The proxy does what it says, to connections that are there and to new ones."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from celery_etcd_lock.testing import EtcdServer
from tests.safety.proxy import Proxy
from tests.workers import until

LONG = 20.0
"""Seconds for what will come: only a failure takes that long."""
SILENCE = 0.15
"""Seconds in which nothing comes: what should not come is there within a thousandth."""


class _Echo(socketserver.BaseRequestHandler):
    heard: list[bytes]

    def handle(self) -> None:
        while data := self.request.recv(65_536):
            self.heard.append(data)
            self.request.sendall(data.upper())


class Member:
    """Says everything back in capitals, and remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self._server = socketserver.ThreadingTCPServer(
            ("127.0.0.1", 0), type("Echo", (_Echo,), {"heard": self.heard}), bind_and_activate=True
        )
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def member() -> Iterator[Member]:
    made = Member()
    yield made
    made.close()


@pytest.fixture
def proxy(member: Member) -> Iterator[Proxy]:
    with Proxy(member.url) as made:
        yield made


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    """A connection on which something has been said and answered."""
    with connected(proxy) as sock:
        assert said(sock, b"hello") == b"HELLO"
        yield sock


def connected(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(proxy.url).port or 0), timeout=LONG)


def said(sock: socket.socket, data: bytes) -> bytes:
    sock.sendall(data)
    return sock.recv(100)


def is_silent(sock: socket.socket) -> bool:
    """Whether nothing comes, not even an end, for a while."""
    sock.settimeout(SILENCE)
    try:
        sock.recv(100)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(LONG)
    return False


def test_passes_on_until_told_otherwise(client: socket.socket, proxy: Proxy) -> None:
    """What is said goes through both ways, however much; and when the client hangs up, so does the proxy."""
    big = b"x" * 1_000_000
    threading.Thread(target=client.sendall, args=(big,)).start()
    answer = b""
    while len(answer) < len(big):
        answer += client.recv(65_536)
    assert answer == big.upper()
    assert proxy.connections == 1
    client.close()
    until(lambda: proxy.connections == 0)


def test_delays(client: socket.socket, proxy: Proxy, member: Member) -> None:
    """Each direction takes that much longer, or only one; told to pass on, it is quick again."""
    proxy.delay(0.1)
    began = time.monotonic()
    assert said(client, b"slow") == b"SLOW"
    assert time.monotonic() - began >= 0.2
    proxy.delay(LONG, "to_client")
    client.sendall(b"heard")
    until(lambda: member.heard[-1:] == [b"heard"])
    assert is_silent(client)
    proxy.reset()
    proxy.pass_on()
    with connected(proxy) as other:
        assert said(other, b"quick") == b"QUICK"


def test_drops_requests(client: socket.socket, proxy: Proxy, member: Member) -> None:
    """The member hears nothing, on that connection never again; a new one is well once the fault is over."""
    proxy.drop("to_member")
    client.sendall(b"lost")
    assert is_silent(client)
    proxy.pass_on()
    client.sendall(b"half open")
    assert is_silent(client)
    assert member.heard == [b"hello"]
    with connected(proxy) as other:
        assert said(other, b"new") == b"NEW"


def test_drops_replies(client: socket.socket, proxy: Proxy, member: Member) -> None:
    """The member hears, and its answer is lost."""
    proxy.drop("to_client")
    client.sendall(b"carried out")
    assert is_silent(client)
    assert member.heard == [b"hello", b"carried out"]


def test_drops_both_ways_on_new_connections(proxy: Proxy, member: Member) -> None:
    """Without a direction both are meant, and who comes meanwhile is accepted and lost."""
    proxy.drop()
    with connected(proxy) as sock:
        sock.sendall(b"lost")
        assert is_silent(sock)
    assert member.heard == []


def test_fades(client: socket.socket, proxy: Proxy, member: Member) -> None:
    """What was asked before is answered, late; what is asked now is not."""
    proxy.delay(SILENCE * 2, "to_client")
    client.sendall(b"before")
    until(lambda: member.heard[-1:] == [b"before"])
    proxy.fade(SILENCE * 2)
    client.sendall(b"now")
    assert client.recv(100) == b"BEFORE"
    assert is_silent(client)
    assert member.heard == [b"hello", b"before"]


def test_is_a_black_hole(client: socket.socket, proxy: Proxy, member: Member) -> None:
    """Nobody reads or answers, on new connections too; what was said meanwhile comes late."""
    proxy.black_hole()
    with connected(proxy) as other:
        for sock in (client, other):
            sock.sendall(b"late")
            assert is_silent(sock)
        assert member.heard == [b"hello"]
        proxy.pass_on()
        assert [client.recv(100), other.recv(100)] == [b"LATE", b"LATE"]


def test_a_black_hole_hears_nobody_hang_up(client: socket.socket, proxy: Proxy, member: Member) -> None:
    """A request whose sender has given up reaches the member all the same when the network is back."""
    proxy.black_hole()
    client.sendall(b"late")
    client.close()
    time.sleep(SILENCE)
    assert (member.heard, proxy.connections) == ([b"hello"], 1)
    proxy.pass_on()
    until(lambda: member.heard == [b"hello", b"late"])
    until(lambda: proxy.connections == 0)


def test_resets(client: socket.socket, proxy: Proxy) -> None:
    """Connections end with an RST, new ones too, until it is told to pass on."""
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(100)
    with pytest.raises(ConnectionResetError), connected(proxy) as other:
        said(other, b"anybody there?")
    until(lambda: proxy.connections == 0)
    proxy.pass_on()
    with connected(proxy) as other:
        assert said(other, b"again") == b"AGAIN"


def test_a_fault_reaches_who_waits_in_a_black_hole(client: socket.socket, proxy: Proxy) -> None:
    """One fault can follow another without a pause between them."""
    proxy.black_hole()
    client.sendall(b"late")
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(100)


def test_a_member_that_is_not_there(member: Member, proxy: Proxy) -> None:
    """Its clients are reset, and well again when it is back on its port."""
    with EtcdServer() as etcd, Proxy(etcd.url) as door:
        etcd.kill()
        with pytest.raises(ConnectionResetError), connected(door) as sock:
            said(sock, b"anybody there?")
        etcd.start()
        with connected(door) as sock:
            assert said(sock, b"GET /version HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200")


def test_close_ends_all(client: socket.socket, proxy: Proxy) -> None:
    """Whoever is connected is told, in a black hole too; closing twice does nothing."""
    proxy.black_hole()
    proxy.close()
    proxy.close()
    with contextlib.suppress(ConnectionResetError):  # if there were bytes that it had not read
        assert client.recv(100) == b""
