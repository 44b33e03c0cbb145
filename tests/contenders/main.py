"""A contender by celery_etcd_lock: lock, unlock and count, with commands and events as in ``main.go``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from typing import Any

from celery_etcd_lock.etcd.api import Put, Range, Txn
from celery_etcd_lock.locks import HeldLock, Mutex, Session

__all__ = ["count"]


def say(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, "at": time.monotonic(), **more}), flush=True)  # noqa: T201 - its protocol


def count(session: Session, name: str, key: str, times: int) -> None:
    """Add one to the number in `key`, `times` times, by a read and a put, under the lock `name`; ``-``: unlocked."""
    etcd = session.transport
    for _ in range(times):
        with nullcontext() if name == "-" else Mutex(session, name):
            number = int(etcd.range(Range(key)).kvs[0].value)
            etcd.txn(Txn([], [Put(key, str(number + 1).encode())]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-endpoints", default="http://127.0.0.1:2379")
    parser.add_argument("-ttl", type=int, default=60)
    options = parser.parse_args()
    held: HeldLock | None = None
    with Session.open(options.endpoints, ttl=options.ttl) as session:
        say("ready", lease=f"{session.lease:x}")
        for line in sys.stdin:
            match line.split():
                case ["lock", name]:
                    held = Mutex(session, name).acquire()
                    say("held", key=held.key, token=held.fencing_token)
                case ["unlock"] if held is not None:
                    until = time.monotonic()
                    say(held.release(), until=until)
                case ["count", name, key, times]:
                    count(session, name, key, int(times))
                    say("counted")
                case _:
                    say("error", command=line.strip(), error="no such command, or not its arguments")


if __name__ == "__main__":
    main()
