"""One request and its answer on a socket: whatever an answer may look like, and what is none."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from celery_etcd_lock.etcd.http1 import Answer, exchange, head

HEAD = head("etcd:2379", {"Accept-Encoding": "identity"})


class Peer:
    """The other end of a socket: what it was asked, and what it is to answer, piece by piece."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()

    def answers(self, *pieces: bytes, ends: bool = False, timeout: float = 5.0) -> Answer:
        def answer() -> None:
            self.asked = self.theirs.recv(65_536)
            for piece in pieces:
                self.theirs.sendall(piece)
                time.sleep(0.005)  # so that they come one by one; nothing depends on it
            if ends:
                self.theirs.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            return exchange(self.ours, "/v3/kv/range", HEAD, '{"key":"YQ=="}', time.monotonic() + timeout)
        finally:
            thread.join()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.ours.close()
    made.theirs.close()


def test_what_is_sent(peer: Peer) -> None:
    """One POST with its length, its host and the headers."""
    peer.answers(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert peer.asked == (
        b"POST /v3/kv/range HTTP/1.1\r\nContent-Length: 14\r\nHost: etcd:2379\r\nAccept-Encoding: identity\r\n\r\n"
        b'{"key":"YQ=="}'
    )


def test_a_header_cannot_smuggle_another() -> None:
    """A token with a line break in it is no header."""
    with pytest.raises(ValueError, match="line break"):
        head("etcd", {"Authorization": "a\r\nX: y"})


ONE = b'HTTP/1.1 200 OK\r\ncontent-LENGTH: 4\r\n\r\n{"a"'
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n"
)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_in_pieces(peer: Peer, size: int) -> None:
    """With its length, in chunks, after a "continue", however it is cut; and the connection goes on."""
    for whole, body in ((ONE, b'{"a"'), (CHUNKED, b"abc0123456789"), (b"HTTP/1.1 100 Continue\r\n\r\n" + ONE, b'{"a"')):
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        assert peer.answers(*pieces) == Answer(200, body, True)


def test_the_end_of_the_connection_ends_an_answer_without_length(peer: Peer) -> None:
    """Such a connection is not used again."""
    assert peer.answers(b"HTTP/1.1 503 Busy\r\n\r\nto", b"morrow", ends=True) == Answer(503, b"tomorrow", False)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n",
    ],
)
def test_a_connection_that_is_not_used_again(peer: Peer, answer: bytes) -> None:
    """Because it says so, is of 1.0, or has more in it than was asked for."""
    assert peer.answers(answer) == Answer(200, b"{}", False)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", http.client.RemoteDisconnected),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", http.client.IncompleteRead),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{}", http.client.IncompleteRead),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", http.client.IncompleteRead),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", http.client.HTTPException),
        (b"\x15\x03\x01\x00\x02\x02", http.client.BadStatusLine),
        (b"HTTP/1.1 none\r\n\r\n", http.client.BadStatusLine),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, http.client.BadStatusLine),
    ],
)
def test_what_is_no_answer(peer: Peer, answer: bytes, error: type[Exception]) -> None:
    """The errors are those of http.client, by which `gateway_http` knows what to make of them."""
    with pytest.raises(error):
        peer.answers(answer, ends=True)


def test_the_whole_answer_must_come_in_time(peer: Peer) -> None:
    """Not each piece of it: one that trickles in is cut off."""
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        peer.answers(b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 60, timeout=0.1)
    assert time.monotonic() - began < 5
