"""Every way to end, in every pool: the lock is free at once, the next one comes in, nothing overlaps.

The figures of docs/endings.md come from the same measurements (``make endings``); here they are held to bounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from celery_etcd_lock.testing import EtcdServer
from tests.endings import table
from tests.endings.measuring import Ended, Fate, measure
from tests.endings.ways import POOLS, SHORT_TTL, SOFT, WAYS, Pool, Way, possible
from tests.holding import AT_ONCE
from tests.servers import RedisServer

PREFORK, SPAWN, THREADS, SOLO, GEVENT = POOLS

OWN = {
    "success": Fate("SUCCESS", "", 1, ""),
    "exception": Fate("FAILURE", "ValueError", 1, ""),
    "retry": Fate("SUCCESS", "", 2, ""),
    "ignore": Fate("PENDING", "", 1, ""),
    "requeue": Fate("SUCCESS", "", 2, ""),
    "replace": Fate("SUCCESS", "", 2, ""),
}
"""What becomes of a message whose body ends by itself: as without a lock."""

STRUCK = {
    "soft_limit": Fate("FAILURE", "SoftTimeLimitExceeded", 1, ""),
    "hard_limit": Fate("FAILURE", "TimeLimitExceeded", 1, ""),
    "revoke": Fate("REVOKED", "", 1, ""),
    "revoke_kill": Fate("REVOKED", "", 1, ""),
    "child": Fate("FAILURE", "WorkerLostError", 1, ""),
    "warm": Fate("SUCCESS", "", 1, ""),
}
"""And of one that is struck, where Celery has children that it can strike."""


@pytest.fixture(scope="class")
def measured(
    request: pytest.FixtureRequest, redis: RedisServer, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[Way, Ended | Exception]:
    """All ways at once, each with a lock of its own, in workers of the pool that the class is of."""
    pool: Pool = request.cls.pool
    if not possible(pool):
        pytest.skip("this Celery does not have this pool")
    return measure(redis.url, etcd.url, tmp_path_factory.mktemp("endings"), pool)


class EveryWay:
    pool: ClassVar[Pool]

    @pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
    def test_the_lock_is_free(self, measured: dict[Way, Ended | Exception], way: Way) -> None:
        """At once, or when the TTL is over where nobody is left to give it back; the next one runs, after it."""
        if way.child and not self.pool.children:
            pytest.skip("no child: the whole worker, which is another way")
        if not possible(self.pool, way):
            pytest.skip("this Celery does not have this way")
        ended = measured[way]
        if isinstance(ended, Exception):
            raise ended
        assert ended.freed < AT_ONCE + {"worker": SHORT_TTL, "soft": SOFT}.get(way.name, 0)
        assert ended.waiter < AT_ONCE
        assert ended.overlaps == 0
        assert ended.tokens_grow
        if way.name in {"child", "revoke_kill"} and self.pool.children:
            assert ended.by == "parent"
        else:
            assert ended.by == ("lease" if way.name == "worker" else "release")
        if way.name in OWN:
            assert ended.fate == OWN[way.name]
        elif ended.went_on:
            assert ended.fate == Fate("SUCCESS", "", 1, "")
            assert way.name == "warm" or not self.pool.children
        elif way.name in STRUCK:
            assert ended.fate == STRUCK[way.name]


class TestPrefork(EveryWay):
    pool = PREFORK


class TestSpawn(EveryWay):
    pool = SPAWN


class TestThreads(EveryWay):
    pool = THREADS


class TestSolo(EveryWay):
    pool = SOLO


class TestGevent(EveryWay):
    pool = GEVENT


def test_the_page_has_every_cell() -> None:
    """docs/endings.md: both tables, with a row for each way, a column for each pool, and something in each cell."""
    said = table.cells((Path(__file__).parents[2] / "docs" / "endings.md").read_text())
    corners = (table.FREE, table.FATE)
    wanted = {(corner, way.title, pool.title) for corner in corners for way in WAYS for pool in POOLS}
    assert {place for place in said if place[0] in corners} == wanted
    assert [place for place in wanted if not said[place]] == []
