"""Fixtures of the smoke tests, where there is a pytest-celery; where there is none, each test module says so."""

from importlib.util import find_spec

if find_spec("pytest_celery"):
    from tests.smoke.fixtures import *  # noqa: F403 - fixtures are found where they are imported
