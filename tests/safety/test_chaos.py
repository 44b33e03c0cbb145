"""Chaos runs, short ones: every kind of fault is really done and the lock holds; a broken lock is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from celery_etcd_lock.testing import EtcdNotFound, find_etcd
from tests.safety.chaos import chaos, main
from tests.safety.faults import KINDS, Fault
from tests.safety.history import read
from tests.servers import skip_or_fail

pytestmark = pytest.mark.slow

BESIDE = ("GIL held",)
"""What comes when a client's dice say so: not to be waited for here. `tests/safety` stages it elsewhere."""
EVERYTHING = [
    Fault(1.0, "network delays", "all", 0.8, 0.2),
    Fault(1.1, "key deleted", pick=0.3),
    Fault(1.2, "member killed", "leader", 0.3),
    Fault(1.3, "lease revoked", pick=0.4),
    Fault(1.4, "history compacted"),
    Fault(1.5, "holder killed", pick=0.1),
    Fault(1.6, "holder stopped", "", 4.0, 0.3),
    Fault(2.0, "network drops", "follower", 0.7, 0.9),
    Fault(3.0, "network resets", "follower", 0.3),
    Fault(3.5, "member stopped", "follower", 1.0),
    Fault(3.6, "network black hole", "leader", 1.5),
    Fault(5.0, "leader moved", "follower"),
    Fault(5.5, "network black hole", "all", 1.0),
]


@pytest.fixture(autouse=True)
def _etcd() -> None:
    try:
        find_etcd()
    except EtcdNotFound as missing:
        skip_or_fail(missing)


def test_every_fault_once(tmp_path: Path) -> None:
    """All kinds of faults, over both transports at once: each is done and written down, and the lock holds."""
    outcome = chaos(tmp_path, EVERYTHING, transport="both")
    assert outcome.good, outcome
    assert set(outcome.injected) == set(KINDS) - set(BESIDE)
    assert all(outcome.injected[fault.kind] for fault in EVERYTHING)
    noted = {fault.kind for fault in read(tmp_path).faults}
    assert noted == {"stopped", "continued", "killed", "key_deleted", "lease_revoked", "other"}
    assert outcome.report.acquisitions > 50


def test_a_broken_lock_is_found(tmp_path: Path) -> None:
    """Where waiters do not look for their own key any more, deleting keys is enough to show it."""
    faults = [Fault(1.0 + number / 5, "key deleted", pick=number % 10 / 10) for number in range(20)]
    outcome = chaos(tmp_path, faults, broken="own-key")
    assert "grant" in {violation.rule for violation in outcome.report.violations}
    assert not outcome.good


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run in which too little happens proves nothing: it says so, keeps the history, and how to replay it."""
    assert main(["--seconds=0", "--seed=7", "--transport=gateway", f"--history={tmp_path}"]) == 1
    said = capsys.readouterr().out
    assert said.count("make chaos SECONDS=0 SEED=7 ARGS='--transport gateway'") == 2
    assert "nothing was planned" in said
    assert str(tmp_path) in said
    assert list(tmp_path.glob("holder-*.jsonl"))
