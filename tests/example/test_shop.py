"""The whole shop, as ``make example`` starts it, looked at from outside."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_etcd_lock.testing import EtcdServer
from example_project.check import Browser, Check
from tests.servers import RedisServer, free_port
from tests.workers import until

ROOT = Path(__file__).resolve().parents[2]


class Shop:
    """``python -m example_project.run``."""

    def __init__(self, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._log = folder / "shop.log"
        command = [sys.executable, "-m", "example_project.run", f"--port={self.url.rpartition(':')[2]}"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "SHOP_JOB_SECONDS": "0.3", "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=log,
            )
        until(lambda: "What they say" in self.said() or self.process.poll() is not None, "the shop's opening")
        assert self.process.poll() is None, self.said()

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def groups(self) -> list[int]:
        """The process groups of its workers and beats."""
        return [int(group) for group in re.findall(r"kill -9 -(\d+)", self.said())]

    def close(self, number: signal.Signals = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def shop(etcd: EtcdServer, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """It has servers of its own; those of the tests say that there are programs for them."""
    shop = Shop(tmp_path_factory.mktemp("shop"))
    yield shop
    shop.close()


def test_its_promises_are_kept(shop: Shop) -> None:
    """Ten equal jobs run one at a time, or are skipped; two calls at once; readers beside readers; one beat sends."""
    command = [sys.executable, "-m", "example_project.check", shop.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok ") == 13, done.stdout


def test_the_check_finds_what_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    """Two that ran at once, a token that does not grow: each is a promise broken. Control: in order they are none."""

    def ran(second: int, seconds: int, token: int) -> dict[str, Any]:
        begin, end = (f"2026-01-01T00:00:{at:02}+00:00" for at in (second, second + seconds))
        return {"task": "a", "worker": "w@h", "pid": 1, "started": begin, "ended": end, "token": token, "state": "done"}

    for jobs, broken in (
        ([ran(0, 2, 1), ran(2, 2, 2)], 0),
        ([ran(0, 3, 1), ran(2, 2, 2)], 1),
        ([ran(0, 2, 2), ran(2, 2, 1)], 1),
        ([], 1),
    ):
        check = Check(Browser("http://unused"), 1)
        check.alone(jobs)
        assert check.broken == broken, capsys.readouterr().out


def test_only_the_page_s_own_form_sends_jobs(shop: Shop) -> None:
    """Not a link, nor a form of somebody else's; and a job that there is not is told of."""
    browser = Browser(shop.url)
    assert browser.get("/").count("csrfmiddlewaretoken") == 5
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{shop.url}/press", b"job=report", timeout=30)
    assert refused.value.code == 403
    refused.value.close()
    with pytest.raises(urllib.error.HTTPError) as unknown:
        browser.press("nothing")
    assert unknown.value.code == 400
    assert "report" in unknown.value.read().decode()


def test_the_page_shows_locks_that_are_held_and_who_waits(shop: Shop) -> None:
    """While ten jobs are at it: the lock with its holder, how many were put back, and each message as it stands."""
    browser = Browser(shop.url)
    press = browser.press("report")

    def seen() -> Any:
        live = browser.get("/live.json")
        locks = [lock for lock in live["locks"] if lock["title"] == "shop.nightly_report account_id=1"]
        return locks and locks[0]["holders"] and locks[0]["put_back"] and (locks[0], live)

    lock, live = until(seen, "a lock that is held while others wait")
    mine = {job["task_id"]: job for job in live["jobs"] if job["press"] == press}
    assert len(mine) == 10
    assert lock["mode"] == "exclusive"
    assert lock["holders"][0]["task_id"] in mine
    waiting = [job for job in mine.values() if job["state"] == "waiting"]
    assert waiting
    assert all("shop.nightly_report" in job["because"] for job in waiting)
    browser.ended(press, 60)


def test_a_browser_draws_the_page(shop: Shop, tmp_path: Path) -> None:
    """The page's script fills in rows of jobs, beats and ticks, and says of nothing that it went wrong."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on this machine")
    Browser(shop.url).press("import")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [chromium, *options, f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000", "--dump-dom", shop.url]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    trouble = re.search(r'<p id="trouble"[^>]*>(.*?)</p>', dom)
    assert trouble is not None
    assert not trouble[1]
    for place, rows, text in (("jobs", 10, "shop.import_products"), ("beats", 2, "leads"), ("ticks", 3, "an order")):
        drawn = dom.partition(f'id="{place}"')[2].partition("</table>")[0]
        assert drawn.count("<tr") > rows, drawn
        assert text in drawn
    assert dom.count('class="lane"') == 10


def test_ctrl_c_ends_all_of_it(shop: Shop) -> None:
    """Workers, beats and page have ended, and nothing is left of what they wrote. (Last: the shop is closed then.)"""
    groups, folder = shop.groups, re.search(r"What they say: (.*)/\*\.log", shop.said())
    assert len(groups) == 4
    assert folder
    assert Path(folder[1]).exists()
    assert shop.close() == 0, shop.said()
    assert shop.said().endswith("stopped\n")
    assert not Path(folder[1]).exists()
    for group in groups:
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(shop.url, timeout=5)
