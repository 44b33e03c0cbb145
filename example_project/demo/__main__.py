"""``python -m example_project.demo``: exits 0 only if every promise was kept.

``DEMO_LOCK=off`` switches the lock off, to see that the demo can tell: it must then fail.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time

from example_project.demo import stage

KEPT, BROKEN, STOPPED = 0, 1, 130


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            try:
                on = stack.enter_context(stage.opened())
            except RuntimeError as why:
                print(f"The demo cannot begin: {why}", file=sys.stderr)
                return BROKEN
            code = play(on, began)
    except KeyboardInterrupt:
        code = STOPPED
    if code == STOPPED:
        print("\nstopped")
    if code == KEPT:
        shutil.rmtree(on.folder, ignore_errors=True)
    return code


def play(on: stage.Stage, began: float) -> int:
    from example_project.demo import app, story  # they read the environment that the stage has just set

    children = " and ".join(str(worker.children) for worker in on.workers)
    story.say(f"{on.etcd}; broker: {on.broker}; two prefork workers of {children} children; lease {app.TTL} s")
    if os.environ.get("DEMO_LOCK") == "off":
        story.say("The lock is switched off (DEMO_LOCK=off): its promises must break.")
    told = story.Story(on)
    try:
        told.tell()
    except KeyboardInterrupt:
        return STOPPED
    took = time.monotonic() - began
    print(f"\n{told.kept} promises kept, {told.broken} broken, in {took:.0f} s.")
    if told.broken:
        print(f"What the workers said is in {on.folder}")
    return BROKEN if told.broken else KEPT


if __name__ == "__main__":
    sys.exit(main())
