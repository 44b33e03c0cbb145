"""``python -m example_project.check http://127.0.0.1:8000``: the running shop, looked at from outside, as by a browser.

It presses the page's buttons, waits, and says of each promise whether it was kept, with the evidence; exit status 0
only if all were. ``--kill "COMMAND"`` runs that command while the worker that ``--victim`` names changes prices: it is
to kill that worker, as ``docker-compose kill -s KILL worker1`` does, and all of it must be done all the same.
Needs nothing but Python and the shop's address: not its database, not etcd.
"""

from __future__ import annotations

import argparse
import contextlib
import http.cookiejar
import itertools
import json
import math
import shlex
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from example_project.demo.record import Run, overlaps

ENDED = frozenset({"done", "skipped", "failed"})
AFTER_A_KILL = 150.0
"""Seconds in which the messages of a worker that was killed come again, and are run: the broker gives them back."""
A_LEASE = 30.0
"""Seconds after which the lock of a worker that was killed is surely free: three times what the shop's settings say."""


class Browser:
    """Asks for the shop's pages, and keeps its cookies."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._cookies = http.cookiejar.CookieJar()
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self._cookies))

    def get(self, path: str) -> Any:
        with self._opener.open(f"{self.url}{path}", timeout=30) as answer:
            text = answer.read().decode()
        return json.loads(text) if answer.headers.get_content_type() == "application/json" else text

    def press(self, job: str) -> str:
        """Send that job ten times. Returns what the press is known by."""
        self.get("/")
        token = next(cookie.value for cookie in self._cookies if cookie.name == "csrftoken")
        body = urllib.parse.urlencode({"job": job, "csrfmiddlewaretoken": token}).encode()
        request = urllib.request.Request(f"{self.url}/press", body, {"Accept": "application/json"})
        with self._opener.open(request, timeout=30) as answer:
            return str(json.load(answer)["press"])

    def jobs(self, press: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get(f"/press/{press}.json")["jobs"]
        return found

    def ended(self, press: str, patience: float) -> list[dict[str, Any]]:
        """The messages of that press, when each has ended. `TimeoutError` says what has not."""
        deadline = time.monotonic() + patience
        while True:
            jobs = self.jobs(press)
            over = {job["task_id"] for job in jobs if job["state"] in ENDED}
            if over == {job["task_id"] for job in jobs}:
                return jobs
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {patience:.0f} s: {_said(jobs)}")
            time.sleep(0.2)


class Check:
    def __init__(self, browser: Browser, patience: float) -> None:
        self.browser = browser
        self.patience = patience
        self.broken = 0

    def promise(self, held: object, text: str) -> None:
        print(f"  {'ok    ' if held else 'BROKEN'} {text}", flush=True)
        self.broken += not held

    def told(self, title: str, check: Callable[[], None]) -> None:
        print(title, flush=True)
        try:
            check()
        except (OSError, TimeoutError) as why:  # what urllib raises is an OSError
            self.promise(False, f"{type(why).__name__}: {why}")

    def report(self) -> None:
        jobs = self.browser.ended(self.browser.press("report"), self.patience)
        self.alone(jobs)
        self.promise(_states(jobs) == {"done": 10}, f"of ten messages: {_said(jobs)}")

    def alone(self, jobs: Sequence[dict[str, Any]]) -> None:
        """No two at once, and the tokens grow from each to the next."""
        ran = _runs(jobs)
        at_once = len(overlaps(ran))
        tokens = [run.token for run in ran]
        grow = all(one < later for one, later in itertools.pairwise(tokens))
        workers = len({(run.worker, run.pid) for run in ran})
        self.promise(ran and not at_once, f"{len(ran)} ran, in {workers} processes, {at_once or 'no'} pairs at once")
        self.promise(grow, f"fencing tokens {'grow' if grow else 'do not grow'}: {tokens}")

    def skipped(self) -> None:
        jobs = self.browser.ended(self.browser.press("import"), self.patience)
        self.alone(jobs)
        states = _states(jobs)
        self.promise(
            states["skipped"] and set(states) <= {"done", "skipped"} and sum(states.values()) == 10,
            f"of ten messages: {_said(jobs)}",
        )

    def partner(self) -> None:
        jobs = self.browser.ended(self.browser.press("partner"), self.patience)
        most = _most_at_once(_runs(jobs))
        self.promise(
            _states(jobs) == {"done": 10} and most <= 2, f"of ten calls: {_said(jobs)}, {most} at once at most"
        )

    def readers_and_writer(self) -> None:
        presses = [self.browser.press(job) for job in ("warm", "prices")]
        readers, writers = (self.browser.ended(press, self.patience) for press in presses)
        self.promise(_states(readers) == _states(writers) == {"done": 10}, "ten readers and ten writers ran")
        self.alone(writers)
        between = [
            (one, other)
            for one in _runs(readers)
            for other in _runs(writers)
            if max(one.start, other.start) < min(one.end, other.end)
        ]
        most = _most_at_once(_runs(readers))
        self.promise(not between and most > 1, f"{len(between)} times a reader beside a writer; {most} readers at once")

    def beats(self) -> None:
        live = self.browser.get("/live.json")
        leading = [beat for beat in live["beats"] if beat["holds"]]
        self.promise(
            len(leading) == 1 and len(live["beats"]) >= 2, f"{len(leading)} of {len(live['beats'])} beats leads"
        )
        deadline = time.monotonic() + self.patience
        while len(sent := self.browser.get("/ticks.json")["ticks"]) < 3 and time.monotonic() < deadline:
            time.sleep(0.5)
        twice = [tick for tick in sent if tick["messages"] > 1]
        self.promise(len(sent) >= 3 and not twice, f"{len(sent)} ticks came; twice came: {twice or 'none'}")

    def killed(self, command: str, victim: str) -> None:
        # Of a job that waits in its slot. One that is put back is in and out of the broker all the time, and kombu
        # loses what it is just taking from Redis when its process is killed: off the list, not yet noted as taken.
        press = self.browser.press("prices")
        deadline = time.monotonic() + self.patience
        while not any(_is_running_on(job, victim) for job in self.browser.jobs(press)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{victim} changed no prices in {self.patience:.0f} s")
            time.sleep(0.05)
        began = time.time()  # as the shop's rows have it: on this host
        subprocess.run(shlex.split(command), check=True, stdout=subprocess.DEVNULL)
        with contextlib.suppress(TimeoutError):
            self.browser.ended(press, AFTER_A_KILL)
        jobs = self.browser.jobs(press)
        # A run that was cut short has no end: that it was dead before the next began is what its lease was for.
        whole = [job for job in jobs if job["state"] != "cut short"]
        self.alone(whole)
        took = min((run.start for run in _runs(whole) if run.start > began), default=math.inf) - began
        self.promise(took < A_LEASE, f"{victim} was killed, and the next change began {took:.1f} s later")
        again = {job["task_id"] for job in jobs if job["state"] == "cut short"}
        made = {job["task_id"] for job in whole if job["state"] == "done"}
        if again:
            self.promise(again <= made, f"what was cut short was made again: {_said(jobs)}")
        else:
            print(f"         {victim} died between two changes: nothing was cut short; SHOP_JOB_SECONDS=3 helps")
        self.promise(len(made) == 10, f"{len(made)} of ten changes are made")


def _is_running_on(job: dict[str, Any], worker: str) -> bool:
    return bool(job["state"] == "running" and job["worker"].partition("@")[0] == worker)


def _states(jobs: Sequence[dict[str, Any]]) -> Counter[str]:
    return Counter(job["state"] for job in jobs)


def _said(jobs: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(_states(jobs).items()))


def _runs(jobs: Sequence[dict[str, Any]]) -> list[Run]:
    """Those that ran, in the order of their starts."""
    ran = [
        Run(
            job["task"],
            number,
            job["worker"],
            job["pid"],
            _seconds(job["started"]),
            _seconds(job["ended"]),
            job["token"],
        )
        for number, job in enumerate(jobs)
        if job["started"]
    ]
    return sorted(ran, key=lambda run: run.start)


def _seconds(when: str | None) -> float:
    return datetime.fromisoformat(when).timestamp() if when else math.inf


def _most_at_once(ran: Sequence[Run]) -> int:
    return max((sum(other.start <= run.start < other.end for other in ran) for run in ran), default=0)


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m example_project.check", description=__doc__)
    options.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    options.add_argument("--patience", type=float, default=90.0, help="seconds for each promise")
    options.add_argument("--kill", metavar="COMMAND", help="what kills a worker")
    options.add_argument("--victim", default="worker1", help="the name of that worker, before its @")
    given = options.parse_args()
    check = Check(Browser(given.url), given.patience)
    check.told("The same report, ten times at once: one at a time, and all of them", check.report)
    check.told("The same import, ten times at once: who comes meanwhile is skipped", check.skipped)
    check.told("A partner who takes two calls at once", check.partner)
    check.told("The cache is warmed by readers, the prices are written alone", check.readers_and_writer)
    check.told("Two beats", check.beats)
    if given.kill:
        check.told(f"{given.victim} killed while it changes prices", lambda: check.killed(given.kill, given.victim))
    print(f"{check.broken} promises broken" if check.broken else "all kept")
    return 1 if check.broken else 0


if __name__ == "__main__":
    sys.exit(main())
