"""``celery etcd-lock`` as a process of its own, in a pipe or in a terminal, as it is declared; and in this process."""

from __future__ import annotations

import fcntl
import inspect
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner

from celery_etcd_lock.cli import etcd_lock

__all__ = ["Said", "app_with", "declared", "here", "in_terminal", "metadata", "piped"]

_ROOT = Path(__file__).resolve().parents[2]
_LIMIT = 60


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str = ""


def declared() -> dict[str, dict[str, str]]:
    """The entry points in pyproject.toml: name and object by group."""
    text = (_ROOT / "pyproject.toml").read_text()
    found = re.findall(r'^\[project\.entry-points\.("[^"]+"|\w+)\]\n((?:.+\n)*)', text, re.MULTILINE)
    return {group.strip('"'): dict(re.findall(r'^([\w-]+) = "(.+)"$', lines, re.MULTILINE)) for group, lines in found}


def metadata(folder: Path) -> Path:
    """A folder for PYTHONPATH with what an install of this very tree would leave: so no install need be up to date."""
    info = folder / "celery_etcd_lock-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: celery-etcd-lock\nVersion: 0\n")
    lines = [
        line
        for group, points in declared().items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def app_with(endpoints: str | Sequence[str], **settings: Any) -> Celery:
    """An app without tasks. `settings`: without their ``etcd_lock_``."""
    app = Celery("proj", broker="memory://", set_as_current=False)
    app.conf.update({f"etcd_lock_{name}": value for name, value in {"endpoints": endpoints, **settings}.items()})
    return app


def here(app: Celery, *arguments: str) -> Said:
    """What the command says in this process. An exception that is no exit is raised."""
    apart = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}  # before click 8.2
    context = CLIContext(app, no_color=False, workdir=".")
    runner: Any = CliRunner(**apart)  # type: ignore[arg-type,unused-ignore]
    done = runner.invoke(etcd_lock, list(arguments), obj=context, catch_exceptions=False)
    return Said(done.exit_code, done.stdout, done.stderr)


def piped(environment: Mapping[str, str], *arguments: str) -> Said:
    """What ``celery -A project`` with `arguments` says into pipes."""
    done = subprocess.run(
        _command(arguments), env=dict(environment), capture_output=True, text=True, timeout=_LIMIT, check=False
    )
    return Said(done.returncode, done.stdout, done.stderr)


def in_terminal(environment: Mapping[str, str], columns: int, *arguments: str) -> Said:
    """What it says in a terminal that is `columns` wide, both outputs in one."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {name: value for name, value in environment.items() if name not in {"COLUMNS", "NO_COLOR"}}
    process = subprocess.Popen(
        _command(arguments), env={**env, "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 65536):
            said += chunk
    except OSError:  # so ends a terminal whose last program has left
        pass
    finally:
        os.close(ours)
    return Said(process.wait(_LIMIT), said.decode().replace("\r\n", "\n"))


def _command(arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "celery", "-A", "project", "etcd-lock", *arguments]
