"""One etcd member's URL as sockets: a pool for requests, and a connection of its own for each stream.

All that can go wrong on a connection comes out as `NoAnswer`, which knows whether the request can have
reached anybody: connecting is a step of its own, and what fails before it is done was not sent.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import socket
import ssl
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from urllib3.connection import HTTPConnection, HTTPSConnection

from celery_etcd_lock.etcd import diagnosis, http1
from celery_etcd_lock.etcd.api import TLS
from celery_etcd_lock.etcd.gateway_codec import NoAnswer, judge
from celery_etcd_lock.exceptions import ConfigError

__all__ = ["Endpoint", "Stream", "checked_url", "tls_context"]

_IDLE_CONNECTIONS = 128
"""Kept for the next request; more may be open at once."""

_TLS_ALERT = "\x15\x03"

_KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
]


def checked_url(url: str) -> str:
    """`url` without a slash at its end; `ConfigError` unless it is http(s)://HOST[:PORT]."""
    example = "write it like http://127.0.0.1:2379"
    if "://" not in url:
        shown = url.rpartition("@")[2]
        raise ConfigError(f"the etcd endpoint {shown!r} has no scheme: write http://{shown} or https://{shown}")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"the etcd endpoint {url.rpartition('@')[2]!r} is no URL ({error}): {example}") from None
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc:
        raise ConfigError(
            f"the etcd endpoint {shown} was given with a user or password inside the URL, where Celery would show "
            "them: write the URL without, and set user name and password by themselves"
        )
    if parts.scheme not in {"http", "https"}:
        raise ConfigError(f"the etcd endpoint {shown} has a scheme that is neither http nor https: {example}")
    if not parts.hostname:
        raise ConfigError(f"the etcd endpoint {shown} names no host: {example}")
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise ConfigError(f"the etcd endpoint {shown} has something behind host and port: {example}")
    return f"{parts.scheme}://{parts.netloc}"


def tls_context(tls: TLS) -> ssl.SSLContext:
    """Made from the files of `tls`; `ConfigError` if one cannot be used."""
    if tls.keyfile and not tls.certfile:
        raise ConfigError(f"TLS has a keyfile ({tls.keyfile}) without a certfile: set both")
    try:
        context = ssl.create_default_context(cafile=tls.ca_certs)
    except OSError as error:
        raise ConfigError(f"TLS: the ca_certs file {tls.ca_certs} cannot be used: {error}") from error
    if tls.certfile:
        try:
            context.load_cert_chain(tls.certfile, tls.keyfile, password=lambda: "")
        except OSError as error:
            both = f"{tls.certfile} and keyfile {tls.keyfile}" if tls.keyfile else tls.certfile
            raise ConfigError(
                f"TLS: the certfile {both} cannot be used: {error} (a key with a pass phrase is not supported)"
            ) from error
    if tls.cert_reqs == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class _NotConnectedError(Exception):
    """Its cause says why. Not an OSError, so that urllib3 lets it through as it is."""


class _Connection(HTTPConnection):
    _silence: select.poll | None = None

    def connect(self) -> None:
        try:
            super().connect()
        except Exception as error:
            raise _NotConnectedError from error

    def hung_up(self) -> bool:
        """Whether the other side has ended it. Between two requests it has nothing else to say."""
        if self._silence is None:
            self._silence = select.poll()
            self._silence.register(self.sock, select.POLLIN)
        return bool(self._silence.poll(0))


class _TLSConnection(_Connection, HTTPSConnection):
    def connect(self) -> None:
        """As urllib3's own, but for the checks, which are `ssl`'s alone: 1.26 knows no context that checks an IP."""
        assert self.ssl_context
        try:
            plain = self._new_conn()
            try:
                self.sock = self.ssl_context.wrap_socket(plain, server_hostname=self.host)
            except BaseException:
                plain.close()
                raise
        except Exception as error:
            raise _NotConnectedError from error
        self.is_verified = True  # or not, because the user said so: no warning at every request


class Endpoint:
    """The member at `url`; shared by threads."""

    def __init__(self, url: str, context: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        self.url = url
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.context = context if parts.scheme == "https" else None
        self.streams: set[Stream] = set()
        self._authority = parts.netloc
        self._closed = False
        self._idle: deque[_Connection] = deque()
        weakref.finalize(self, _close_all, self._idle)  # of who forgets to close it
        self._head: tuple[Mapping[str, str], bytes] | None = None

    def _connected(self, timeout: float) -> _Connection:
        """A connection: one that is kept and was not hung up on meanwhile, or a new one."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            if not connection.hung_up():
                return connection
            connection.close()
        options = [*HTTPConnection.default_socket_options, *_KEEPALIVE]
        if self.context:
            secure = _TLSConnection(self.host, self.port, timeout=timeout, socket_options=options)
            secure.ssl_context = self.context
            connection = secure
        else:
            connection = _Connection(self.host, self.port, timeout=timeout, socket_options=options)
        connection.connect()
        return connection

    def _keep(self, connection: _Connection) -> None:
        """For the next request."""
        if len(self._idle) < _IDLE_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.close()
        if self._closed:
            _close_all(self._idle)

    def _head_of(self, headers: Mapping[str, str]) -> bytes:
        known = self._head
        if known is None or known[0] is not headers:
            known = self._head = (headers, http1.head(self._authority, headers))
        return known[1]

    def post(self, path: str, body: str, headers: Mapping[str, str], timeout: float) -> tuple[int, bytes]:
        """Status and body of the answer; `NoAnswer` if there is none within `timeout` seconds."""
        if self._closed:
            raise NoAnswer("closed")
        deadline = time.monotonic() + timeout
        head = self._head_of(headers)
        try:
            connection = self._connected(timeout)
        except _NotConnectedError as error:
            raise self.failure(error.__cause__, sent=False) from error.__cause__
        try:
            answer = http1.exchange(connection.sock, path, head, body, deadline)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self.failure(error, sent=True) from error
        except BaseException:
            connection.close()  # a signal's handler came in between: the answer may still come, to nobody
            raise
        if answer.reusable:
            self._keep(connection)
        else:
            connection.close()
        return answer.status, answer.body

    def failure(self, error: BaseException | None, *, sent: bool) -> NoAnswer:
        """What `error`, from a connection to this member, means. `sent`: it came after connecting."""
        root = _root(error)
        if isinstance(root, ssl.SSLError) and not isinstance(root, ssl.SSLEOFError):
            return self._tls_failure(root, sent)
        if isinstance(root, TimeoutError):
            return NoAnswer("no answer" if sent else "no connection in time", sent=sent, silent=True)
        if not sent and diagnosis.hung_up(root):
            why = "the TLS handshake broke off (if it always does: is it http there?)"
            return NoAnswer(why, silent=True, unclear=True)
        if not sent:
            why = (getattr(root, "strerror", None) or str(root or error)).lower()
            return NoAnswer(why, silent=True, refused=True)
        if isinstance(root, http.client.BadStatusLine) and not isinstance(root, OSError):
            if str(root).startswith(_TLS_ALERT):
                return diagnosis.wants_tls(self.url)
            return NoAnswer("an answer that is not HTTP; is this etcd's client URL?", sent=True, silent=True)
        hint = "does it ask for a client certificate?" if self.context else "is it https there?"
        why = f"connection closed without an answer (if always: {hint})"
        return NoAnswer(why, sent=True, silent=True, hung_up=True, unclear=True)

    def _tls_failure(self, error: ssl.SSLError, sent: bool) -> NoAnswer:
        if (meaning := diagnosis.tls_failure(self.url, error)) is not None:
            return meaning
        reason = error.reason or str(error)
        if sent:
            return NoAnswer(f"the TLS connection broke ({reason})", sent=True, silent=True)
        return diagnosis.no_tls(self.url, reason)

    def look(self, timeout: float) -> NoAnswer | None:
        """Whether it is for TLS that it hangs up, by a connection of its own."""
        return diagnosis.look(self.url, self.context, timeout)

    def drop_streams(self, why: str) -> None:
        """End every stream from this member, because it no longer answers."""
        for stream in list(self.streams):
            stream.shutdown(why)

    def close(self) -> None:
        self._closed = True
        _close_all(self._idle)
        self.drop_streams("closed")

    def after_fork(self) -> None:
        """In the child: leave the parent's connections alone, and start over.

        The copies of the descriptors are closed, no more: no TLS farewell, no shutdown, and no lock that
        another thread may have held at the fork.
        """
        while self._idle:
            _close_descriptor(self._idle.pop().sock)
        for stream in self.streams:
            stream.after_fork()
        self.streams = set()


class Stream:
    """A request whose answer goes on: lines of JSON, read in one thread, ended from any by `shutdown`."""

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        """Connect; `NoAnswer` if that fails."""
        self.url = endpoint.url
        self.why = ""
        self._endpoint = endpoint
        self._connection = (
            http.client.HTTPSConnection(endpoint.host, endpoint.port, timeout=timeout, context=endpoint.context)
            if endpoint.context
            else http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=timeout)
        )
        try:
            self._connection.connect()
            self._socket: socket.socket = self._connection.sock
            for option in _KEEPALIVE:
                self._socket.setsockopt(*option)
        except OSError as error:
            self._connection.close()
            raise endpoint.failure(error, sent=False) from error
        self._response: http.client.HTTPResponse | None = None
        endpoint.streams.add(self)

    def lines(self, path: str, body: str, headers: Mapping[str, str]) -> Iterator[bytes]:
        """Send the request, and yield each message. `NoAnswer` when it ends; there is no other end.

        The first message must come within the timeout, later ones may take their time.
        """
        try:
            self._connection.request("POST", path, body, dict(headers))
            self._response = response = self._connection.getresponse()
            if response.status != http.client.OK:
                judge(self._endpoint.url, response.status, response.read())
            buffer = b""
            while chunk := response.read1(65_536):
                *messages, buffer = (buffer + chunk).split(b"\n")
                if messages:
                    self._socket.settimeout(None)
                yield from filter(None, messages)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if self.why:
                raise NoAnswer(self.why) from error
            raise self._endpoint.failure(error, sent=True) from error
        raise NoAnswer(self.why or "the stream ended")

    def shutdown(self, why: str) -> None:
        """End a `lines` that waits, at once, with `why`. Leaves the closing to its thread."""
        self.why = self.why or why
        with contextlib.suppress(OSError):
            # Not SSLSocket's own: that takes TLS away from under a thread that reads.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Not while another thread is in `lines`."""
        self._endpoint.streams.discard(self)
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def after_fork(self) -> None:
        self.why = "it belongs to the process that was forked"
        _close_descriptor(self._socket)


def _close_all(idle: deque[_Connection]) -> None:
    with contextlib.suppress(IndexError):
        while True:
            idle.pop().close()


def _close_descriptor(sock: socket.socket | None) -> None:
    descriptor = sock.detach() if sock is not None else -1
    if descriptor >= 0:
        os.close(descriptor)


def _root(error: BaseException | None) -> BaseException | None:
    """The error of the system, of TLS or of HTTP inside what urllib3 made of it."""
    while error is not None and not isinstance(error, OSError | http.client.HTTPException):
        inside = next((arg for arg in error.args if isinstance(arg, BaseException)), None)
        error = inside or error.__cause__ or error.__context__
    return error
