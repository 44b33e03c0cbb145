"""The promises, told one after the other, each with the evidence for it."""

from __future__ import annotations

import itertools
import math
import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import Any

from celery.result import AsyncResult
from celery.states import READY_STATES

from celery_etcd_lock import LockContended
from example_project.demo import app
from example_project.demo.record import Run, cut_short, overlaps, runs, timeline, written
from example_project.demo.stage import Stage, await_until

PATIENCE = 60.0
"""Seconds after which what has not come will not come."""


class Story:
    """Tells itself on standard output; `broken` counts the promises that did not hold."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.kept = 0
        self.broken = 0

    def tell(self) -> None:
        for chapter in (self.ten_at_once, self.skip_and_wait, self.twice_the_ttl, self.killed, self.two_beats):
            try:
                chapter()
            except TimeoutError:
                self.promise(False, f"a result did not come within {PATIENCE:.0f} s")

    def ten_at_once(self) -> None:
        heading("The same job, sent ten times at once")
        wait_for(send(app.unlocked, "unlocked", range(10), 0.3))
        ran = shown("unlocked")
        at_once = len(overlaps(ran))
        self.promise(len(ran) == 10 and at_once > 0, f"no lock: {len(ran)} ran, {at_once} pairs of them at once")
        results = send(app.retried, "retried", range(10), 0.3)
        turned_away = put_back(results)
        wait_for(results)
        self.alone("on_conflict=retry", shown("retried"), 10)
        self.promise(bool(turned_away), f"who had to come again knows why: {turned_away or 'nobody had to'}")

    def skip_and_wait(self) -> None:
        heading("Other ways to meet a lock that is taken: skip, and wait")
        results = send(app.skipped, "skipped", range(10), 1.0)
        wait_for(results)
        skipped = sum(result.result == "skipped" for result in results)
        self.alone("on_conflict=skip", shown("skipped"), 10 - skipped)
        came_back = sum(result.successful() for result in results)
        self.promise(0 < skipped < 10 == came_back, f"{skipped} of 10 were skipped, {came_back} results came back")
        wait_for(send(app.waiting, "waiting", range(5), 0.3))
        ran = shown("waiting")
        self.alone("on_conflict=wait", ran, 5)
        gap = max((later.start - one.end for one, later in itertools.pairwise(ran)), default=math.inf)
        self.promise(0 <= gap < app.TTL, f"each began {gap:.3f} s or less after the one before had ended")

    def twice_the_ttl(self) -> None:
        heading(f"A task of {2 * app.TTL} s, under a lease of {app.TTL} s that its worker renews")
        results = send(app.retried, "long", range(1), 2 * app.TTL)
        await_until(lambda: runs(app.RECORD, "long"), timeout=PATIENCE)
        results += send(app.retried, "long", range(1, 4), 0.3)
        wait_for(results)
        ran = shown("long")
        self.alone("still alone", ran, 4)
        took = max((run.end - run.start for run in ran), default=0)
        self.promise(2 * app.TTL <= took < math.inf, f"it worked for {took:.1f} s, to its end")

    def killed(self) -> None:
        victim, survivor = self.stage.workers
        heading(f"{victim.name} killed in mid-task, with kill -9")
        (doomed,) = send(app.retried, "killed", range(1), 10 * app.TTL, queue=victim.name)
        await_until(lambda: runs(app.RECORD, "killed"), timeout=PATIENCE)
        (heir,) = send(app.retried, "killed", range(1, 2), 0.3, queue=survivor.name)
        turned_away = put_back([heir])
        victim.kill()
        killed_at = time.monotonic()  # when the last of its processes was surely gone
        wait_for([heir])
        ran = cut_short(runs(app.RECORD, "killed"), victim.name, killed_at)
        draw(ran)
        self.promise(bool(turned_away), f"before, on {survivor.name}, the same job {turned_away or 'was let in'}")
        self.alone("after", ran, 2)
        took = ran[-1].start - killed_at
        self.promise(
            0 < took < app.TTL + 10 and heir.successful() and not doomed.ready(),
            f"{survivor.name} took the job over {took:.1f} s after the kill, the lease being of {app.TTL} s",
        )

    def two_beats(self) -> None:
        heading("Two beats, and an entry that is due every second")
        leader, heir = self.stage.beats(2)
        if not await_until(lambda: len(ticks()) >= 5, timeout=PATIENCE):
            raise TimeoutError
        leader.kill()
        killed_at = time.monotonic()
        if not await_until(lambda: sum(tick["time"] > killed_at for tick in ticks()) >= 5, timeout=PATIENCE):
            raise TimeoutError
        sent = ticks()
        # A message that does not say for when it is counts for the second in which it came.
        dues = {tick["due"] or math.floor(tick["time"]) for tick in sent}
        self.promise(len(dues) == len(sent), f"{len(sent)} ticks came, for {len(dues)} due times")
        pause = max(later["time"] - one["time"] for one, later in itertools.pairwise(sent))
        took_over = heir.has_said("etcd_lock.leader_elected")
        self.promise(
            took_over and 1.5 < pause < app.BEAT_TTL + 10,
            f"{leader.name} was killed with kill -9, and {heir.name} went on after {pause:.1f} s, the lease being of "
            f"{app.BEAT_TTL} s",
        )

    def promise(self, held: object, text: str) -> None:
        """Say whether it was kept, and count it."""
        say(f"{'ok    ' if held else 'BROKEN'} {text}")
        self.kept += bool(held)
        self.broken += not held

    def alone(self, when: str, ran: Sequence[Run], expected: int) -> None:
        """The promise of the lock: that many ran, no two at once, and tokens grow from each to the next."""
        at_once = len(overlaps(ran))
        tokens = [run.token for run in ran]
        grow = all(one < later for one, later in itertools.pairwise(tokens))
        self.promise(
            len(ran) == expected and not at_once and grow,
            f"{when}: {len(ran)} ran, {at_once or 'no'} pairs of them at once; fencing tokens "
            + (f"grow, {tokens[0]} to {tokens[-1]}" if grow and tokens else f"do not grow: {tokens}"),
        )


def ticks() -> list[dict[str, Any]]:
    """What beats have sent, as it came."""
    return written(app.RECORD, "tick")


def heading(text: str) -> None:
    print(f"\n{text}")


def say(text: str) -> None:
    print(textwrap.fill(text, 80, initial_indent="  ", subsequent_indent=" " * 9), flush=True)


def shown(job: str) -> list[Run]:
    """Draw the runs of `job`, and return them."""
    ran = runs(app.RECORD, job)
    draw(ran)
    return ran


def draw(ran: Sequence[Run]) -> None:
    for line in timeline(ran):
        print(f"    {line}")


def send(task: Any, job: str, numbers: Iterable[int], seconds: float, queue: str = "jobs") -> list[AsyncResult[Any]]:
    """Send the job once for each of `numbers`, at once."""
    return [task.apply_async((job, number, seconds), queue=queue) for number in numbers]


def wait_for(results: Sequence[AsyncResult[Any]]) -> None:
    """`TimeoutError` if one of them has not come within `PATIENCE`."""
    if not await_until(lambda: all(result.ready() for result in results), timeout=PATIENCE):
        raise TimeoutError


def put_back(results: Sequence[AsyncResult[Any]]) -> str:
    """What the first of `results` that was put back says of the holder; "" if all of them ended without."""
    told: list[str] = []

    def told_or_over() -> bool:
        states = [(result.state, result.info) for result in results]
        told.extend(
            f"found the lock held by {info.holder} since {info.since}"
            for _, info in states
            if isinstance(info, LockContended)
        )
        return bool(told) or all(state in READY_STATES for state, _ in states)

    await_until(told_or_over, timeout=PATIENCE)
    return told[0] if told else ""
