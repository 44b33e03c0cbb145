"""One request and its answer over HTTP/1.1 on a socket that is connected, as lean as it can be. Opens none itself.

A lock is two small requests, and what a general HTTP library does around each (headers as objects, a parser made for
mail) took longer than etcd's answer. What an etcd member sends is simple: a status, a few headers, a body with its
length or in chunks. All else is an error of `http.client`'s, as that would raise it.
"""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Answer", "exchange", "head"]

_MOST = 65_536
"""Bytes of a status and its headers, and of one read."""

_BEGINS = b"HTTP/1."


class Answer(NamedTuple):
    """A status, a body, and whether the connection can be used again."""

    status: int
    body: bytes
    reusable: bool


def head(host: str, headers: Mapping[str, str]) -> bytes:
    """What stands in every request with these headers behind its first line. `ValueError` for a header that is none."""
    lines = [f"{name}: {value}" for name, value in {"Host": host, **headers}.items()]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header has a line break in it")
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1")


def exchange(sock: socket.socket, path: str, head: bytes, body: str, deadline: float) -> Answer:
    """POST `body`, ASCII, to `path`, and read the answer, until `deadline` on the monotonic clock.

    `OSError` (a `TimeoutError` among them) and `http.client.HTTPException` when there is none.
    """
    sock.settimeout(max(0.001, deadline - time.monotonic()))
    first = f"POST {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n".encode("ascii")
    sock.sendall(b"%b%b\r\n%b" % (first, head, body.encode("ascii")))
    reader = _Reader(sock, deadline)
    while True:
        status, headers = _parsed(reader.until(b"\r\n\r\n"))
        if status >= 200:
            break  # before it, only that it goes on
    goes_on = b"\r\nconnection:" not in headers or _field(headers, b"connection") != b"close"
    if b"\r\ntransfer-encoding:" in headers:
        return Answer(status, reader.chunks(), goes_on)
    length = _field(headers, b"content-length")
    if length is None and status not in {204, 304}:
        return Answer(status, reader.rest(), False)
    if length is not None and not length.isdigit():
        raise http.client.HTTPException(f"a length that is none: {length!r}")
    return Answer(status, reader.exactly(int(length or 0)), goes_on and not reader.left)


def _field(headers: bytes, name: bytes) -> bytes | None:
    _, found, rest = headers.partition(b"\r\n%b:" % name)
    return rest.partition(b"\r\n")[0].strip() if found else None


def _parsed(block: bytes) -> tuple[int, bytes]:
    """The status, and the headers in small letters."""
    first, _, headers = block.partition(b"\r\n")
    version, _, rest = first.partition(b" ")
    if not version.startswith(_BEGINS) or not rest[:3].isdigit():
        raise http.client.BadStatusLine(first.decode("latin-1"))
    # Of 1.0, which some proxies speak when they have nobody to ask, a connection ends with the answer.
    last = b"" if version == b"HTTP/1.1" else b"\r\nconnection: close"
    return int(rest[:3]), b"\r\n" + headers.lower() + last


class _Reader:
    """What has come on the socket and was not looked at."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.left = b""
        self._sock = sock
        self._deadline = deadline
        self._begun = False

    def _read(self, *, may_end: bool = False) -> bool:
        """Whether more has come. If not it was closed, which is an error unless it `may_end`."""
        if self._begun:
            self._sock.settimeout(max(0.001, self._deadline - time.monotonic()))
        self._begun = True
        more = self._sock.recv(_MOST)
        if not (more or may_end):
            if not self.left:
                raise http.client.RemoteDisconnected("the connection was closed without an answer")
            raise http.client.IncompleteRead(self.left)
        self.left += more
        return bool(more)

    def until(self, mark: bytes) -> bytes:
        while mark not in self.left:
            if len(self.left) >= _MOST or not _BEGINS.startswith(self.left[: len(_BEGINS)]):
                raise http.client.BadStatusLine(self.left[:_MOST].partition(b"\r\n")[0].decode("latin-1"))
            self._read()
        found, _, self.left = self.left.partition(mark)
        return found

    def exactly(self, length: int) -> bytes:
        while len(self.left) < length:
            self._read()
        found, self.left = self.left[:length], self.left[length:]
        return found

    def rest(self) -> bytes:
        while self._read(may_end=True):
            pass
        found, self.left = self.left, b""
        return found

    def line(self) -> bytes:
        while b"\r\n" not in self.left:
            if len(self.left) >= _MOST:
                raise http.client.LineTooLong("chunk size")
            self._read()
        found, _, self.left = self.left.partition(b"\r\n")
        return found

    def chunks(self) -> bytes:
        parts: list[bytes] = []
        while True:
            size = self.line().partition(b";")[0].strip()
            try:
                length = int(size, 16)
            except ValueError:
                raise http.client.IncompleteRead(b"".join(parts)) from None
            if not length:
                while self.line():
                    pass  # what stands behind the last chunk
                return b"".join(parts)
            parts.append(self.exactly(length))
            self.exactly(2)
