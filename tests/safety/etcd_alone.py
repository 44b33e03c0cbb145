"""Whether etcd keeps its word on leases when a leader has slept: etcd alone, without any lock or code of the library's.

    python -m tests.safety.etcd_alone [ROUNDS]

In each round five leases of 3 s are renewed all the time, by a follower, while the leader is stopped for 4 s and then
goes on. A lease that is gone less than a TTL after a renewal was sent that etcd has answered was ended early.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import urllib3

from celery_etcd_lock.testing import EtcdCluster, EtcdServer

_TTL = 3
_STOPPED = 4.0
_AFTER = 1.5


def main(rounds: int) -> None:
    pool = urllib3.PoolManager(timeout=2, retries=False)
    early = 0
    with EtcdCluster() as cluster:
        for number in range(rounds):
            early += _round(pool, cluster, number)
    print(f"{early} of {5 * rounds} leases ended early")


def _round(pool: urllib3.PoolManager, cluster: EtcdCluster, number: int) -> int:
    leader = cluster.leader()
    member = next(each for each in cluster.members if each is not leader)
    leases = [str(_post(pool, member, "grant", {"TTL": _TTL})["ID"]) for _ in range(5)]
    renewed: dict[str, float] = {}
    early: set[str] = set()
    leader.pause()
    since = time.monotonic()
    woke = 0.0
    while not woke or time.monotonic() < woke + _AFTER:
        if not woke and time.monotonic() > since + _STOPPED:
            leader.resume()
            woke = time.monotonic()
        for lease in leases:
            sent = time.monotonic()
            try:
                ttl = int(_post(pool, member, "keepalive", {"ID": lease})["result"].get("TTL", 0))
            except (urllib3.exceptions.HTTPError, KeyError):
                continue  # no leader yet
            if ttl:
                renewed[lease] = sent
            elif time.monotonic() < renewed.get(lease, 0.0) + _TTL and lease not in early:
                early.add(lease)
                ago = time.monotonic() - renewed[lease]
                print(
                    f"round {number}: {int(lease):x} is gone, renewed {ago:.2f} s ago, {sent - woke:.2f} s after waking"
                )
        time.sleep(0.1)
    for lease in leases:
        _post(pool, member, "revoke", {"ID": lease})
    return len(early)


def _post(pool: urllib3.PoolManager, member: EtcdServer, what: str, body: object) -> dict[str, Any]:
    reply = pool.request("POST", f"{member.url}/v3/lease/{what}", body=json.dumps(body))
    said: dict[str, Any] = json.loads(reply.data.splitlines()[0])
    return said


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
