"""What a task does when somebody else holds its lock: frozen policies that decide, for a caller who acts.

A policy is made by `Conflict`'s factories, checked when it is made, and plain JSON on its way through a
message's header. `Conflict.decide` is a pure function from how long the message has waited to an `Action`.
"""

from __future__ import annotations

import copy
import json
import math
import random as _random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypeAlias, cast, get_args

from celery_etcd_lock.exceptions import ConfigError

__all__ = [
    "Action",
    "Coalesce",
    "Conflict",
    "Fail",
    "PutBack",
    "Refuse",
    "Retry",
    "Skip",
    "SkipRun",
    "Wait",
    "WaitInPlace",
    "nearest",
]

GiveUp: TypeAlias = Literal["fail", "skip"]
AfterWait: TypeAlias = Literal["retry", "skip", "fail"]
InChain: TypeAlias = Literal["fail", "continue"]

_BACKOFF: Final = 1.0
_BACKOFF_MAX: Final = 10.0
_SHORTEST: Final = 0.05
_MEANT = {
    "requeue": "retry", "reject": "retry", "ignore": "skip", "drop": "skip", "discard": "skip", "raise": "fail",
    "error": "fail", "abort": "fail", "block": "wait", "queue": "wait", "debounce": "coalesce",
}  # fmt: skip


def nearest(word: str, words: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The one of `words` that `word` was probably meant to be, or None."""
    import difflib  # only for who has misspelt something

    candidates = list(words)
    return next(iter(difflib.get_close_matches(word.lower(), candidates, n=1, cutoff=cutoff)), None)


# Not the named tuples that other values are: two of these are not the same for holding the same number.


@dataclass(frozen=True)
class PutBack:
    """Publish the same message again, to come back after `countdown` seconds."""

    countdown: float


@dataclass(frozen=True)
class SkipRun:
    """Do not run the body: the task succeeds with `result`, and its chain goes on or fails."""

    result: Any = None
    chain: InChain = "fail"


@dataclass(frozen=True)
class Refuse:
    """Fail the task with `LockContended`."""


@dataclass(frozen=True)
class WaitInPlace:
    """Stand in etcd's queue for at most `timeout` seconds; then decide again with ``timed_out=True``."""

    timeout: float


Action: TypeAlias = "PutBack | SkipRun | Refuse | WaitInPlace"


class Conflict(ABC):
    """What to do when somebody else holds the lock: one of `retry`, `skip`, `wait`, `fail`, `coalesce`.

    Equal policies are equal and hash alike. `ConfigError` when one is made that cannot work.
    """

    name: ClassVar[str]

    @staticmethod
    def retry(
        countdown: float | None = None,
        *,
        backoff: float | None = None,
        backoff_max: float | None = None,
        jitter: bool = True,
        max_wait: float | None = 3600,
        then: GiveUp = "fail",
    ) -> Retry:
        """Put the message back, and try again later. All times in seconds.

        The pauses double from `backoff` (1 by default) up to `backoff_max` (10, or `backoff` if that is
        longer); with `jitter` each is a random part of that, no less than a tenth. `countdown` is one fixed
        pause instead. After `max_wait` seconds since the first contention (None: never; time in which etcd
        itself was away does not count) the task fails with `LockContended`, or is skipped (``then="skip"``).
        """
        if countdown is not None and (backoff is not None or backoff_max is not None):
            raise ConfigError(_EITHER)
        shortest = _BACKOFF if backoff is None else backoff
        if backoff_max is None:
            longer = _is_number(shortest) and shortest > _BACKOFF_MAX
            backoff_max = shortest if longer else _BACKOFF_MAX
        return Retry(countdown, backoff=shortest, backoff_max=backoff_max, jitter=jitter, max_wait=max_wait, then=then)

    @staticmethod
    def skip(result: object = None, chain: InChain = "fail") -> Skip:
        """Do not run: the task succeeds with `result`, which must be plain JSON.

        Groups and chords complete; a chain fails with `LockContended`, or goes on with `result`
        (``chain="continue"``).
        """
        return Skip(result, chain)

    @staticmethod
    def wait(timeout: float = 10, then: AfterWait = "retry") -> Wait:
        """Wait in the worker's slot, first come first served, for at most `timeout` seconds.

        After that, `then`: ``"retry"`` (as `retry` without options does), ``"skip"`` or ``"fail"``.
        """
        return Wait(timeout, then)

    @staticmethod
    def fail() -> Fail:
        """Fail at once with `LockContended`, which says who holds the lock and since when."""
        return Fail()

    @staticmethod
    def coalesce() -> Coalesce:
        """One runs and at most one waits for it; whoever comes later is skipped: the waiting one does its work."""
        return Coalesce()

    @staticmethod
    def parse(value: object, option: str = "on_conflict") -> Conflict:
        """The policy meant by `value`: a policy, a name (``"retry"``), or what `to_json` made of one.

        `ConfigError` otherwise, with `option` as the name of what was set.
        """
        if isinstance(value, Conflict):
            return value
        if isinstance(value, str):
            return _policy(value, option)()
        if isinstance(value, Mapping):
            options = dict(value)
            name = options.pop("name", None)
            make, known = _policy(name, option), [each.name for each in fields(_KINDS[name])]
            for key in options:
                if key not in known:
                    right = nearest(str(key), known)
                    hint = f"did you mean {right!r}?" if right else f"it takes {', '.join(known) or 'none'}"
                    raise ConfigError(f"{option}: {name} has no option {key!r}: {hint}")
            try:
                return make(**options)
            except ConfigError as error:
                raise ConfigError(f"{option}: {error}") from None
        for name, kind in _KINDS.items():
            if value is getattr(Conflict, name) or value is kind:
                raise ConfigError(f"{option} is the function that makes a policy: write {name!r} or Conflict.{name}()")
        raise ConfigError(f"{option} cannot be of type {type(value).__name__}: write {_CHOICES}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: ``{"name": "retry", "max_wait": 60}``, without the options at their defaults."""
        return {"name": self.name, **self._set()}

    def __json__(self) -> dict[str, Any]:
        """For Kombu: a signature with a policy among its options can be part of a message."""
        return self.to_json()

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Conflict:
        """The policy that `to_json` made `value` from. `ConfigError` if it is none."""
        return Conflict.parse(value)

    def decide(
        self,
        *,
        waits: int = 0,
        waited: float = 0,
        same_task: bool = False,
        timed_out: bool = False,
        others_wait: bool = False,
        ceiling: float = float("inf"),
        random: Callable[[], float] = _random.random,
    ) -> Action:
        """What to do, the lock being somebody else's. Pure, but for `random`.

        waits: how often this message has been put back for this reason; waited: seconds since its first
        contention, without those in which etcd was away. same_task: the other one has this task's own id (a
        redelivered copy, a dead process, the run that retries itself): whatever the policy, it is put back, and
        never gives up. timed_out: `WaitInPlace` has been done and was in vain. others_wait: somebody waits
        for this lock already. ceiling: the longest countdown, in seconds, that the broker stands. random: a
        number in [0, 1).
        """
        if same_task:
            return PutBack(Retry(max_wait=None).pause(waits, waited, ceiling, random))
        return self.choose(_Case(waits, waited, timed_out, others_wait, ceiling, random))

    @abstractmethod
    def choose(self, case: _Case, /) -> Action:
        """What this policy has to say, once it is certain that the holder is another task."""

    def _set(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        options = ((each, getattr(self, each.name)) for each in fields(cast("Any", self)))
        return {each.name: value for each, value in options if each.default is MISSING or value != each.default}

    def __repr__(self) -> str:
        return f"Conflict.{self.name}({', '.join(f'{key}={value!r}' for key, value in self._set().items())})"


class _Case(NamedTuple):
    waits: int
    waited: float
    timed_out: bool
    others_wait: bool
    ceiling: float
    random: Callable[[], float]


@dataclass(frozen=True, repr=False)
class Retry(Conflict):
    """See `Conflict.retry`."""

    name: ClassVar[str] = "retry"
    countdown: float | None = None
    backoff: float = _BACKOFF
    backoff_max: float = _BACKOFF_MAX
    jitter: bool = True
    max_wait: float | None = 3600
    then: GiveUp = "fail"

    def __post_init__(self) -> None:
        if self.countdown is not None:
            _seconds(self, "countdown")
            if (self.backoff, self.backoff_max) != (_BACKOFF, _BACKOFF_MAX):
                raise ConfigError(_EITHER)
        _seconds(self, "backoff")
        _seconds(self, "backoff_max")
        if self.backoff_max < self.backoff:
            raise ConfigError(
                f"Conflict.retry: backoff_max={self.backoff_max!r} is shorter than backoff={self.backoff!r}: "
                "write the shortest pause as backoff, the longest as backoff_max"
            )
        if not isinstance(self.jitter, bool):
            raise ConfigError(f"Conflict.retry: jitter is {self.jitter!r}: write True or False")
        if self.max_wait is not None:
            _seconds(
                self, "max_wait", zero='to give up at once write "fail" or "skip"; to never give up, max_wait=None'
            )
        _choice(self, "then", GiveUp)

    def pause(self, waits: int, waited: float, ceiling: float, random: Callable[[], float]) -> float:
        """The next countdown, in seconds."""
        if self.countdown is not None:
            pause = self.countdown
        else:
            longest = min(self.backoff * 2.0 ** min(waits, 64), self.backoff_max)
            pause = max(longest * random(), longest / 10) if self.jitter else longest
        if self.max_wait is not None:
            pause = min(pause, self.max_wait - waited)
        return min(max(pause, _SHORTEST), ceiling)

    def choose(self, case: _Case, /) -> Action:
        if self.max_wait is not None and case.waited >= self.max_wait:
            return _GIVE_UP[self.then]
        return PutBack(self.pause(case.waits, case.waited, case.ceiling, case.random))


@dataclass(frozen=True, repr=False)
class Skip(Conflict):
    """See `Conflict.skip`."""

    name: ClassVar[str] = "skip"
    result: Any = field(default=None, hash=False)
    chain: InChain = "fail"

    def __post_init__(self) -> None:
        try:
            plain = json.loads(json.dumps(self.result))
        except (TypeError, ValueError, RecursionError):
            raise ConfigError(
                f"Conflict.skip: result is of type {type(self.result).__name__}, which is no plain JSON: it travels "
                "in the message; write numbers, strings, lists and dicts"
            ) from None
        object.__setattr__(self, "result", plain)
        _choice(self, "chain", InChain)

    def choose(self, _case: _Case, /) -> Action:
        return SkipRun(copy.deepcopy(self.result), self.chain)


@dataclass(frozen=True, repr=False)
class Wait(Conflict):
    """See `Conflict.wait`."""

    name: ClassVar[str] = "wait"
    timeout: float = 10
    then: AfterWait = "retry"

    def __post_init__(self) -> None:
        _seconds(self, "timeout", zero='to not wait in the worker at all write "retry"')
        _choice(self, "then", AfterWait)

    def choose(self, case: _Case, /) -> Action:
        if not case.timed_out:
            return WaitInPlace(self.timeout)
        return Retry().choose(case) if self.then == "retry" else _GIVE_UP[self.then]


@dataclass(frozen=True, repr=False)
class Fail(Conflict):
    """See `Conflict.fail`."""

    name: ClassVar[str] = "fail"

    def choose(self, _case: _Case, /) -> Action:
        return Refuse()


@dataclass(frozen=True, repr=False)
class Coalesce(Conflict):
    """See `Conflict.coalesce`. The one that waits is put back until it runs: it stands for all that were skipped."""

    name: ClassVar[str] = "coalesce"

    def choose(self, case: _Case, /) -> Action:
        return SkipRun() if case.others_wait else Retry(max_wait=None).choose(case)


_GIVE_UP: Final[dict[str, Action]] = {"fail": Refuse(), "skip": SkipRun()}
_KINDS: Final[dict[str, type[Retry | Skip | Wait | Fail | Coalesce]]] = {
    kind.name: kind for kind in (Retry, Skip, Wait, Fail, Coalesce)
}
_CHOICES: Final = f"{', '.join(map(repr, _KINDS))}, or Conflict.retry(...) and so on"
_EITHER: Final = (
    "Conflict.retry: countdown is one fixed pause, backoff and backoff_max let it grow: write either countdown, or them"
)


def _policy(name: object, option: str) -> Callable[..., Conflict]:
    """The factory of the policy called `name`."""
    if isinstance(name, str):
        if name in _KINDS:
            return cast("Callable[..., Conflict]", getattr(Conflict, name))
        right = _MEANT.get(name.lower()) or nearest(name, _KINDS)
        if right:
            raise ConfigError(f"{option} cannot be {name!r}: did you mean {right!r}?")
    raise ConfigError(f"{option} cannot be {name!r}: write {_CHOICES}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _seconds(policy: Retry | Wait, option: str, zero: str = "") -> None:
    value = getattr(policy, option)
    where = f"Conflict.{policy.name}: {option} is {value!r}"
    if not _is_number(value):
        raise ConfigError(f"{where}: write seconds, as a number")
    if value <= 0:
        raise ConfigError(f"{where}: write more than 0 seconds" + (f" ({zero})" if zero else ""))


def _choice(policy: Retry | Skip | Wait, option: str, choices: object) -> None:
    value, names = getattr(policy, option), get_args(choices)
    if value not in names:
        right = (_MEANT.get(value.lower()) or nearest(value, names)) if isinstance(value, str) else None
        hint = f"did you mean {right!r}?" if right in names else f"write {' or '.join(map(repr, names))}"
        raise ConfigError(f"Conflict.{policy.name}: {option} is {value!r}: {hint}")
