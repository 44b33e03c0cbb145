"""``why``: what a task waits for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import click
from celery.bin.base import CeleryCommand, CeleryOption

from celery_etcd_lock.cli.ages import age, iso, lasting, moment
from celery_etcd_lock.cli.connected import Etcd, connected
from celery_etcd_lock.cli.elsewhere import Elsewhere, Message, ask_elsewhere
from celery_etcd_lock.cli.named import queue_of
from celery_etcd_lock.cli.pages import keys_below
from celery_etcd_lock.cli.queues import Contender, Lock, Queue, limits_of, queues
from celery_etcd_lock.cli.tables import printable
from celery_etcd_lock.etcd.api import Range
from celery_etcd_lock.tasks.copies import Mark, mark_key
from celery_etcd_lock.tasks.message import Waits

__all__ = ["why"]

_AT_ONCE = timedelta(seconds=1)
"""For so long after it is due a message may be on its way into a slot that is free."""


@click.command(cls=CeleryCommand)
@click.argument("task_id")
@click.option(
    "--timeout",
    cls=CeleryOption,
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help_group="Why Options",
    help="How long workers have to answer.",
)
@click.option("--json", "as_json", cls=CeleryOption, is_flag=True, help_group="Why Options", help="As JSON.")
@click.pass_context
def why(ctx: click.Context, task_id: str, timeout: float, as_json: bool) -> None:
    """Which lock a task waits for, and who holds it.

    And since when, how often it has tried, and when it will next. Looks into etcd, asks the workers for its message,
    and the result backend for its state; says what it could not find out.

    Exit status: 0; 1 if nobody knows of the task.
    """
    app = ctx.obj.app
    with connected(ctx) as etcd:
        everywhere = queues(keys_below(etcd.transport, etcd.below("locks")), limits_of(app))
        standing = next(_of_task(everywhere, task_id), None)
        mark = _mark(etcd, task_id)
        now = datetime.now(timezone.utc)
        said = ask_elsewhere(app, task_id, timeout)
        story = _Story(task_id, standing, mark, said, now)
        if standing is None and story.lock:
            story.queue = queue_of(ctx, etcd, story.lock)
    if not story.known:
        missing = "".join(f"\nnot found out: {each}" for each in said.unknown)
        raise click.ClickException(
            f"nothing is known of task {task_id}: no lock, no worker and no result has its id. It may stand in its "
            f"queue, where no worker has taken it, or was never sent{missing}"
        )
    if as_json:
        ctx.obj.echo(json.dumps(story.to_json(), ensure_ascii=False, indent=1))
        return
    for label, text in story.lines():
        ctx.obj.echo(f"{ctx.obj.style(f'{label:<10}', bold=True)} {printable(text)}")


def _of_task(found: Iterator[Queue], task_id: str) -> Iterator[tuple[Queue, Contender]]:
    for queue in found:
        for each in queue.contenders:
            if each.record.get("task_id") == task_id:
                yield queue, each


def _mark(etcd: Etcd, task_id: str) -> Mark | None:
    found = etcd.transport.range(Range(mark_key(etcd.settings.namespace, task_id))).kvs
    return Mark.parse(found[0].value) if found else None


@dataclass
class _Story:
    """All that could be found out of one task."""

    task_id: str
    standing: tuple[Queue, Contender] | None
    mark: Mark | None
    said: Elsewhere
    now: datetime
    """When the workers were asked: they answer at once, and are waited for all the same."""
    queue: Queue | None = None
    """Of the lock that it waits for, where it does not stand in line itself."""

    def __post_init__(self) -> None:
        if self.standing is not None:
            self.queue = self.standing[0]

    @property
    def known(self) -> bool:
        result = self.said.result
        return bool(self.standing or self.mark or self.said.messages or (result and result.state != "PENDING"))

    @property
    def message(self) -> Message | None:
        return self.said.messages[0] if self.said.messages else None

    @property
    def waits(self) -> dict[str, Any]:
        return self.message.waits if self.message is not None else {}

    @property
    def lock(self) -> str:
        """The name of the lock that it has, waits for, or last asked for."""
        if self.standing is not None:
            return self.standing[0].lock.name
        if self.message is not None and self.message.lock:
            return self.message.lock
        contended = self.said.result and self.said.result.contended
        return contended.key if contended else ""

    @property
    def state(self) -> str:
        """One word: see `_STATES`."""
        if self.standing is not None:
            return "running" if self.standing[1].holds and not self.standing[1].leftover else self._in_line
        result = self.said.result.state if self.said.result else "PENDING"
        if result in {"SUCCESS", "FAILURE", "REVOKED"}:
            return "ended"
        if self.waits.get("outages"):
            return "etcd away"
        if self.waits.get("count") or (self.mark and self.mark.stage == "waiting"):
            return "put back"
        if self.mark is not None:
            return "ending" if self.mark.stage == "ending" else "ended"
        if result == "RETRY" and self.message is None:
            return "put back"
        return "not begun" if self.message is not None and self.message.state != "active" else "no lock"

    @property
    def _in_line(self) -> str:
        assert self.standing is not None
        return "ended" if self.standing[1].leftover else "in line"

    @property
    def holders(self) -> tuple[Contender, ...]:
        """Who keeps it out now."""
        return self.queue.holders if self.queue is not None and self.state != "running" else ()

    @property
    def tried(self) -> int | None:
        """How often it was put back because of the lock; None: that is in its message, which is not to be had."""
        return int(self.waits.get("count", 0)) if self.message is not None else None

    @property
    def waited(self) -> float | None:
        """Seconds since it first found the lock taken."""
        if self.standing is not None and not self.waits.get("count"):
            return age(self.standing[1].record.get("since", ""), self.now)
        return Waits(**self.waits).waited(self.now.timestamp()) if self.waits else None

    @property
    def next_try(self) -> datetime | None:
        return moment(self.message.eta) if self.message is not None and self.message.state != "active" else None

    @property
    def task(self) -> str:
        if self.standing is not None:
            return str(self.standing[1].record.get("task", ""))
        return self.message.task if self.message is not None else Lock.named(self.lock).task

    # -- told

    def lines(self) -> Iterator[tuple[str, str]]:
        yield "task", f"{self.task or 'unknown'}[{self.task_id}]"
        yield "state", self._state_told()
        if self.lock:
            yield "lock", f"{self.queue.lock.title} ({self.lock})" if self.queue else self.lock
        if self.state in {"in line", "put back"}:
            yield from self._waiting_told()
        if self.message is not None:
            yield "worker", self.message.worker
        for each in self._unknown():
            yield "not known", each

    def _waiting_told(self) -> Iterator[tuple[str, str]]:
        for each in self.holders:
            since = each.record.get("since", "")
            seconds = age(since, self.now)
            yield "held by", each.who + (f", since {since} ({lasting(seconds)})" if seconds is not None else "")
        if self.lock and not self.holders:
            yield "held by", "nobody at this moment"
        tried, waited = self.tried, self.waited
        since = f", for {lasting(waited)} now" if waited else ""
        if tried:
            yield "tried", f"{tried + 1} times{since}" if self.state == "in line" else f"{_times(tried)}{since}"
        elif waited is not None and self.state == "in line":
            yield "waits", f"since {self.standing[1].record.get('since', '?')} ({lasting(waited)})"  # type: ignore[index]
        if self.state == "in line":
            yield "next", "at once when it is its turn, unless its time to wait is over before"
        elif (when := self.next_try) is not None:
            yield "next", self._when(when)

    def _when(self, when: datetime) -> str:
        text = iso(when)
        if self.now - when > _AT_ONCE:
            return f"was due at {text}, and waits until its worker has a slot free"
        return f"in {lasting((when - self.now).total_seconds())}, at {text}"

    def _state_told(self) -> str:
        state = self.state
        if state == "in line":
            assert self.standing is not None
            queue, mine = self.standing
            ahead = sum(each.kv.create_revision < mine.kv.create_revision for each in queue.waiting)
            return "waits in line, in a worker's slot: " + ("it is next" if not ahead else f"{ahead} wait before it")
        if state == "ended" and self.said.result is not None and self.said.result.state != "PENDING":
            return f"has ended: {self.said.result.state}"
        if state == "etcd away":
            return f"was put back because etcd did not answer, {_times(self.waits['outages'])} in a row" + (
                f"; it comes back {self._when(self.next_try)}" if self.next_try is not None else ""
            )
        return _STATES[state]

    def _unknown(self) -> Iterator[str]:
        yield from self.said.unknown
        if self.state == "put back" and self.message is None:
            yield "when it tries next: no worker that answers has its message, which may stand in its queue"
        if self.state in {"put back", "in line"} and self.tried is None:
            least = f": {_times(self.mark.count)} at least" if self.mark is not None and self.mark.count else ""
            yield f"how often it has tried, which is in its message{least}"
        if self.state == "put back" and not self.lock:
            yield "which lock it waits for: neither its worker nor the result backend says"
        if self.queue is not None and not self.queue.sure:
            yield "who else holds the lock: how many may is in its task's lock_limit, and the task is not in this app"

    def to_json(self) -> dict[str, Any]:
        when = self.next_try
        result = self.said.result
        return {
            "task_id": self.task_id,
            "task": self.task,
            "state": self.state,
            "result": result.state if result else None,
            "lock": self.lock,
            "holders": [each.to_json() for each in self.holders],
            "tried": self.tried,
            "waited": self.waited,
            "next": when.isoformat() if when else None,
            "worker": self.message.worker if self.message else None,
            "unknown": list(self._unknown()),
        }


_STATES = {
    "running": "holds its lock: it runs, or is about to",
    "put back": "was put back into its queue, because somebody else held the lock",
    "ending": "its body has returned; what comes after it (callbacks, its result) is under way",
    "ended": "has ended",
    "not begun": "a worker has its message, and has not begun with it: it has not asked for a lock so far",
    "no lock": "holds no lock and waits for none",
}


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
