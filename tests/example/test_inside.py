"""The shop's models and its schedule, each checked in a process of the shop's own: `inside` has the checks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from celery_etcd_lock.testing import EtcdServer

ROOT = Path(__file__).resolve().parents[2]
# Read, not imported: that would set up Django here.
_CHECKS = re.findall(r"^        (\w+),$", (Path(__file__).parent / "inside.py").read_text(), re.MULTILINE)


@pytest.mark.parametrize("check", _CHECKS)
def test_inside(check: str, etcd: EtcdServer, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "CELERY_ETCD_LOCK_ENDPOINTS": etcd.url,
        "SHOP_DATABASE": str(tmp_path / "db.sqlite3"),
        "SHOP_NAMESPACE": uuid.uuid4().hex,
    }
    command = [sys.executable, "-m", "tests.example.inside", check]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_check_is_run() -> None:
    """There are six."""
    assert len(_CHECKS) == 6
