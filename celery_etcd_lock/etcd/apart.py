"""A transport in a process apart, for a process that must stay free to fork: gRPC bears none once it is in use.

The process is a new interpreter, not a fork. It is started by the first call, and gets its calls, one at a time, by
pickle through a pipe; it ends when that is closed, by `Apart.close` or the end of this process.
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

from celery_etcd_lock.etcd.api import (
    Delete,
    DeleteReply,
    LeaseKeys,
    LeaseReply,
    Range,
    RangeReply,
    Status,
    Txn,
    TxnReply,
    Watch,
)
from celery_etcd_lock.exceptions import EtcdLockError, EtcdUnavailable

__all__ = ["Apart", "serve"]

_PROGRAM = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from celery_etcd_lock.etcd.apart import serve; serve()"
)


class Apart:
    """A `Transport`, without watches, for one thread at a time. `connection` is what `connect` takes."""

    def __init__(self, connection: Mapping[str, Any]) -> None:
        self._connection = dict(connection)
        self._process: subprocess.Popen[bytes] | None = None
        self._calling = threading.Lock()

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(self._connection["endpoints"])

    def range(self, request: Range, *, timeout: float | None = None) -> RangeReply:
        reply: RangeReply = self._call("range", request, timeout=timeout)
        return reply

    def txn(self, request: Txn, *, timeout: float | None = None) -> TxnReply:
        reply: TxnReply = self._call("txn", request, timeout=timeout)
        return reply

    def delete(self, request: Delete, *, timeout: float | None = None) -> DeleteReply:
        reply: DeleteReply = self._call("delete", request, timeout=timeout)
        return reply

    def lease_grant(self, ttl: int, *, timeout: float | None = None) -> LeaseReply:
        reply: LeaseReply = self._call("lease_grant", ttl, timeout=timeout)
        return reply

    def lease_renew(self, lease: int, *, timeout: float | None = None) -> LeaseReply:
        reply: LeaseReply = self._call("lease_renew", lease, timeout=timeout)
        return reply

    def lease_revoke(self, lease: int, *, timeout: float | None = None) -> None:
        self._call("lease_revoke", lease, timeout=timeout)

    def lease_time_to_live(self, lease: int, *, keys: bool = False, timeout: float | None = None) -> LeaseKeys:
        reply: LeaseKeys = self._call("lease_time_to_live", lease, keys=keys, timeout=timeout)
        return reply

    def watch(self, request: Watch) -> NoReturn:
        raise NotImplementedError("a process apart watches nothing")

    def status(self, *, timeout: float | None = None) -> tuple[Status, ...]:
        reply: tuple[Status, ...] = self._call("status", timeout=timeout)
        return reply

    def close(self) -> None:
        with self._calling:
            process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _call(self, verb: str, *arguments: Any, **options: Any) -> Any:
        with self._calling:
            if self._process is None:
                self._process = self._start()
            assert self._process.stdin
            assert self._process.stdout
            try:
                pickle.dump((verb, arguments, options), self._process.stdin)
                self._process.stdin.flush()
                answer = pickle.load(self._process.stdout)  # noqa: S301 our own process
            except (OSError, EOFError, pickle.UnpicklingError) as error:
                process, self._process = self._process, None
                _end(process)
                raise EtcdUnavailable(f"the process that speaks gRPC has ended ({error!r})", True) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdin
        for thing in (sys.path, self._connection):
            pickle.dump(thing, process.stdin)
        process.stdin.flush()
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what it was still to be told
                pipe.close()


def serve() -> None:
    """The other side: make a transport, and do with it what comes through standard input."""
    from celery_etcd_lock.etcd import connect

    source, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever else prints
    transport = connect(**pickle.load(source))  # noqa: S301 from our own parent
    while True:
        try:
            verb, arguments, options = pickle.load(source)  # noqa: S301 from our own parent
        except EOFError:
            return
        try:
            answer = getattr(transport, verb)(*arguments, **options)
        except EtcdLockError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()
