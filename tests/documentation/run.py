"""Executes the blocks of one page, in their order: ``python -m tests.documentation.run docs/beat.md``.

One process a page, in a folder of its own, with an etcd and a Redis of its own when something asks for them. In what
a page shows, the usual addresses stand for those: ``http://127.0.0.1:2379``, three members, ``redis://localhost:6379``.

* ``python`` is executed, with the names of the blocks before it. One with a ``def test_`` is run by pytest. One that
  begins with ``# name.py`` is written as that file, and imported. Of ``python docker`` the syntax is looked at.
* ``sh`` is run by bash, which must end with 0. A server in the foreground (``etcd``, a worker, a beat) goes on until
  the page ends, once it is ready. ``make`` and ``pip`` do not do what they say: that such a target, such a package
  and such an extra exist is what is checked.
* ``console``: each line after ``$`` is run like that, and must print what stands below it; ``...`` is anything.
"""

from __future__ import annotations

import contextlib
import doctest
import gc
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from celery.local import Proxy

from celery_etcd_lock import current_lock
from celery_etcd_lock.testing import EtcdServer, find_etcd
from tests.documentation import given
from tests.documentation.blocks import ROOT, Block, blocks_of
from tests.servers import RedisServer, etcd3_environment, find_redis

__all__ = ["NOT_HERE", "main"]

NOT_HERE = 75
"""The exit status where a program that a page uses cannot be had; which, and why, is the last line that is printed."""

_ETCD, _REDIS = "http://127.0.0.1:2379", "redis://localhost:6379"
_MEMBERS = "http://etcd-1:2379,http://etcd-2:2379,http://etcd-3:2379"
_SECONDS = 120
_READY = re.compile(r"celery@\S+ ready\.|beat: Starting|beat: .*(leads|stands by)|etcd_lock\.(leader_elected|standby)")
_SERVER = re.compile(r"^(?P<etcd>etcd) -|^celery .*\b(worker|beat)\b(?!.*--help)")
_CHECK_MAKE = 'exec {make} --no-print-directory -n -C {root} "$@" >/dev/null\n'
_CHECK_PIP = 'exec {python} -m tests.documentation.installing "$@"\n'


class Page:
    def __init__(self, page: str, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.names: dict[str, Any] = {"__name__": "page"}
        self.servers: list[subprocess.Popen[str]] = []
        self._doors = contextlib.ExitStack()
        self._etcd_options: list[str] = []

    def close(self) -> None:
        self.names.clear()
        gc.collect()  # results that are waited for say good-bye to their Redis
        for server in reversed(self.servers):
            server.terminate()
        for server in self.servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()
        self._doors.close()

    @cached_property
    def etcd(self) -> EtcdServer:
        return self._doors.enter_context(EtcdServer(extra_args=self._etcd_options))

    @cached_property
    def redis(self) -> RedisServer:
        return self._doors.enter_context(RedisServer())

    def here(self, code: str) -> str:
        """With the addresses of this page's own servers."""
        for address in (_MEMBERS, _ETCD):
            if address in code:
                code = code.replace(address, self.etcd.url)
        if _REDIS in code:
            code = code.replace(_REDIS, self.redis.url.removesuffix("/0"))
        return code

    def prepare(self) -> None:
        """The reader's project."""
        project = self.folder / "proj"
        project.mkdir()
        (project / "__init__.py").write_text(self.here(given.PROJECT))
        for name, text in given.FILES.items():
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        stubs = self.folder / "bin"
        stubs.mkdir()
        values = {"root": shlex.quote(str(ROOT)), "python": shlex.quote(sys.executable), "make": _which("make")}
        for name, text in (("make", _CHECK_MAKE), ("pip", _CHECK_PIP)):
            (stubs / name).write_text("#!/bin/sh\n" + text.format(**values))
            (stubs / name).chmod(0o755)
        for tool in ("etcdctl", "etcdutl"):  # of the very etcd that is used
            if (beside := find_etcd().with_name(tool)).exists():
                (stubs / tool).symlink_to(beside)
        os.chdir(self.folder)
        os.environ.update(given.ENVIRONMENT)
        sys.path.insert(0, str(self.folder))
        self._execute("from proj import app, sync\n" + given.GIVEN.get(self.page, ""), "given")

    def run(self, block: Block) -> None:
        {"python": self._python, "sh": self._sh, "console": self._console}[block.language](block)

    def finish(self) -> None:
        self._execute(given.AFTERWARDS.get(self.page, ""), "afterwards")

    # Python

    def _execute(self, code: str, where: str, line: int = 1) -> None:
        # With the page's own line numbers, for tracebacks.
        exec(compile("\n" * (line - 1) + self.here(code), where, "exec"), self.names)
        for value in list(self.names.values()):
            if issubclass(type(value), Proxy) and value is not current_lock:
                repr(value)  # a shared task is made, and its options looked at, when it is first used

    def _python(self, block: Block) -> None:
        if block.needs_docker:
            compile(block.code, str(block), "exec")
        elif block.file:
            self._show_file(block, block.file["path"], append=bool(block.file["more"]))
        elif re.search(r"^def test_", block.code, re.MULTILINE):
            self._test(block)
        else:
            self.names["__name__"] = f"block{block.line}"  # tasks of one name in two blocks are two tasks
            self._execute(block.code, block.page, block.line)

    def _show_file(self, block: Block, path: str, *, append: bool) -> None:
        target = self.folder / path
        target.parent.mkdir(exist_ok=True)
        with target.open("a" if append else "w") as file:
            file.write(self.here(block.code))
        module = path.removesuffix(".py").replace("/", ".")
        others = etcd3_environment() if "import etcd3" in block.code else {}
        extra = os.pathsep.join(filter(None, [str(self.folder), others.pop("PYTHONPATH", "")]))
        done = self._bash(f"{shlex.quote(sys.executable)} -c 'import {module}'", {**others, "PYTHONPATH": extra})
        assert done.returncode == 0, f"{block}: {path} cannot be imported:\n{done.stdout}"
        importlib.invalidate_caches()

    def _test(self, block: Block) -> None:
        path = self.folder / f"test_{block.line}.py"
        path.write_text(given.BEFORE_TESTS + self.here(block.code))
        arguments = ["-q", "-p", "no:cacheprovider", path.name]
        done = self._bash(shlex.join([sys.executable, "-m", "pytest", *arguments]), {})
        assert done.returncode == 0, f"{block}: its tests fail:\n{done.stdout}"
        assert " passed" in done.stdout, f"{block}: none of its tests ran:\n{done.stdout}"

    # Shell

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        path = [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        return {
            **os.environ,
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)]),
            "PYTHONDONTWRITEBYTECODE": "1",  # files of this folder change within a second
            "COLUMNS": "80",
            "CELERY_ETCD_LOCK_ENDPOINTS": self.etcd.url,
            "ETCDCTL_API": "3",
            "ETCDCTL_ENDPOINTS": self.etcd.url,
            **more,
        }

    def _bash(self, script: str, more: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env=self._environment(more),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS,
            check=False,
        )

    def _sh(self, block: Block) -> None:
        server = _SERVER.match(block.code)
        if server and server["etcd"]:
            self._start_etcd(block)
        elif server:
            self._start(block)
        else:
            self._needs(block)
            done = self._bash(self.here(block.code), {})
            assert done.returncode in _statuses(block.code), f"{block}: ends with {done.returncode}:\n{done.stdout}"
            assert "Traceback" not in done.stdout, f"{block}:\n{done.stdout}"

    def _needs(self, block: Block) -> None:
        for program in ("etcdctl", "etcdutl", "openssl"):
            if re.search(rf"\b{program} ", block.code) and not self._bash(f"command -v {program}", {}).stdout:
                _not_here(f"{block}: {program} is not on this machine")
        if (
            "--bump-revision" in block.code
            and "bump-revision" not in self._bash("etcdutl snapshot restore --help", {}).stdout
        ):
            _not_here(f"{block}: this etcdutl knows no --bump-revision, which came with etcd 3.5.10")

    def _start_etcd(self, block: Block) -> None:
        """As the page's own etcd if there is none yet, else beside it, to see that it starts."""
        options = shlex.split(block.code, comments=True)[1:]
        if "etcd" in self.__dict__:
            with EtcdServer(extra_args=[_absolute(option, self.folder) for option in options]):
                pass
        else:
            self._etcd_options = options
            assert self.etcd.running

    def _start(self, block: Block) -> None:
        log = self.folder / f"server-{block.line}.log"
        script = "exec " + self.here(block.code).strip() + " --loglevel=INFO"
        with log.open("w") as file:
            server = subprocess.Popen(
                ["bash", "-c", script], env=self._environment({}), stdout=file, stderr=file, text=True
            )
        self.servers.append(server)
        deadline = time.monotonic() + _SECONDS
        while not _READY.search(log.read_text()):
            assert server.poll() is None, f"{block}: ended with {server.returncode}:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"{block}: is not ready:\n{log.read_text()}"
            time.sleep(0.05)

    def _console(self, block: Block) -> None:
        for command, wanted in _typed(block.code):
            done = self._bash(self.here(command), {})
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            said = f"{block}: {command}\nended with {done.returncode} and printed\n{done.stdout}"
            assert doctest.OutputChecker().check_output(wanted, done.stdout, flags), said
            assert done.returncode == 0, said


def _typed(code: str) -> Iterator[tuple[str, str]]:
    """The commands of a console, each with what it is to print."""
    for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
        command, _, wanted = part.partition("\n")
        yield command, wanted


def _statuses(code: str) -> set[int]:
    """Those with which a block may end: `why` and `show` end with 1 where there is nothing of that name."""
    return {0, 1} if re.search(r"etcd-lock (why|show|doctor)\b", code) else {0}


def _absolute(option: str, folder: Path) -> str:
    return re.sub(r"=(\w+\.(?:pub|key|crt))", lambda found: f"={folder / found[1]}", option)


def _which(program: str) -> str:
    return shlex.quote(shutil.which(program) or program)


def _not_here(reason: str) -> NoReturn:
    print(reason)
    raise SystemExit(NOT_HERE)


def main(page: str) -> None:
    find_redis()
    with tempfile.TemporaryDirectory(prefix="page-") as folder:
        opened = Page(page, Path(folder))
        try:
            opened.prepare()
            for block in blocks_of(page):
                print(block, block.language, flush=True)
                opened.run(block)
            opened.finish()
        finally:
            opened.close()
            os.chdir(ROOT)


if __name__ == "__main__":
    main(*sys.argv[1:])
