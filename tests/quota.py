"""An etcd with little room: filled by somebody else, and given room again as the error says."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import closing

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Put, Range, Transport, Txn
from celery_etcd_lock.exceptions import NoSpace
from celery_etcd_lock.testing import EtcdServer
from tests.servers import skip_or_fail
from tests.workers import until

__all__ = ["fill", "make_room", "small_etcd", "until_full"]


def small_etcd() -> EtcdServer:
    """Not started. Takes some 2 MB, history and all."""
    server = EtcdServer(extra_args=["--quota-backend-bytes=2000000"])
    if server.etcdctl is None:
        skip_or_fail("there is no etcdctl on this machine, and only that makes room again")
    return server


def fill(server: EtcdServer) -> str:
    """Have somebody else put until `server` takes no more. What it then says."""
    with closing(connect(server.url)) as transport:
        return str(until_full(transport))


def until_full(transport: Transport) -> NoSpace:
    """Put one key again and again, until etcd takes no more. How it refuses.

    etcd compares its quota with the size of its file, which grows with each commit of its backend: every 100 ms, by
    default. A fast machine can put any amount in between, so this goes by time, and slowly.
    """

    def refused() -> NoSpace | None:
        try:
            transport.txn(Txn([], [Put("/somebody/elses", bytes(300_000))]))
        except NoSpace as full:
            return full
        return None

    full: NoSpace = until(refused, "that etcd is full")
    return full


def make_room(server: EtcdServer, said: str) -> None:
    """Run the commands that the error `said`, as they stand there."""
    with closing(connect(server.url)) as transport:
        revision = transport.range(Range("/", limit=1)).header.revision
    commands = re.findall("`etcdctl ([^`]+)`", said)
    assert [command.split()[0] for command in commands] == ["compact", "defrag", "alarm"]
    for command in commands:
        subprocess.run(
            [str(server.etcdctl), f"--endpoints={server.url}", *command.replace("<revision>", str(revision)).split()],
            env={**os.environ, "ETCDCTL_API": "3"},
            check=True,
            capture_output=True,
        )
