"""The fenced store: what the locks protect. It refuses whoever comes after a newer holder has been there.

One thread of the run's own process keeps it, and its clients ask over a loopback socket, so that a client that is
stopped or killed in the middle holds up nobody else. Of each name it remembers the largest token that wrote and the
largest that read: a writer must not be older than either, a reader not older than the last writer (readers that
are in together have tokens in no order). That is ``UPDATE … WHERE token <= :token`` of docs/fencing.md, with a
read as a second column.

Slots have no tokens that could be compared, so theirs is another store, `EtcdStore`: a transaction in etcd on the
condition that the hold still stands.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import threading
from pathlib import Path
from types import TracebackType

from celery_etcd_lock.etcd.api import Compare, Put, Transport, Txn
from tests.safety.history import Recorder, Write, now

__all__ = ["EtcdStore", "FencedStore", "StoreClient"]


class FencedStore:
    """The server; a context manager. It writes down every write, taken or refused, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._recorder = Recorder(folder, "store")
        self._lock = threading.Lock()
        self._number = 0
        self._largest: dict[tuple[str, str], int] = {}
        store = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):  # its client was killed
                    for line in self.rfile:
                        asked = json.loads(line)
                        self.wfile.write(b"1\n" if store.write(**asked) else b"0\n")

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="store", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def write(self, *, name: str, mode: str, token: int, hold: str) -> bool:
        """Take it or refuse it, and say which."""
        with self._lock:
            self._number += 1
            against = ("write", "read") if mode == "write" else ("write",)
            accepted = all(self._largest.get((name, each), 0) <= token for each in against)
            if accepted:
                self._largest[name, mode] = max(token, self._largest.get((name, mode), 0))
            self._recorder.write(Write(self._number, now(), name, mode, token, hold, accepted))
            return accepted

    def __enter__(self) -> FencedStore:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class StoreClient:
    """A connection to a `FencedStore`, for one thread."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._file = self._socket.makefile("rwb")

    def write(self, name: str, mode: str, token: int, hold: str) -> bool:
        asked = {"name": name, "mode": mode, "token": token, "hold": hold}
        self._file.write(json.dumps(asked).encode() + b"\n")
        self._file.flush()
        return self._file.readline() == b"1\n"

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class EtcdStore:
    """Writes on the condition that the writer's hold still stands. Its order is etcd's revisions."""

    def __init__(self, transport: Transport, recorder: Recorder) -> None:
        self._transport = transport
        self._recorder = recorder

    def write(self, name: str, mode: str, token: int, hold: str, stands: Compare) -> bool:
        """`EtcdUnavailable` if etcd does not say."""
        reply = self._transport.txn(Txn([stands], [Put(f"/fenced{name}", hold.encode())]))
        self._recorder.write(Write(reply.header.revision, now(), name, mode, token, hold, reply.succeeded))
        return reply.succeeded
