"""``history``: what the revisions that etcd still keeps have to tell.

`past` replays them to a listener, `timeline` makes stays in line of what it hears, `instants` knows when a revision
was, and `story` is what comes of it, drawn by `story_text` and `story_html`.
"""

from celery_etcd_lock.cli.history.command import history

__all__ = ["history"]
