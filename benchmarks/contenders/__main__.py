"""A contender in Python, as a process: commands on stdin, events on stdout, as those of ``tests/contenders/main.go``.

``lock NAME`` says held, ``unlock`` released {until}, ``bench NAME N`` benched {seconds: of each of N pairs}. Beyond
Go's: ``profile NAME N`` prints where the time of N pairs goes to stderr, ``crowd PREFIX SECONDS THREADS`` says counted
{count: pairs in that time, by so many threads, each with locks of its own}.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import json
import pstats
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.contenders import floor, others, ours

KINDS: dict[str, Callable[[str, int], Callable[[str], Callable[[], object]]]] = {
    "floor-grpc": floor.over_grpc,
    "floor-gateway": floor.over_gateway,
    "same-grpc": functools.partial(floor.over_grpc, guarded=True),
    "same-gateway": functools.partial(floor.over_gateway, guarded=True),
    "ours-grpc": functools.partial(ours.over, transport="grpc"),
    "ours-gateway": functools.partial(ours.over, transport="gateway"),
    "etcd3": others.etcd3,
    "etcd3gw": others.etcd3gw,
    "redis": others.redis,
}


def say(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, "at": time.monotonic(), **more}), flush=True)


class Contender:
    def __init__(self, take: Callable[[str], Callable[[], object]]) -> None:
        self.take = take
        self.release: Callable[[], object] = lambda: None

    def lock(self, name: str) -> None:
        self.release = self.take(name)
        say("held")

    def unlock(self) -> None:
        until = time.monotonic()
        self.release()
        say("released", until=until)

    def pairs(self, name: str, times: int) -> list[float]:
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            self.take(name)()
            seconds.append(time.perf_counter() - began)
        return seconds

    def profile(self, name: str, times: int) -> None:
        profile = cProfile.Profile()
        profile.runcall(self.pairs, name, times)
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(35)
        say("profiled")

    def crowd(self, prefix: str, seconds: float, threads: int) -> None:
        counts: list[int] = []
        start = threading.Barrier(threads + 1)

        def come(number: int) -> None:
            self.pairs(f"{prefix}/{number}", 5)
            count, _ = 0, start.wait()
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                self.take(f"{prefix}/{number}")()
                count += 1
            counts.append(count)

        crowd = [threading.Thread(target=come, args=(number,)) for number in range(threads)]
        for thread in crowd:
            thread.start()
        start.wait()
        for thread in crowd:
            thread.join()
        say("counted", count=sum(counts))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("-endpoints", required=True)
    parser.add_argument("-ttl", type=int, default=60)
    options = parser.parse_args()
    contender = Contender(KINDS[options.kind](options.endpoints, options.ttl))
    say("ready")
    for line in sys.stdin:
        match line.split():
            case ["lock", name]:
                contender.lock(name)
            case ["unlock"]:
                contender.unlock()
            case ["bench", name, times]:
                say("benched", seconds=contender.pairs(name, int(times)))
            case ["profile", name, times]:
                contender.profile(name, int(times))
            case ["crowd", prefix, seconds, threads]:
                contender.crowd(prefix, float(seconds), int(threads))
            case _:
                say("error", command=line.strip(), error="no such command, or not its arguments")


if __name__ == "__main__":
    main()
