"""Any number of ``celery beat`` processes, and every tick is sent once: ``celery -A proj beat -S etcd_lock``.

Around any scheduler: what ``etcd_lock_beat_scheduler`` names, else ``beat_scheduler``. One beat leads, the others stand
by, and each tick goes through a fence in etcd::

    scheduler  ── which beat leads? ── candidate     stands for election, in a thread of its own
       │
       │ a new one for each term, as if its process had just begun
       ▼
    fenced     ── may this be sent? ── ledger        what has been sent of each entry, in etcd
       │                                  │
       ▼                               record        one entry's state, as JSON
    the scheduler that is wrapped      slots         when a tick was due, its task id and header

**A tick** is *sending* in etcd before it is published and *sent* after, each in one transaction with the leadership. So
a leader that was frozen in the middle of one, and wakes when another leads, gets no further; a publish that failed, or
a leader that died in between, leaves the tick *sending*, and whoever leads sends it, under the id that it was given.

**What is due** is decided by the wrapped scheduler, from ``last_run_at`` as etcd has it: a new leader goes on where the
one before it stopped, without a burst and without a gap.
"""

from celery_etcd_lock.beat.scheduler import EtcdScheduler

__all__ = ["EtcdScheduler"]
