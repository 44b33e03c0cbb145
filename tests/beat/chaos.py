"""Three beats under faults: kills, freezes and stops of theirs and of their etcd, and what the worker received.

    python -m tests.beat.chaos --seconds 300 --seed 1234
    python -m tests.beat.chaos --seconds 30 --plain       # three beats of Celery's own: the duplicates must show
    python -m tests.beat.chaos --broken at-most-once      # a scheduler that is broken: this must be found

Exits with 1 if a tick was sent twice or never, or if so little happened that the run proves nothing. The same seed
deals the same faults; what they hit is up to the machine.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from celery_etcd_lock.testing import EtcdCluster, EtcdServer
from tests.beat.beats import Beat, Beats
from tests.beat.broken import BREAKS
from tests.beat.checker import Disturbance, Report, Rules, check
from tests.beat.faults import DECK, Fault, plan
from tests.servers import RedisServer
from tests.workers import until

__all__ = ["Outcome", "chaos", "main", "plain"]

TTL = 3
_RULES = Rules(
    {"second": 1.0, "seven": 7.0, "minute": 60.0, "alone": 1.0, "arrival": 1.0},
    slack=3.0, once=("alone",), calendar=("minute",),
)  # fmt: skip
"""*alone* is what a singleton task ran for, *arrival* its messages. The slack is for a machine that is busy."""
_PLAIN = {entry: every for entry, every in _RULES.intervals.items() if entry != "arrival"}
_TAKEOVER = 3.0
"""Seconds that a takeover may take longer than the lease of the leader before: etcd looks for leases twice a second."""
_AT_ONCE = TTL * 2 / 3
"""Seconds for which a lease goes on at least, renewed as it is after each third: who steps down is followed sooner."""
_ALL = 150.0
"""Seconds in which a plan has every card of the deck."""
_ELECTION = 4.0
"""Seconds in which members of etcd have found a leader, and beats a member."""


@dataclass
class Outcome:
    report: Report
    faults: list[Disturbance] = field(default_factory=list)
    takeovers: dict[str, list[float]] = field(default_factory=dict)
    """Seconds, each, until another beat led, of those that lost their leader, by what was done to it."""
    dropped: int = 0
    """Copies of a singleton task that did not run."""
    logs: str = ""


class _Chaos:
    def __init__(self, beats: Beats, etcd: EtcdCluster) -> None:
        self.beats = beats
        self.etcd = etcd
        self.running: list[Beat] = [beats.beat() for _ in range(3)]
        self.faults: list[Disturbance] = []
        self.takeovers: dict[str, list[float]] = defaultdict(list)
        self.promised: dict[str, str] = {}
        """Ids of ticks in the middle of which a beat was struck, and what was done to it."""
        self.problems: list[str] = []

    def inflict(self, fault: Fault) -> None:
        time.sleep(fault.after)
        for beat in self.running:
            beat.await_start()
        self.faults.append(self._on_etcd(fault) if fault.kind.startswith("etcd") else self._on_beat(fault))

    def _on_etcd(self, fault: Fault) -> Disturbance:
        leader = self.etcd.leader()
        others = [member for member in self.etcd.members if member is not leader]
        member: EtcdServer = leader if fault.target == "leader" else others[int(fault.pick * len(others))]
        begin = time.time()
        if fault.kind == "etcd killed":
            member.kill()
            time.sleep(fault.for_)
            member.start()
        else:
            member.pause()
            time.sleep(fault.for_)
            member.resume()
        back = time.time()
        return Disturbance(str(fault), begin, back + TTL + _ELECTION, strikes=(begin, back))

    def _on_beat(self, fault: Fault) -> Disturbance:
        leader = self.beats.await_leader()
        others = [beat for beat in self.running if beat is not leader]
        beat = leader if fault.target == "leader" else others[int(fault.pick * len(others))]
        beat, begin = self._strike(fault, beat)
        pid, strikes = beat.pid, [begin]
        frozen = fault.kind.startswith("frozen")
        late = 0.0
        if fault.target == "leader" and (not frozen or fault.for_ > TTL):
            late = self._take_over(fault, beat, begin)
        elif fault.target == "leader":
            late = fault.for_ + 1.0
        time.sleep(max(0.0, begin + fault.for_ - time.time()))
        if frozen:
            strikes.append(time.time())
            beat.resume()
        else:
            self._ended(fault, beat)
            beat.start()
        if fault.kind == "stopped":
            strikes.clear()  # it ends a tick that it has begun
        return Disturbance(str(fault), begin, begin + late, pid, tuple(strikes))

    def _strike(self, fault: Fault, beat: Beat) -> tuple[Beat, float]:
        """To whom it was done, and when."""
        what, _, moment = fault.kind.partition(" ")
        number = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP, "stopped": signal.SIGTERM}[what]
        if not moment:
            begin = time.time()
            beat.process.send_signal(number)
            return beat, begin
        self.beats.strike(moment, number)
        struck = self.beats.await_struck()
        self.promised[struck.id] = f"its beat was {fault.kind}"
        return next(each for each in self.running if each.pid == struck.pid), struck.when

    def _take_over(self, fault: Fault, beat: Beat, begin: float) -> float:
        """Wait for it. Returns for how many seconds ticks may be late."""
        most = _TAKEOVER if fault.kind == "stopped" else TTL + _TAKEOVER
        self.beats.await_leader(other_than=beat)
        took = time.time() - begin
        self.takeovers[fault.kind].append(took)
        if took > most:
            self.problems.append(f"{fault}: another led after {took:.1f} s")
        return most

    def _ended(self, fault: Fault, beat: Beat) -> None:
        code = beat.process.wait(60)
        if code != (0 if fault.kind == "stopped" else -signal.SIGKILL):
            self.problems.append(f"{fault}: {beat.name} ended with {code}")

    def end(self) -> None:
        """Of all beats; and what is wrong beside ticks."""
        for beat in self.running:
            beat.await_start()
            if (code := beat.stop()) != 0:
                self.problems.append(f"{beat.name} ended with {code}, in the end")
            if "Traceback" in beat.output:
                self.problems.append(f"{beat.name} logged a traceback")
        stops = self.takeovers.get("stopped")
        if stops and min(stops) > _AT_ONCE:
            self.problems.append(f"no leader that was stopped was followed within {_AT_ONCE:.1f} s")


def chaos(
    folder: Path, faults: Iterable[Fault], *, seconds: float = 0.0, calm: float = 4.0, broken: str = "",
    say: bool = False,
) -> Outcome:  # fmt: skip
    """Three beats and a worker, through all of `faults`, or as many as fit into `seconds`, and `calm` seconds after.

    `broken`: one of the `BREAKS`.
    """
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        etcd = stack.enter_context(EtcdCluster())
        settings = {"etcd_lock_beat_ttl": TTL}
        variables = {"BROKEN": broken, "ARRIVALS": "1"}
        beats = stack.enter_context(Beats(redis.url, ",".join(etcd.endpoints), folder, settings, variables=variables))
        worker = beats.worker()
        run = _Chaos(beats, etcd)
        until(lambda: beats.received("second"), "the first tick")
        begin = time.time()
        try:
            for fault in faults:
                if seconds and time.time() + fault.after + fault.for_ + calm > begin + seconds:
                    break
                run.inflict(fault)
                if say:
                    print(f"{time.time() - begin:6.1f} s  {fault}", flush=True)
            time.sleep(calm)
        except AssertionError as error:  # somebody waited in vain
            run.problems.append(str(error))
        end = time.time()
        run.end()
        report = check(beats.received(), run.faults, _RULES, begin=begin, end=end, promised=run.promised)
        report.violations += run.problems
        logs = "".join(beat.output for beat in run.running)
        return Outcome(report, run.faults, run.takeovers, worker.output.count("etcd_lock.copy_dropped"), logs)


def plain(folder: Path, seconds: float, faults: Iterable[Fault] = ()) -> Report:
    """Three beats of Celery's own, and as many of `faults` as fit: the same check must find what they send twice.

    There is none that leads, so that a fault picks any; nor an etcd, so that those of etcd are left out.
    """
    with RedisServer() as redis, Beats(redis.url, "http://127.0.0.1:1", folder) as beats:
        beats.worker()
        running = [beats.beat(scheduler="celery.beat:PersistentScheduler") for _ in range(3)]
        until(lambda: len(beats.received("second")) > 3, "the first ticks")
        begin = time.time()
        for fault in faults:
            if time.time() + fault.after + fault.for_ > begin + seconds:
                break
            if not fault.kind.startswith("etcd"):
                time.sleep(fault.after)
                _on_plain(fault, running[int(fault.pick * len(running))])
        time.sleep(max(0.0, begin + seconds - time.time()))
        return check(beats.received(), (), replace(_RULES, intervals=_PLAIN, plain=True), begin=begin, end=time.time())


def _on_plain(fault: Fault, beat: Beat) -> None:
    beat.await_start()
    if fault.kind.startswith("frozen"):
        beat.pause()
        time.sleep(fault.for_)
        beat.resume()
        return
    if fault.kind == "stopped":
        beat.stop()
    else:
        beat.kill()
    time.sleep(fault.for_)
    beat.start()


def _summary(outcome: Outcome, seed: int) -> str:
    kinds = Counter(each.what.partition(" for ")[0] for each in outcome.faults)
    lines = [f"seed {seed}: {len(outcome.faults)} faults"]
    lines += [f"  {count:3} {kind}" for kind, count in sorted(kinds.items())]
    lines.append(f"{sum(map(len, outcome.takeovers.values()))} takeovers")
    lines += [
        f"  {len(took):3} leader {kind}, {min(took):.1f} to {max(took):.1f} s"
        for kind, took in sorted(outcome.takeovers.items())
    ]
    for entry, count in outcome.report.received.items():
        lines.append(f"{entry}: {count} received, longest pause {outcome.report.late.get(entry, 0.0):.1f} s")
    lines.append(f"{outcome.dropped} copies of a singleton task did not run")
    lines.append(f"{len(outcome.report.repeats)} repeats of an id with an excuse")
    lines += [f"  {repeat}" for repeat in outcome.report.repeats]
    lines.append(f"{len(outcome.report.violations)} violations")
    return "\n".join(lines + [f"  {violation}" for violation in outcome.report.violations])


def _not_done(outcome: Outcome) -> list[str]:
    """The cards that this run did not come to."""
    done = {each.what.partition(" for ")[0] for each in outcome.faults}
    return sorted({f"{target} {kind}" for kind, target, *_ in DECK} - done)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.beat.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument(
        "--plain", action="store_true", help="three beats of Celery's own: must find what they send twice"
    )
    parser.add_argument("--broken", choices=["", *BREAKS], default="", help="break the scheduler: this must be found")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="beat-chaos-"))
    print(f"seed {given.seed}, {given.seconds:.0f} s", flush=True)
    if given.plain:
        report = plain(folder, given.seconds, plan(given.seed, TTL))
        found = [each for each in report.violations if " ids" in each]
        print(f"three plain beats: {len(found)} slots sent under several ids")
        shutil.rmtree(folder)
        return 0 if found else 1
    outcome = chaos(folder, plan(given.seed, TTL), seconds=given.seconds, broken=given.broken, say=True)
    print(_summary(outcome, given.seed))
    if missing := _not_done(outcome):
        print(f"not done in this run: {', '.join(missing)}")
    if given.broken:
        shutil.rmtree(folder)
        return 0 if outcome.report.violations else 1
    if outcome.report.violations:
        print(f"the logs and what was received are in {folder}")
        return 1
    shutil.rmtree(folder)
    if not outcome.takeovers or (missing and given.seconds >= _ALL):
        print("too little was done: this proves nothing")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
