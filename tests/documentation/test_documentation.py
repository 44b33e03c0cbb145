"""Every block of code in README and docs is executed, on a real etcd, with real workers and beats: see `run`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documentation.blocks import ROOT, blocks_of, pages
from tests.documentation.run import NOT_HERE
from tests.servers import skip_or_fail

_LONGEST = 300


def _run(page: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.documentation.run", page],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_LONGEST,
        check=False,
    )


@pytest.mark.parametrize("page", [page for page in pages() if blocks_of(page)])
def test_the_page_runs(page: str) -> None:
    """Each block does what it says, after those before it."""
    done = _run(page)
    if done.returncode == NOT_HERE:
        skip_or_fail(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nimport nothing_of_that_name\n```\n", "nothing_of_that_name"),
        ("```python\n@singleton_task(unique_on='nobody')\ndef task(one): ...\n```\n", "nobody"),
        ("```sh\ncelery -A proj etcd-lock lss\n```\n", "lss"),
        ("```sh\nmake nothing-of-that-name\n```\n", "nothing-of-that-name"),
        ("```sh\npip install celery-etcd-lock[nothing]\n```\n", "no extra nothing"),
        ("```console\n$ echo one\ntwo\n```\n", "printed\none"),
        ("```\ntext\n```\n", "no language"),
        ("```python\ndef test_it():\n    assert sync is None\n```\n", "1 failed"),
    ],
)
def test_a_page_that_is_wrong_fails(text: str, said: str, tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    page = tmp_path / "wrong.md"
    page.write_text("```python\nfrom celery_etcd_lock import singleton_task\n```\n\n" + text)
    done = _run(str(page))
    assert done.returncode not in {0, NOT_HERE}, done.stdout
    assert said in done.stdout
