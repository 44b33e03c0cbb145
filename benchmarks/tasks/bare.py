"""``celery`` as it is where this package is not installed: without the command that is loaded at every start."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

_found = importlib.metadata.entry_points


def _others(**chosen: Any) -> Any:
    found: Any = _found(**chosen)
    return [point for point in found if not point.value.startswith("celery_etcd_lock")] if chosen else found


if __name__ == "__main__":
    importlib.metadata.entry_points = _others
    from celery.__main__ import main

    main()
    sys.exit()
