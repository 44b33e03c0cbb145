"""For how long the broker has been out of this beat's reach.

The thread that ticks says when it tries; the one that stands for election asks. What counts is what was tried: from the
beginning of the first try that failed to the end of the last one, or to now while one hangs. A broker that was away
for a moment while nothing was due is not out of reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Broker"]

_MOST = 16


class Broker:
    """Of one beat, through all its terms. Only the thread that ticks writes, except for `gives_up`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self._trying: float | None = None
        """Since when a try is under way."""
        self._failed: tuple[float, float] | None = None
        """When the first of the tries began that failed one after the other, and when the last ended."""
        self._given_up = 0

    def forget(self) -> None:
        """A term begins: what failed in one before says nothing of now."""
        self._failed = None

    @contextmanager
    def trying(self, out_of_reach: Callable[[BaseException], bool]) -> Iterator[None]:
        """Around a try. Of what is raised in it `out_of_reach` says whether that was the broker's absence."""
        began = self._trying = self.now()
        try:
            yield
        except BaseException as error:
            if out_of_reach(error):
                self._failed = self._failed[0] if self._failed else began, self.now()
            raise
        finally:
            self._trying = None

    @property
    def is_tried(self) -> bool:
        """Whether a try is under way, which may hang."""
        return self._trying is not None

    def reached(self) -> None:
        """It has taken what was sent."""
        self._failed, self._given_up = None, 0

    def away(self, since: float) -> float:
        """For how many seconds it has been out of reach; of what was before `since` nothing counts."""
        trying, failed = self._trying, self._failed
        began = failed[0] if failed else trying
        if began is None:
            return 0.0
        until = self.now() if trying is not None or failed is None else failed[1]
        return max(0.0, until - max(began, since))

    def patience(self, ttl: float) -> float:
        """Seconds that a leader waits for it: `ttl`, and twice as long after each time that it has given up in vain.

        So where no beat reaches the broker, leadership does not go round for ever at the pace of `ttl`.
        """
        return ttl * min(2.0**self._given_up, _MOST)

    def gives_up(self) -> None:
        """This beat leaves it to another to reach the broker."""
        self._given_up += 1
