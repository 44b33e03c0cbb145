"""Fixtures of the smoke tests, where there is a pytest-celery; where there is none, each test module says so."""

from importlib.util import find_spec

import pytest

from tests.smoke.images import SAID

if find_spec("pytest_celery"):
    from tests.smoke.fixtures import *  # noqa: F403 - fixtures are found where they are imported


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what ran beside this tree in the rolling deploy."""
    if said := config.stash.get(SAID, ""):
        terminalreporter.write_line(said)
