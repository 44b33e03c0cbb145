"""The trees that the images of workers are built from: this one, and that of an earlier commit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["OLD", "SAID", "BuildContext", "build_arguments"]

OLD = "b2bc59379933f23a881605a2deb33b470bdb1a91"
"""What runs beside this tree in a rolling deploy: the layout of etcd's keys must not have changed since."""

SAID = pytest.StashKey[str]()
"""For the summary of a run: what the old worker was made of."""

_ROOT = Path(__file__).resolve().parents[2]
_PIP = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT")  # as in the Dockerfile
_PACKAGE = ("celery_etcd_lock", "pyproject.toml", "README.md", "LICENSE")


def build_arguments() -> dict[str, str]:
    """For the Dockerfile beside this file: what tells pip here where to look."""
    return {name: os.environ[name] for name in _PIP if name in os.environ}


class BuildContext:
    """A folder that an image is built from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._package = folder / "package"
        self._constraints = folder / "constraints.txt"
        self._constraints.touch()
        shutil.copy(Path(__file__).with_name("Dockerfile"), folder)

    def __str__(self) -> str:
        return str(self.folder)

    def take_this(self) -> None:
        """The package as it is here."""
        for name in _PACKAGE:
            source, target = _ROOT / name, self._package / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)

    def take_old(self) -> str:
        """The package of the commit `OLD`, else this one under another version, and the oldest Celery; in words."""
        shutil.copy(_ROOT / "tests" / "celery-oldest.txt", self._constraints)
        command = ["git", "-C", str(_ROOT), "archive", OLD, *_PACKAGE]
        try:
            packed = subprocess.run(command, check=True, capture_output=True).stdout
        except (OSError, subprocess.CalledProcessError) as missing:
            why = (getattr(missing, "stderr", b"") or str(missing).encode()).decode(errors="replace").strip()
            self.take_this()
            version = self._package / "celery_etcd_lock" / "__init__.py"
            version.write_text(re.sub(r'__version__ = ".*"', '__version__ = "0.0.0"', version.read_text()))
            return f"this tree once more, for the history does not go back to {OLD[:7]}: {why}"
        self._package.mkdir()
        subprocess.run(["tar", "-x", "-C", str(self._package)], input=packed, check=True)
        return f"commit {OLD[:7]}"
