"""How `celery` finds the command, and what that costs those who do not use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner

from celery_etcd_lock.cli import etcd_lock
from tests.cli.installed import declared, metadata


def test_the_entry_point_is_declared_and_is_the_command() -> None:
    """In pyproject.toml; and, where that is what is installed, in the installed package."""
    assert declared()["celery.commands"] == {"etcd-lock": "celery_etcd_lock.cli:etcd_lock"}
    assert etcd_lock.name == "etcd-lock"
    for point in entry_points(group="celery.commands"):
        if point.name == "etcd-lock":
            assert point.load() is etcd_lock


def test_celery_loads_no_command_before_it_is_called_for(tmp_path: Path) -> None:
    """`celery --help` shows the group, and has imported none of its modules nor opened the wire."""
    code = (
        "import json, sys; from celery.bin.celery import celery; group = celery.commands['etcd-lock']; "
        "print(json.dumps([group.get_short_help_str(60), sorted(sys.modules)]))"
    )
    path = os.pathsep.join([str(metadata(tmp_path)), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    said, modules = json.loads(done.stdout)
    assert said == "Locks on etcd: who holds them, and who waits."
    assert [name for name in modules if name.startswith("celery_etcd_lock.cli.")] == []
    assert "celery_etcd_lock.etcd.gateway" not in modules


def test_options_that_a_project_adds_to_all_commands() -> None:
    """Celery hands them to the group, as to every command."""
    app = Celery("proj", set_as_current=False)
    option = click.Option(["--tenant"])
    app.user_options["preload"].add(option)
    etcd_lock.params.append(option)
    try:
        context = CLIContext(app, no_color=True, workdir=".")
        done = CliRunner().invoke(etcd_lock, ["--tenant", "a", "ls", "--help"], obj=context, catch_exceptions=False)
    finally:
        etcd_lock.params.remove(option)
    assert done.exit_code == 0
    assert "Filters:" in done.output


def test_each_command_has_its_help() -> None:
    """What the list of commands shows is a sentence that is not cut off."""
    shown = CliRunner().invoke(etcd_lock, ["--help"], terminal_width=80).output
    listed = shown.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == ["ls", "show", "why", "sessions", "beat", "history", "doctor"]
    assert not [line for line in listed if line.endswith("...")]
