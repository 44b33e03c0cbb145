"""Three beats under faults: kills, freezes and stops of theirs and of their etcd, and what the worker received.

    python -m tests.beat.chaos --seconds 300 --seed 1234
    python -m tests.beat.chaos --seconds 30 --plain       # three beats of Celery's own: the duplicates must show

Exits with 1 if a tick was sent twice or never, or if so little happened that the run proves nothing. The same seed
deals the same faults; what they hit is up to the machine.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from celery_etcd_lock.testing import EtcdCluster, EtcdServer
from tests.beat.beats import Beat, Beats
from tests.beat.checker import Disturbance, Report, check
from tests.beat.faults import Fault, plan
from tests.servers import RedisServer
from tests.workers import until

__all__ = ["Outcome", "chaos", "main", "plain"]

INTERVALS = {"second": 1.0, "seven": 7.0, "minute": 60.0, "alone": 1.0}
TTL = 3
SLACK = 3.0
"""Seconds that a tick may be late by where nothing was done: the machine may be busy."""
_TAKEOVER = 3.0
"""Seconds that a takeover may take longer than the lease of the leader before: etcd looks for leases twice a second."""
_ELECTION = 4.0
"""Seconds in which members of etcd have found a leader, and beats a member."""


@dataclass
class Outcome:
    report: Report
    faults: list[Disturbance] = field(default_factory=list)
    takeovers: list[float] = field(default_factory=list)
    """Seconds, each, until another beat led, of those that lost their leader to a signal."""
    logs: str = ""


class _Chaos:
    def __init__(self, beats: Beats, etcd: EtcdCluster) -> None:
        self.beats = beats
        self.etcd = etcd
        self.running: list[Beat] = [beats.beat() for _ in range(3)]
        self.faults: list[Disturbance] = []
        self.takeovers: list[float] = []

    def inflict(self, fault: Fault) -> None:
        time.sleep(fault.after)
        begin = time.time()
        if fault.kind.startswith("etcd"):
            self._on_etcd(fault)
            late = fault.for_ + TTL + _ELECTION
        else:
            late = self._on_beat(fault)
        self.faults.append(Disturbance(str(fault), begin, begin + late))

    def _on_etcd(self, fault: Fault) -> None:
        leader = self.etcd.leader()
        others = [member for member in self.etcd.members if member is not leader]
        member: EtcdServer = leader if fault.target == "leader" else others[int(fault.pick * len(others))]
        if fault.kind == "etcd killed":
            member.kill()
            time.sleep(fault.for_)
            member.start()
        else:
            member.pause()
            time.sleep(fault.for_)
            member.resume()

    def _on_beat(self, fault: Fault) -> float:
        """Returns for how many seconds ticks may be late."""
        leader = self.beats.await_leader()
        others = [beat for beat in self.running if beat is not leader]
        beat = leader if fault.target == "leader" else others[int(fault.pick * len(others))]
        began = time.monotonic()
        if fault.kind == "killed":
            beat.kill()
        elif fault.kind == "stopped":
            code = beat.stop()
            assert code == 0, f"{beat.name} ended with {code}:\n{beat.output[-3000:]}"
        else:
            beat.pause()
        if fault.target == "leader" and (fault.kind != "frozen" or fault.for_ > TTL):
            self.beats.await_leader(other_than=beat)
            self.takeovers.append(time.monotonic() - began)
        time.sleep(max(0.0, began + fault.for_ - time.monotonic()))
        if fault.kind == "frozen":
            beat.resume()
        else:
            beat.start()
        if fault.target == "standby":
            return 0.0
        if fault.kind == "stopped":
            return _TAKEOVER
        return max(TTL + _TAKEOVER, fault.for_ + 1.0 if fault.for_ < TTL else 0.0)


def chaos(
    folder: Path, faults: Iterable[Fault], *, seconds: float = 0.0, calm: float = 4.0, say: bool = False
) -> Outcome:
    """Three beats and a worker, through all of `faults`, or as many as fit into `seconds`, and `calm` seconds after."""
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        etcd = stack.enter_context(EtcdCluster())
        beats = stack.enter_context(Beats(redis.url, ",".join(etcd.endpoints), folder, {"etcd_lock_beat_ttl": TTL}))
        beats.worker()
        run = _Chaos(beats, etcd)
        until(lambda: beats.received("second"), "the first tick")
        begin = time.time()
        for fault in faults:
            if seconds and time.time() + fault.after + fault.for_ + calm > begin + seconds:
                break
            run.inflict(fault)
            if say:
                print(f"{time.time() - begin:6.1f} s  {fault}", flush=True)
        time.sleep(calm)
        end = time.time()
        for beat in run.running:
            assert beat.stop() == 0, beat.output[-3000:]
        receipts = beats.received()
        report = check(receipts, run.faults, INTERVALS, begin=begin, end=end, slack=SLACK, once=("alone",))
        logs = "".join(beat.output for beat in run.running)
        if "Traceback" in logs:
            report.violations.append("a beat logged a traceback")
        return Outcome(report, run.faults, run.takeovers, logs)


def plain(folder: Path, seconds: float) -> Report:
    """Three beats of Celery's own, to which nothing is done: the same check must find what they send twice."""
    with RedisServer() as redis, Beats(redis.url, "http://127.0.0.1:1", folder) as beats:
        beats.worker()
        for _ in range(3):
            beats.beat(scheduler="celery.beat:PersistentScheduler")
        until(lambda: len(beats.received("second")) > 3, "the first ticks")
        begin = time.time()
        time.sleep(seconds)
        return check(beats.received(), (), INTERVALS, begin=begin, end=time.time(), slack=SLACK)


def _summary(outcome: Outcome, seed: int) -> str:
    kinds = Counter(each.what.partition(" for ")[0] for each in outcome.faults)
    lines = [f"seed {seed}: {len(outcome.faults)} faults"]
    lines += [f"  {count:3} {kind}" for kind, count in sorted(kinds.items())]
    if outcome.takeovers:
        lines.append(
            f"{len(outcome.takeovers)} takeovers: {min(outcome.takeovers):.1f} to {max(outcome.takeovers):.1f} s"
        )
    for entry, count in outcome.report.received.items():
        lines.append(f"{entry}: {count} received, longest pause {outcome.report.late.get(entry, 0.0):.1f} s")
    lines.append(f"{len(outcome.report.repeats)} repeats of an id with an excuse")
    lines += [f"  {repeat}" for repeat in outcome.report.repeats]
    lines.append(f"{len(outcome.report.violations)} violations")
    return "\n".join(lines + [f"  {violation}" for violation in outcome.report.violations])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.beat.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--plain", action="store_true", help="three beats of Celery's own, without faults")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="beat-chaos-"))
    if given.plain:
        found = [each for each in plain(folder, given.seconds).violations if " ids" in each]
        print(f"three plain beats: {len(found)} slots sent under several ids")
        shutil.rmtree(folder)
        return 0 if found else 1
    print(f"seed {given.seed}, {given.seconds:.0f} s", flush=True)
    faults = itertools.chain(plan(given.seed, TTL))
    outcome = chaos(folder, faults, seconds=given.seconds, say=True)
    print(_summary(outcome, given.seed))
    if outcome.report.violations:
        print(f"the logs and what was received are in {folder}")
        return 1
    shutil.rmtree(folder)
    if not outcome.takeovers:
        print("no leader was lost: this proves nothing")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
