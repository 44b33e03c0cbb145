"""`beating`, with its schedule in the Redis of its broker: RedBeat, under the prefix that is the queue's name."""

from __future__ import annotations

import os

from tests.beat.beating import app

app.conf.update(
    beat_scheduler="redbeat.RedBeatScheduler",
    beat_max_loop_interval=1,
    redbeat_redis_url=os.environ["BROKER_URL"],
    redbeat_key_prefix=f"{os.environ['QUEUE']}:",
    redbeat_redis_options={},
    beat_schedule={name: entry for name, entry in app.conf.beat_schedule.items() if name != "minute"},
)
