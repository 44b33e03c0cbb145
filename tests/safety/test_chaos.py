"""Chaos runs, short ones: every kind of fault is really done and the lock holds; a broken lock is found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from celery_etcd_lock.testing import EtcdNotFound, find_etcd
from tests.safety.chaos import _too_little, chaos, main
from tests.safety.checker import check
from tests.safety.faults import KINDS, Fault, Kind
from tests.safety.history import History, read
from tests.safety.witness import Account
from tests.servers import skip_or_fail

pytestmark = [pytest.mark.alone, pytest.mark.together]

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("GIL held",)
"""What comes when a client's dice say so: not to be waited for here. `tests/safety` stages it elsewhere."""
EVERYTHING = [
    Fault(1.0, "network delays", "all", 0.8, pick=0.2),
    Fault(1.1, "key deleted", pick=0.3),
    Fault(1.2, "member killed", "leader", 0.3),
    Fault(1.3, "lease revoked", pick=0.4),
    Fault(1.4, "history compacted"),
    Fault(1.5, "holder killed", pick=0.1),
    Fault(1.6, "holder stopped", "", 4.0, pick=0.3),
    Fault(2.0, "network drops", "follower", 0.7, "right", pick=0.9),
    Fault(3.0, "network resets", "follower", 0.3),
    Fault(3.5, "member stopped", "follower", 1.0),
    Fault(3.6, "network black hole", "leader", 0.5),
    Fault(4.2, "network fades", "all", 4.0, "left"),
    Fault(5.0, "leader moved", "follower"),
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
    done = {"stopped", "continued", "killed", "key_deleted", "lease_revoked", "other"}
    assert noted == done | {"lease_promised", "session_ended"}
    assert outcome.report.acquisitions > 20


@pytest.mark.broken
def test_a_lock_that_does_not_look_for_its_own_key_is_found(tmp_path: Path) -> None:
    """By deleting keys: a waiter whose key has gone is let in all the same."""
    faults = [Fault(1 + number / 5, "key deleted", pick=number * 0.37 % 1) for number in range(40)]
    found = chaos(tmp_path, faults, broken="own-key").report.violations
    assert "grant" in {violation.rule for violation in found}


@pytest.mark.broken
def test_a_lease_that_is_trusted_for_too_long_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the client that hears of its renewals too late, if not in the first run; and a run says how to do it again."""
    asked = "SECONDS=20 SEED=7 ARGS=\"--ttl=4 --only='history compacted' --broken=trust\""
    assert f"make chaos {asked}" in (ROOT / "docs" / "safety.md").read_text()
    said = ["--seconds=20", "--seed=7", "--ttl=4", "--only=history compacted", "--broken=trust"]
    for run in range(3):  # whether anybody is in at the end of a lease that is trusted still is up to the machine
        folder = tmp_path / str(run)
        failed = main([*said, f"--history={folder}"])
        printed = capsys.readouterr().out
        if "- vouched: " in printed:
            break
    assert failed
    assert "- vouched: " in printed
    again = "SECONDS=20 SEED=7 ARGS=\"--ttl=4 --transport=both --only='history compacted' --broken=trust\""
    assert printed.count(f"make chaos {again}") == 2
    assert str(folder) in printed
    assert read(folder).events


def test_what_proves_nothing_fails() -> None:
    """A run in which nothing was done, or nobody got a lock, is not a good one."""
    nothing = check(History(), Account((), 1))
    assert _too_little(nothing, Counter(), Counter(), 10.0) == [
        "nothing was planned",
        "only 0 acquisitions in 10 s",
        "no process handed a lock over to another",
    ]
    planned: Counter[Kind] = Counter({"GIL held": 2, "key deleted": 1})
    assert _too_little(nothing, planned, Counter({"key deleted": 1}), 10.0)[0] == (
        "GIL held: was planned, and could not be done once"
    )
