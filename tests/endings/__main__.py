"""How long a lock stays taken, for every pool and every way to end: measured, and written into docs/endings.md.

``python -m tests.endings`` (or ``make endings``) measures; the tests run the same code, and hold it to bounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path

from redis import Redis

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.testing import EtcdServer
from tests.endings.measuring import measure
from tests.endings.table import Found, tables, write
from tests.endings.ways import POOLS, WAYS, possible
from tests.servers import RedisServer

PAGE = Path(__file__).parents[2] / "docs" / "endings.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.endings", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=3, help="how often each cell is measured; the median is shown")
    parser.add_argument("--write", type=Path, metavar="FILE", default=PAGE, help=f"the page, by default {PAGE.name}")
    asked = parser.parse_args()
    if not all(possible(pool, way) for pool in POOLS for way in WAYS):
        sys.exit("this Celery is too old for some of the table's cells: install 5.7 or later")
    found: Found = defaultdict(list)
    failed = False
    with RedisServer() as redis, EtcdServer() as etcd, tempfile.TemporaryDirectory() as folder:
        with closing(connect(etcd.url)) as transport:
            etcd_version = transport.status()[0].version
        with closing(Redis.from_url(redis.url)) as client:
            redis_version = client.info("server")["redis_version"]
        for _ in range(asked.times):
            for pool in POOLS:
                began = time.monotonic()
                for way, ended in measure(redis.url, etcd.url, Path(folder), pool).items():
                    if isinstance(ended, Exception):
                        failed = True
                        print(ended, repr(ended.__cause__), sep="\n")
                    else:
                        found[pool, way].append(ended)
                print(f"{pool.title}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        sys.exit(f"{asked.write} is not written: there would be an empty cell")
    write(asked.write, tables(found, etcd_version, redis_version, "make endings"))


if __name__ == "__main__":
    main()
