"""Three beats through one fault of each kind; and what three of Celery's own do without any."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.beat.chaos import chaos, plain
from tests.beat.faults import SHORT


@pytest.mark.alone
@pytest.mark.together
def test_every_tick_once_through_a_kill_a_freeze_a_stop_and_an_etcd_without_its_leader(tmp_path: Path) -> None:
    outcome = chaos(tmp_path, SHORT)
    assert outcome.report.violations == []
    assert len(outcome.takeovers) == 3
    assert outcome.report.repeats, "the tick whose beat was killed after its publish comes again"


def test_three_plain_beats_send_every_tick_three_times(tmp_path: Path) -> None:
    """The positive control: the same check finds it."""
    violations = plain(tmp_path, 4.0).violations
    assert any("second: the slot" in each and "under 3 ids" in each for each in violations), violations
