"""etcd with its doors locked: roles, tokens, passwords and certificates, and locks that are held and waited for."""

from __future__ import annotations

import logging
import os
import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from celery_etcd_lock.etcd.api import TLS, Range
from celery_etcd_lock.exceptions import (
    AuthRejected,
    ConfigError,
    EtcdLockError,
    EtcdRejected,
    LockContended,
    PermissionDenied,
)
from celery_etcd_lock.locks import Election, HeldLock, Mutex, RWLock, Semaphore, Session
from celery_etcd_lock.locks.asked import Asking, owner_of
from celery_etcd_lock.testing import EtcdServer, ServerTLS
from tests.etcd.test_gateway import Certificates
from tests.servers import skip_or_fail
from tests.workers import until

Kind = Literal["gateway", "grpc"]
KINDS: tuple[Kind, ...] = ("gateway", "grpc")

_DOC = (Path(__file__).resolve().parent.parent.parent / "docs" / "security.md").read_text()
_COMMANDS = {
    section.partition("\n")[0]: section.partition("```sh\n")[2].partition("```")[0]
    for section in _DOC.split("\n## ")
    if "```sh\n" in section
}
ROLE, USER = "celery-locks", "celery"
ROOT_PASSWORD, PASSWORD, OTHER_PASSWORD = "correct-horse", "battery-staple", "another-staple"

SECRETS = re.compile(
    rf"{ROOT_PASSWORD}|{PASSWORD}|{OTHER_PASSWORD}"
    r"|PRIVATE KEY"
    r"|\b[A-Za-z]{16}\.\d+\b"  # a simple token
    r"|eyJ[\w-]{10}"  # a JWT
)


def run_in_shell(script: str, **environment: str) -> str:
    done = subprocess.run(
        ["/bin/sh", "-ec", script], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, f"{script}\n{done.stderr}"
    return done.stdout


def etcdctl(server: EtcdServer, *args: str, typing: str = "") -> str:
    """As root, once there is one."""
    assert server.etcdctl
    command = [str(server.etcdctl), "--endpoints", server.url, "--user", f"root:{ROOT_PASSWORD}", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, input=typing).stdout


def guard(server: EtcdServer, *, enable: bool = True) -> None:
    """What docs/security.md says, as it stands there."""
    assert server.etcdctl
    script = _COMMANDS["A user that may touch its locks, and nothing else"]
    assert "etcdctl auth enable\n" in script
    run_in_shell(
        script if enable else script.replace("etcdctl auth enable\n", ""),
        PATH=f"{server.etcdctl.parent}:{os.environ['PATH']}",
        ETCDCTL_API="3",
        ETCDCTL_ENDPOINTS=server.url,
        ROOT_PASSWORD=ROOT_PASSWORD,
        LOCK_PASSWORD=PASSWORD,
    )


def log_ins(server: EtcdServer) -> int:
    """How many log-ins the server has seen begin."""
    found = re.search(r'grpc_server_started_total\{grpc_method="Authenticate".*\} (\d+)', server.metrics())
    return int(found[1]) if found else 0


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    value: Kind = request.param
    return value


@pytest.fixture
def open_session(etcd: EtcdServer) -> Iterator[Callable[..., Session]]:
    """Opens sessions as the user of the docs, and closes them at the end."""
    opened: list[Session] = []

    def open_(server: EtcdServer | str, kind: Kind, **options: Any) -> Session:
        url = server if isinstance(server, str) else server.url
        asked: dict[str, Any] = {"username": USER, "password": PASSWORD, "ttl": 30, **options}
        try:
            opened.append(Session.open(url, transport=kind, **asked))
        except ConfigError as missing:
            skip_or_fail(missing)
        return opened[-1]

    yield open_
    for session in opened:
        session.close()


OpenSession = Callable[..., Session]


@pytest.fixture(autouse=True)
def no_secret_is_told(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever a test here does: no log record of anybody's, and nothing on the terminal, has a secret in it."""
    caplog.set_level(logging.DEBUG)
    for name in ("urllib3", "celery_etcd_lock", "asyncio"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    yield
    assert not SECRETS.search(caplog.text)
    told = capfd.readouterr()
    assert not SECRETS.search(told.out + told.err)


def test_the_check_for_secrets_finds_them(caplog: pytest.LogCaptureFixture) -> None:
    """The control of the one above."""
    told = [PASSWORD, "-----BEGIN PRIVATE KEY-----", "token=oAoBOIFrhAFyLTqk.11", "Bearer eyJhbGciOiJSUzI1NiJ9.e30"]
    assert all(SECRETS.search(each) for each in told)
    logging.getLogger("anybody").debug("%s", told[0])
    assert SECRETS.search(caplog.text)
    caplog.clear()


def discreet(error: BaseException) -> str:
    """The message of `error`, after a look at whether it, its like or its causes tell a secret."""
    each: BaseException | None = error
    while each is not None:
        assert not SECRETS.search(f"{each} {each!r} {each.args!r}")
        each = each.__cause__ or each.__context__
    return str(error)


def requests(session: Session) -> int:
    transport: Any = session.transport
    count: int = transport.requests
    return count


class Waiter:
    """Somebody who waits for a lock in a thread of its own."""

    def __init__(self, acquire: Callable[[], HeldLock]) -> None:
        self.result: HeldLock | EtcdLockError | None = None
        self._acquire = acquire
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._acquire()
        except EtcdLockError as error:
            self.result = error

    def held(self) -> HeldLock:
        """The lock, once it is there."""
        result = until(lambda: self.result, "the end of the waiting", seconds=30)
        if isinstance(result, EtcdLockError):
            raise result
        assert isinstance(result, HeldLock)
        return result


def in_line(session: Session, name: str, count: int = 2) -> None:
    """Wait until that many stand in the queue of `name`."""
    span = Range(name + "/", name + "0", count_only=True)
    until(lambda: session.transport.range(span).count >= count, "the queue")


# -- roles


@pytest.fixture(scope="module")
def guarded(etcd: EtcdServer) -> Iterator[EtcdServer]:
    """A server with the users and the role of the docs."""
    with EtcdServer(extra_args=["--bcrypt-cost=4"]) as server:
        guard(server)
        yield server


@pytest.fixture
def name(prefix: str) -> str:
    """A lock below the namespace."""
    return f"/celery/locks{prefix.rstrip('/')}"


def use_every_lock(one: Session, other: Session, name: str) -> None:
    """Each kind of lock, held by one session and waited for by the other."""
    held = Mutex(one, name + "-mutex").acquire()
    with pytest.raises(LockContended):
        Mutex(other, name + "-mutex").acquire(blocking=False)
    waiting = Waiter(lambda: Mutex(other, name + "-mutex").acquire(timeout=30))
    in_line(one, name + "-mutex")
    assert held.release() == "released"
    after = waiting.held()
    assert after.fencing_token > held.fencing_token
    assert after.release() == "released"

    catalog = RWLock(one, name + "-rw"), RWLock(other, name + "-rw")
    readers = catalog[0].read().acquire(), catalog[1].read().acquire()
    writing = Waiter(lambda: catalog[0].write().acquire(timeout=30))
    in_line(one, name + "-rw", 3)
    assert [reader.release() for reader in readers] == ["released"] * 2
    assert writing.held().release() == "released"

    slots = [Semaphore(each, name + "-slots", limit=2) for each in (one, other, other)]
    first, second = slots[0].acquire(), slots[1].acquire()
    third = Waiter(lambda: slots[2].acquire(timeout=30))
    in_line(one, name + "-slots", 3)
    assert first.release() == "released"
    assert [third.held().release(), second.release()] == ["released"] * 2

    asked = Mutex(one, name + "-asked").acquire()
    (kv,), owner = other.transport.range(Range(asked.key)).kvs, owner_of(other.transport, one.lease)
    assert owner is not None
    wish = Asking(other.transport, owner, kv, by="ann@desk", at="2026-01-02T03:04:05Z")
    assert wish.ask()
    one._check_keys()
    assert (asked.is_held(), wish.look(), asked.release()) == (False, "told", "lost")

    election = Election(one, name + "-lead")
    leadership = election.campaign("one")
    with Election(other, name + "-lead").observe() as leaders:
        assert next(leaders).value == "one"
        leadership.proclaim("one, ready")
        assert next(leaders).value == "one, ready"
        following = Waiter(lambda: Election(other, name + "-lead").campaign("other", timeout=30))
        in_line(one, name + "-lead")
        assert leadership.resign() == "released"
        assert following.held().release() == "released"


def test_the_docs_have_what_is_run_here() -> None:
    """Both scripts are found."""
    assert list(_COMMANDS) == ["A user that may touch its locks, and nothing else", "Tokens"]


def test_the_namespace_is_all_a_user_needs(
    guarded: EtcdServer, open_session: OpenSession, kind: Kind, name: str
) -> None:
    """With readwrite on `/celery/` sessions and every lock work; a look at the keys, and nothing is left behind."""
    one, other = open_session(guarded, kind), open_session(guarded, kind)
    use_every_lock(one, other, name)
    one.keep()
    assert one.transport.range(Range(name, name + "~", count_only=True)).count == 0


def test_outside_the_namespace_the_error_says_what_to_grant(
    guarded: EtcdServer, open_session: OpenSession, kind: Kind, name: str
) -> None:
    """One request, one error, with user, prefix and a command; and the command is what was missing."""
    session = open_session(guarded, kind)
    outside = f"/maintenance-{kind}"
    attempts: list[Callable[[], object]] = [
        lambda: Mutex(session, outside).acquire(),
        lambda: Mutex(session, outside).acquire(blocking=False),
        lambda: RWLock(session, outside).read().acquire(timeout=5),
        lambda: Semaphore(session, outside, limit=2).acquire(),
        lambda: Election(session, outside).campaign("me"),
        lambda: Election(session, outside).leader(),
    ]
    said = set()
    for attempt in attempts:
        before = requests(session)
        with pytest.raises(PermissionDenied, match=f"permission denied to user '{USER}'") as error:
            attempt()
        assert requests(session) == before + 1
        said.add(discreet(error.value))
    (message,) = said
    assert message.startswith(guarded.url)
    assert not session.contenders.unfinished
    grant = message[message.index("etcdctl") :].replace("ROLE", ROLE)
    assert grant == f"etcdctl role grant-permission {ROLE} readwrite --prefix {outside}/"
    etcdctl(guarded, *shlex.split(grant)[1:])
    with Mutex(session, outside).acquire(timeout=30) as held:
        assert held.is_held()
    assert Election(session, outside).leader() is None


def test_reading_alone_is_not_enough(guarded: EtcdServer, open_session: OpenSession, kind: Kind) -> None:
    """A session is refused with the namespace's prefix and the command; no lease is left by ten attempts."""
    user, role, namespace = f"reader-{kind}", f"role-{kind}", f"reading-{kind}"
    etcdctl(guarded, "role", "add", role)
    etcdctl(guarded, "role", "grant-permission", role, "read", "--prefix", f"/{namespace}/")
    etcdctl(guarded, "user", "add", user, "--interactive=false", typing=PASSWORD)
    etcdctl(guarded, "user", "grant-role", user, role)
    leases = etcdctl(guarded, "lease", "list")
    for _ in range(10):
        with pytest.raises(PermissionDenied) as error:
            open_session(guarded, kind, username=user, namespace=namespace)
        message = discreet(error.value)
        assert f"permission denied to user '{user}'" in message
        assert f"role grant-permission ROLE readwrite --prefix /{namespace}/" in message
    assert etcdctl(guarded, "lease", "list") == leases


def test_a_role_revoked_while_a_lock_is_held(
    etcd: EtcdServer, open_session: OpenSession, caplog: pytest.LogCaptureFixture
) -> None:
    """The holder keeps it; the release is refused, said once, and done when the role is back. If that stays away the
    session ends after a TTL, and the lock comes free."""
    with EtcdServer(extra_args=["--bcrypt-cost=4"]) as server:
        guard(server)
        owner = open_session(server, "gateway", username="root", password=ROOT_PASSWORD)
        others: list[tuple[Session, HeldLock]] = []
        for kind in KINDS:
            name, session = f"/celery/locks/{kind}", open_session(server, kind, ttl=3)
            held, other = Mutex(session, name).acquire(), Mutex(session, name + "-other").acquire()
            waiting = Waiter(partial(Mutex(owner, name).acquire, timeout=60))
            in_line(owner, name)
            etcdctl(server, "user", "revoke-role", USER, ROLE)
            with pytest.raises(PermissionDenied, match="--prefix /celery/"):
                Mutex(session, name + "-new").acquire()
            assert held.release() == "unanswered"
            assert waiting.result is None
            etcdctl(server, "user", "grant-role", USER, ROLE)
            waiting.held().release()
            assert other.is_held()
            others.append((session, other))
        etcdctl(server, "user", "revoke-role", USER, ROLE)
        caplog.clear()
        for _, other in others:
            assert other.is_held()
            assert other.release() == "unanswered"
        for session, other in others:
            Mutex(owner, other.name).acquire(timeout=60).release()
            assert "etcd has refused for 3 s to take back" in session.reason
        assert [record.msg for record in caplog.records].count("etcd_lock.removal_refused: %s: %s") == len(others)


# -- tokens and passwords


@dataclass
class Scene:
    """A lock that is held, waited for and watched."""

    kind: Kind
    server: EtcdServer
    holder: Session
    held: HeldLock
    waiting: Waiter
    waiter: Session

    @classmethod
    def set(cls, kind: Kind, server: EtcdServer, open_session: OpenSession, name: str, **options: Any) -> Scene:
        holder, waiter = open_session(server, kind, **options), open_session(server, kind, **options)
        held = Mutex(holder, name).acquire()
        waiting = Waiter(lambda: Mutex(waiter, name).acquire(timeout=60))
        in_line(holder, name)
        return cls(kind, server, holder, held, waiting, waiter)

    def goes_on(self) -> None:
        """The lock is held, and passes to the waiter."""
        what = f"{self.kind} at {self.server}"
        assert self.held.is_held(), what
        assert self.waiting.result is None, what
        assert self.held.release() == "released", what
        with self.waiting.held() as after:
            assert after.fencing_token > self.held.fencing_token, what


@pytest.fixture(scope="module")
def jwt_keys(etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys of the docs."""
    folder = tmp_path_factory.mktemp("jwt")
    run_in_shell(f"cd {folder}\n{_COMMANDS['Tokens']}")
    return folder


def test_tokens_that_expire(open_session: OpenSession, jwt_keys: Path, name: str) -> None:
    """Simple and JWT, on both transports: holders keep their lock, waiters get it, and hundreds of requests at once
    with a token that has expired are one log-in."""
    option = re.search(r"--auth-token=jwt\S+", _DOC)
    assert option
    jwt = option[0].replace("jwt.", f"{jwt_keys}/jwt.").replace("ttl=10m", "ttl=2s")
    with (
        EtcdServer(extra_args=["--bcrypt-cost=4", "--auth-token-ttl=2"]) as simple,
        EtcdServer(extra_args=["--bcrypt-cost=4", jwt]) as signed,
    ):
        scenes = []
        for server in (simple, signed):
            guard(server)
            scenes += [Scene.set(kind, server, open_session, f"{name}-{kind}") for kind in KINDS]
        seen = {server: log_ins(server) for server in (simple, signed)}
        time.sleep(4)  # to ask whether they have expired would prolong them: the renewals are due after ten seconds
        for scene in scenes:
            begun, transport = time.monotonic(), scene.holder.transport
            with ThreadPoolExecutor(16) as threads:
                found = list(threads.map(lambda _: transport.range(Range(name)).count, range(300)))  # noqa: B023
            assert found == [0] * 300
            # One, and more only where all of this takes longer than a token lives.
            assert 1 <= log_ins(scene.server) - seen[scene.server] <= 1 + (time.monotonic() - begun)
            scene.goes_on()
            assert log_ins(scene.server) - seen[scene.server] <= 4 + 3 * (time.monotonic() - begun)
            seen[scene.server] = log_ins(scene.server)


def test_a_restarted_etcd_has_forgotten_its_tokens(etcd: EtcdServer, open_session: OpenSession, name: str) -> None:
    """Leases outlive the restart, tokens do not: holders hold, and waiters get the lock."""
    with EtcdServer(extra_args=["--bcrypt-cost=4"]) as server:
        guard(server)
        scenes = [Scene.set(kind, server, open_session, f"{name}-{kind}") for kind in KINDS]
        server.stop()
        server.start()
        for scene in scenes:
            scene.goes_on()
        assert log_ins(server) <= 4 * 2 * len(scenes), "of two sessions each, since the restart"


def test_a_password_that_is_changed_under_a_lock(guarded: EtcdServer, open_session: OpenSession, name: str) -> None:
    """The holder keeps its lock, everything else is one clear error, and a hundred attempts are few log-ins."""
    holders: list[tuple[Kind, HeldLock, HeldLock, Session]] = []
    users = {kind: f"changing-{kind}" for kind in KINDS}
    for kind, user in users.items():
        etcdctl(guarded, "user", "add", user, "--interactive=false", typing=PASSWORD)
        etcdctl(guarded, "user", "grant-role", user, ROLE)
        session = open_session(guarded, kind, username=user, ttl=3)
        first, second = (Mutex(session, f"{name}-{kind}-{number}").acquire() for number in (1, 2))
        holders.append((kind, first, second, session))
    for user in users.values():
        etcdctl(guarded, "user", "passwd", user, "--interactive=false", typing=OTHER_PASSWORD)
    before, begun = log_ins(guarded), time.monotonic()
    for kind, first, _, session in holders:
        for _ in range(100):
            with pytest.raises(AuthRejected, match=f"does not accept user '{users[kind]}' with this password") as error:
                Mutex(session, name + "-other").acquire()
        assert "etcd_lock_username, etcd_lock_password" in discreet(error.value)
        assert first.release() == "unanswered"
    until(lambda: time.monotonic() - begun > 3.5, "more than a TTL")
    assert all(second.is_held() for _, _, second, _ in holders), "it is renewed all the same"
    # Each: at first, and then after a second, two, four and so on.
    assert 1 <= log_ins(guarded) - before <= len(holders) * (2 + time.monotonic() - begun)
    for user in users.values():
        etcdctl(guarded, "user", "passwd", user, "--interactive=false", typing=PASSWORD)
    other = open_session(guarded, "gateway")
    for _, first, second, _ in holders:
        with Mutex(other, first.name).acquire(timeout=30):
            assert second.is_held(), "the session has logged in again, and gone on where it was"


def test_auth_enabled_and_disabled_under_locks(etcd: EtcdServer, open_session: OpenSession, name: str) -> None:
    """Who has a password goes on; who has none keeps its lock and is told what to set; disabled, all go on."""
    with EtcdServer(extra_args=["--bcrypt-cost=4"]) as server:
        guard(server, enable=False)
        scenes = [Scene.set(kind, server, open_session, f"{name}-{kind}") for kind in KINDS]
        nobody = {"username": None, "password": None, "ttl": 3}
        strangers = [Scene.set(kind, server, open_session, f"{name}-{kind}-2", **nobody) for kind in KINDS]
        subprocess.run(
            [str(server.etcdctl), "--endpoints", server.url, "auth", "enable"], check=True, capture_output=True
        )
        for scene in scenes:
            scene.goes_on()
        for scene in strangers:
            for _ in range(20):
                with pytest.raises(AuthRejected, match="etcd_lock_username, etcd_lock_password"):
                    Mutex(scene.holder, name).acquire()
        enabled = time.monotonic()
        until(lambda: time.monotonic() - enabled > 3.5, "more than a TTL")
        etcdctl(server, "auth", "disable")
        for scene in strangers:
            assert scene.held.is_held()
            assert scene.held.release() == "released"
        again = [Scene.set(kind, server, open_session, f"{name}-{kind}-3") for kind in KINDS]
        for scene in again:
            scene.goes_on()


# -- TLS


class CountingProxy:
    """Passes connections on to `target`, and counts them."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> CountingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        for thread in self._threads:
            thread.join()
        for sock in (self._server, *self._sockets):
            sock.close()

    def hang_up(self) -> None:
        """End all connections."""
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", int(self.target.rpartition(":")[2])))
                self._sockets += [client, server]
                for pair in ((client, server), (server, client)):
                    thread = threading.Thread(target=self._pass_on, args=pair)
                    self._threads.append(thread)
                    thread.start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@dataclass
class Doors:
    """Servers behind TLS, and certificates for them."""

    mutual: EtcdServer
    expired: EtcdServer
    plain: EtcdServer
    ours: Certificates
    client: tuple[str, str]
    stale: tuple[str, str]
    stranger: tuple[str, str]
    others: Certificates


@pytest.fixture(scope="module")
def doors(etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    folder = tmp_path_factory.mktemp("tls")
    ours, others = Certificates(folder / "ours", "ours"), Certificates(folder / "others", "others")
    stale = ours.signed("stale", "/O=workers", days=0)
    server_tls = ServerTLS(*ours.signed("server", "/O=etcd"), ours.ca)
    expired = ["openssl", "x509", "-in", stale[0], "-noout", "-checkend", "0"]
    until(lambda: subprocess.run(expired, capture_output=True, check=False).returncode, "the certificate's end")
    with (
        EtcdServer(tls=server_tls, extra_args=["--bcrypt-cost=4"]) as mutual,
        EtcdServer(tls=ServerTLS(*stale)) as with_stale,
    ):
        client = ours.signed("client", "/O=workers")
        stranger = others.signed("stranger", "/O=workers")
        yield Doors(mutual, with_stale, etcd, ours, client, stale, stranger, others)


@pytest.mark.parametrize(
    ("case", "error", "says"),
    [
        ("no client certificate", AuthRejected, r"client certificate.* certfile and keyfile in etcd_lock_use_ssl"),
        ("expired client certificate", AuthRejected, r"client certificate.* certfile.* in etcd_lock_use_ssl"),
        ("client certificate of a stranger", AuthRejected, r"client certificate.* certfile.* in etcd_lock_use_ssl"),
        ("wrong CA", AuthRejected, r"cannot be trusted.* check ca_certs in etcd_lock_use_ssl"),
        ("expired server certificate", AuthRejected, r"cannot be trusted \(certificate has expired\)"),
        ("another host", AuthRejected, r"not for this host name .*localhost.* check etcd_lock_endpoints"),
        ("http to TLS", EtcdRejected, r"speaks TLS: write https:// in etcd_lock_endpoints"),
        ("http to mutual TLS", EtcdRejected, r"speaks TLS: write https:// in etcd_lock_endpoints"),
        ("https to plain", EtcdRejected, r"does not speak TLS .*write http:// in etcd_lock_endpoints"),
    ],
)
def test_each_wrong_door_is_said_at_once(
    doors: Doors, kind: Kind, case: str, error: type[EtcdLockError], says: str, open_session: OpenSession
) -> None:
    """What is wrong and which setting mends it, after a handful of connections, long before the timeout."""
    ca = doors.ours.ca
    server, tls = {
        "no client certificate": (doors.mutual, TLS(ca)),
        "expired client certificate": (doors.mutual, TLS(ca, *doors.stale)),
        "client certificate of a stranger": (doors.mutual, TLS(ca, *doors.stranger)),
        "wrong CA": (doors.mutual, TLS(doors.others.ca, *doors.client)),
        "expired server certificate": (doors.expired, TLS(ca)),
        "another host": (doors.mutual, TLS(ca, *doors.client)),
        "http to TLS": (doors.expired, None),
        "http to mutual TLS": (doors.mutual, None),
        "https to plain": (doors.plain, TLS(ca)),
    }[case]
    host = "localhost" if case == "another host" else "127.0.0.1"
    with CountingProxy(server.url) as proxy:
        url, begun = f"{'https' if tls else 'http'}://{host}:{proxy.port}", time.monotonic()
        with pytest.raises(error, match=says) as raised:
            open_session(url, kind, tls=tls, timeout=60)
        assert type(raised.value) is error
        assert time.monotonic() - begun < 30
        assert url in discreet(raised.value)
        assert proxy.connections <= 4


def test_a_door_that_is_locked_later(doors: Doors, open_session: OpenSession, kind: Kind) -> None:
    """TLS is switched on while the session is open: to a member that has answered before one call is unclear, and then
    it is said."""
    with CountingProxy(doors.plain.url) as proxy:
        session = open_session(f"http://127.0.0.1:{proxy.port}", kind, username=None, password=None)
        proxy.target = doors.expired.url
        proxy.hang_up()
        with pytest.raises(EtcdLockError):
            session.transport.range(Range("a"), timeout=1)
        with pytest.raises(EtcdRejected, match="write https:// in etcd_lock_endpoints"):
            session.transport.range(Range("a"), timeout=30)
        proxy.target = doors.plain.url
        assert session.transport.range(Range(session.key), timeout=30).count == 1, "and when it is opened again"


def test_mutual_tls_and_who_one_is(doors: Doors, open_session: OpenSession, name: str) -> None:
    """A certificate without a common name, and a password: both transports. With one: gRPC takes it for the user, the
    gateway refuses, and says what to do."""
    server = doors.mutual
    files = {
        "ETCDCTL_CACERT": doors.ours.ca,
        "ETCDCTL_CERT": doors.client[0],
        "ETCDCTL_KEY": doors.client[1],
    }
    with pytest.MonkeyPatch.context() as patched:
        for variable, path in files.items():
            patched.setenv(variable, path)
        guard(server)
    tls = TLS(doors.ours.ca, *doors.client)
    for kind in KINDS:
        use_every_lock(open_session(server, kind, tls=tls), open_session(server, kind, tls=tls), f"{name}-{kind}")
    nobody = {"username": None, "password": None}
    for kind in KINDS:
        with pytest.raises(AuthRejected, match="etcd_lock_username"):
            open_session(server, kind, tls=tls, **nobody)
    named = TLS(doors.ours.ca, *doors.ours.signed("named", f"/CN={USER}"))
    user = open_session(server, "grpc", tls=named, **nobody)
    use_every_lock(user, open_session(server, "grpc", tls=named, **nobody), f"{name}-named")
    with pytest.raises(PermissionDenied, match="client certificate's common name"):
        Mutex(user, "/elsewhere").acquire()
    with pytest.raises(AuthRejected, match="common name") as error:
        open_session(server, "gateway", tls=named, **nobody)
    assert 'etcd_lock_transport="grpc"' in discreet(error.value)
    assert "without one" in str(error.value)


def test_nothing_that_can_be_printed_tells_a_secret(
    guarded: EtcdServer, open_session: OpenSession, kind: Kind, name: str
) -> None:
    """Session, transport, locks, and whatever a debugger shows of them first."""
    session = open_session(guarded, kind)
    held = Mutex(session, name).acquire()
    transport: Any = session.transport
    assert SECRETS.search(str(transport._cluster._headers)), "there is a token to tell"
    for each in (session, held, transport, transport._cluster, *transport._cluster.endpoints):
        assert not SECRETS.search(f"{each!r} {each!s}")
    held.release()
