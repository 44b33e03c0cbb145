"""Locks under faults: a cluster, proxies, clients, a plan made from a seed, and in the end what the checker says.

    python -m tests.safety.chaos --seconds 120 --seed 1234 --transport both

Exits with 1 if anything was wrong, or if so little happened that the run proves nothing; then the history is kept.
The same seed deals the same faults at the same times; what they hit is up to the machine.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Range, Transport, prefix_end
from celery_etcd_lock.testing import EtcdCluster, EtcdNotFound
from tests.safety import report
from tests.safety.broken import BREAKS
from tests.safety.checker import Report
from tests.safety.clients import Clients
from tests.safety.faults import KINDS, Fault, Kind, Side, plan
from tests.safety.history import now
from tests.safety.holders import Options
from tests.safety.inject import Injector
from tests.safety.proxy import Proxy
from tests.safety.run import Run

__all__ = ["Outcome", "chaos", "main"]

Transports: TypeAlias = Literal["gateway", "grpc", "both"]

ALL_KINDS = 120.0
"""Seconds in which a plan has every kind of fault."""
_SIDES: Sequence[Side] = ("left", "right")
_CALM = 90.0
"""Seconds in which everybody must have got through again after the last fault."""
_LATE = 0.4
"""In TTLs, from when a renewal is sent, at 0.33, to its answer, which must come before the trust in the grant ends, at
0.9, on a slow machine too. Whoever trusts from the answer on does so until 0.3 after the lease's end."""
_LEAST = 0.5
"""Acquisitions a second, on average: fewer prove nothing."""


@dataclass(frozen=True)
class Outcome:
    seed: int
    seconds: float
    """From the start of the cluster to the end of the last fault."""
    transport: Transports
    injected: Counter[Kind]
    report: Report
    problems: tuple[str, ...]
    """What is wrong beside the checker's violations: clients that hang, keys that stay, too little that happened."""
    etcd: str
    """Its version."""

    @property
    def good(self) -> bool:
        return not self.report.violations and not self.problems


def chaos(
    folder: Path,
    faults: Sequence[Fault],
    *,
    seed: int = 0,
    ttl: int = 3,
    transport: Transports = "both",
    broken: str = "",
) -> Outcome:
    """One run of these `faults`, its history in `folder`. `seed` is for what the clients do."""
    began = now()
    with ExitStack() as stack:
        cluster = stack.enter_context(EtcdCluster())
        proxies = {side: [stack.enter_context(Proxy(member.url)) for member in cluster.members] for side in _SIDES}
        etcd = connect(cluster.endpoints)
        stack.callback(etcd.close)
        run = stack.enter_context(Run(cluster.endpoints, folder, ttl=ttl, seed=seed, stay=0.05, broken=broken))
        options = run.options
        endpoints = [",".join(proxy.url for proxy in proxies[side]) for side in _SIDES]
        clients = stack.enter_context(Clients(_clients(options, transport, endpoints)))
        injector = Injector(cluster, proxies, clients, run, etcd)
        injector.run(faults)
        seconds = now() - began
        problems = [] if broken else clients.wait_through(now(), _CALM)
        problems += clients.end()
        problems += _left_behind(etcd, options)
        found = run.report()
        version = etcd.status()[0].version
    planned = Counter(fault.kind for fault in faults)
    problems += _too_little(found, planned, injector.injected, seconds)
    return Outcome(seed, seconds, transport, injector.injected, found, tuple(problems), version)


def _clients(options: Options, transport: Transports, endpoints: Sequence[str]) -> list[Options]:
    """Four that are in and out quickly, two whose bodies outlive many a lease, and one that hears too late from etcd.

    Over both transports in turn, with a quick one over each on either side. The last one's first renewal is answered
    rather late, and none after that: all its locks end by being lost.
    """
    over: Sequence[Literal["gateway", "grpc"]] = ("gateway", "grpc") if transport == "both" else (transport,) * 2
    made = [replace(options, transport=each, sessions=number) for number in (1, 2) for each in over]
    made += [
        replace(options, transport=each, threads=2, stay=2.5, wait=8.0, locks="mutex:l1,slot:l2:2") for each in over
    ]
    # A session to each thread, so that none hears of its loss from another.
    late = replace(options, threads=2, sessions=2, stay=1.5, wait=8.0, locks="mutex:t1")
    made.append(replace(late, late_renewals=_LATE * options.ttl))
    sides = (0, 1, 1, 0, 0, 1, 0)
    return [replace(each, endpoints=endpoints[side]) for each, side in zip(made, sides, strict=True)]


def _left_behind(etcd: Transport, options: Options) -> list[str]:
    """Contenders that are there though everybody has gone, and the leases of those who were killed have ended."""
    prefix, until = options.prefix, now() + 10 * options.ttl
    while True:
        kvs = etcd.range(Range(prefix, prefix_end(prefix)), timeout=30).kvs
        left = [f"{kv.key} was left behind: {kv}" for kv in kvs if kv.key != prefix + ".witness"]
        if not left or now() > until:
            return left
        time.sleep(0.2)


def _too_little(found: Report, planned: Counter[Kind], injected: Counter[Kind], seconds: float) -> list[str]:
    said = [f"{kind}: was planned, and could not be done once" for kind in planned if not injected[kind]]
    if not planned:
        said.append("nothing was planned")
    if found.acquisitions < _LEAST * seconds:
        said.append(f"only {found.acquisitions} acquisitions in {seconds:g} s")
    if not found.between_processes:
        said.append("no process handed a lock over to another")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.safety.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=ALL_KINDS, help="for how long there are faults")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, which is printed")
    parser.add_argument("--ttl", type=int, default=3, help="of the clients' sessions: short, so that many leases end")
    parser.add_argument("--transport", choices=["gateway", "grpc", "both"], default="both")
    parser.add_argument("--only", action="append", choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--broken", choices=["", *BREAKS], default="", help="break the lock: this must be found")
    parser.add_argument("--history", type=Path, help="a new folder to keep the history in")
    parser.add_argument("--write-report", type=Path, metavar="FILE", help="put the figures into this page")
    parser.add_argument("--plan", action="store_true", help="only print the plan")
    asked = parser.parse_args(arguments)
    seed = random.randrange(1_000_000) if asked.seed is None else asked.seed
    faults = plan(seed, asked.seconds, ttl=asked.ttl, only=asked.only or KINDS)
    if asked.plan:
        print(*faults, sep="\n")
        return 0
    more = [f"--ttl={asked.ttl}", f"--transport={asked.transport}", *(f"--only='{kind}'" for kind in asked.only or ())]
    if asked.broken:
        more.append(f"--broken={asked.broken}")
    again = f'make chaos SECONDS={asked.seconds:g} SEED={seed} ARGS="{" ".join(more)}"'
    print(f"seed {seed}; the same faults again: {again}", flush=True)
    folder = asked.history or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=folder / "run.log", format="%(asctime)s %(name)s %(message)s", level=logging.INFO)
    try:
        outcome = chaos(folder, faults, seed=seed, ttl=asked.ttl, transport=asked.transport, broken=asked.broken)
    except EtcdNotFound as missing:
        print(missing)
        return 2
    print(report.text(outcome))
    if outcome.good:
        if asked.write_report:
            report.write(asked.write_report, outcome)
        if asked.history is None:
            shutil.rmtree(folder)
        return 0
    print(f"the history and the logs are in {folder}; the same faults again: {again}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
