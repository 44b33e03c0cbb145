"""A real RabbitMQ for tests: finds a rabbitmq-server, or installs one, and runs it.

`RabbitServer` listens on free loopback ports, has a node name, an epmd and a folder of its own, and goes when its
``with`` block or the process that started it ends: any number of them live side by side.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.servers import Server, fetching, free_port, install

__all__ = ["RabbitNotFound", "RabbitServer", "find_rabbit"]

# Debian's /usr/sbin/rabbitmq-server becomes another user, with an environment of its own, and knows one node only.
_PLACES = ("/usr/lib/rabbitmq/bin/rabbitmq-server", "/opt/rabbitmq/sbin/rabbitmq-server")

_GREETING = b"AMQP\x00\x00\x09\x01"
"""What a client of AMQP 0-9-1 says first. The server answers with a method frame: its first byte is 1."""

_ATTEMPTS = 5
"""To start, on other ports each time: it takes seconds, in which somebody else may take one."""

_CONFIG = """\
listeners.tcp.1 = 127.0.0.1:{port}
num_acceptors.tcp = 2
loopback_users.guest = true
disk_free_limit.absolute = 1MB
vm_memory_high_watermark.relative = 0.9
log.console = true
log.console.level = warning
log.file = false
"""


class RabbitNotFound(RuntimeError):
    """There is no rabbitmq-server on this machine, and none could be installed."""


def find_rabbit(*, fetch: bool = True) -> Path:
    """The rabbitmq-server to run: one that is installed, else (as root, where there is one) by apt-get.

    `fetch` False: one that is installed. `RabbitNotFound` says what to install.
    """
    found = _installed()
    if found is None and fetch:
        with fetching():
            found = _installed()
            if found is None:
                install("rabbitmq-server", "erlang-base")
                found = _installed()
    if found is None:
        raise RabbitNotFound(
            "no rabbitmq-server on this machine: install RabbitMQ (on Debian: apt-get install rabbitmq-server)"
        )
    return found


def _installed() -> Path | None:
    if shutil.which("erl") is None or shutil.which("epmd") is None:
        return None
    on_path = shutil.which("rabbitmq-server")
    places = [*_PLACES, *filter(None, [on_path])]
    return next((Path(place) for place in places if os.access(place, os.X_OK)), None)


class RabbitServer(Server):
    """One real rabbitmq-server; a context manager. `url` is the same after a restart, and so is what it held.

    `binary` None: what `find_rabbit` finds. `parameters`: of the Erlang application ``rabbit``.
    """

    log_name = "output"

    def __init__(self, *, binary: Path | None = None, parameters: Mapping[str, int] | None = None) -> None:
        super().__init__(binary or find_rabbit())
        self._parameters = dict(parameters or {})
        self._epmd_port = 0
        self._dist_port = 0
        self._epmd: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def start(self, *, timeout: float = 180.0) -> None:
        """Start the server, or start it again on its port, and wait until it speaks AMQP.

        `RuntimeError`, with what it said, when it does not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        first = not self.port
        attempts = 0
        while not self.running:
            attempts += 1
            if first:
                self.port, self._epmd_port, self._dist_port = free_port(), free_port(), free_port()
            self._spawn()
            while self.running and time.monotonic() < deadline:
                if self._answers():
                    return
                time.sleep(0.1)
            self.kill()
            if time.monotonic() > deadline or attempts == _ATTEMPTS:
                raise RuntimeError(f"{self.binary} on port {self.port} did not start; it said:\n{self._log()[-2000:]}")
            time.sleep(0.1)  # a port was taken: another one, or its own until it is let go

    def kill(self) -> None:
        """SIGKILL to the server and its epmd, and wait for the end: what was persistent is there after `start`."""
        if os.getpid() != self._owner:
            return
        for process in (self._process, self._epmd):
            if process is not None:
                # The group: the shell script that started the Erlang VM waits beside it. What the VM started, its
                # port programs, ends with it.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _spawn(self) -> None:
        folder = self._own_folder()
        (folder / "rabbitmq.conf").write_text(_CONFIG.format(port=self.port))
        parameters = ", ".join(f"{{{name}, {value}}}" for name, value in self._parameters.items())
        (folder / "advanced.config").write_text(f"[{{rabbit, [{parameters}]}}].\n")
        (folder / "plugins").write_text("[].\n")
        # Own epmd: that of the machine may be somebody else's, who ends it.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))}
        environment |= {
            "HOME": str(folder),  # the Erlang cookie is there
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"tests-{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "no-such-file"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            # One scheduler: an idle VM that spins on every processor slows all that is tested beside it.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
        }
        epmd = shutil.which("epmd")
        assert epmd is not None, "find_rabbit has looked"
        with (folder / self.log_name).open("wb") as output:
            self._epmd = self._start([epmd], environment, output.fileno())
            self._process = self._start([str(self.binary)], environment, output.fileno())

    def _start(self, command: list[str], environment: dict[str, str], output: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, env=environment, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 2) as client:
                client.sendall(_GREETING)
                return client.recv(1) == b"\x01"
        except OSError:
            return False
