"""What the checker is given: the record of processes, the store, and the witness."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_etcd_lock.etcd import connect
from celery_etcd_lock.etcd.api import Delete, Put, Range, Txn, Watch, WatchReply, WatchStream
from celery_etcd_lock.etcd.memory import MemoryEtcd, MemoryTransport
from celery_etcd_lock.exceptions import EtcdUnavailable
from celery_etcd_lock.testing import EtcdServer
from tests.safety import witness as witness_module
from tests.safety.history import Event, Fault, Record, Recorder, Write, dump, load, now, read
from tests.safety.store import FencedStore, StoreClient
from tests.safety.witness import Change, Witness, replay
from tests.workers import until

PREFIX = "/safety/"
times = st.floats(0, 1e6, allow_nan=False)
records: st.SearchStrategy[Record] = st.one_of(
    st.builds(Event, st.sampled_from(["queued", "lost"]), times, st.integers(1), why=st.text(), since=times),
    st.builds(Fault, st.sampled_from(["killed", "other"]), times, key=st.text(), revision=st.integers(0)),
    st.builds(Write, st.integers(1), times, st.text(), st.just("read"), st.integers(1), st.text(), st.booleans()),
)


class TestHistory:
    @given(records)
    def test_what_was_written_is_read(self, record: Record) -> None:
        """Every record comes back as it was, from one line."""
        line = dump(record)
        assert line.count("\n") == 1
        assert load(line) == record

    def test_processes_that_are_killed(self, tmp_path: Path) -> None:
        """What a process recorded before it was killed is there, whole; times of two processes are of one clock."""
        began = now()
        program = (
            "import os, signal, sys, pathlib\n"
            "from tests.safety.history import Event, Recorder, now\n"
            "recorder = Recorder(pathlib.Path(sys.argv[1]), 'killed')\n"
            "for _ in range(50): recorder.write(Event('queued', now(), os.getpid()))\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        ended = subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
        assert ended.returncode == -signal.SIGKILL
        history = read(tmp_path)
        assert len(history.events) == 50
        assert all(began < event.at < now() for event in history.events)
        assert not history.torn

    def test_a_torn_line(self, tmp_path: Path) -> None:
        """The last line of a file may be torn, and is noted; any other is an error."""
        recorder = Recorder(tmp_path, "holder")
        recorder.write(Event("queued", 1.0, 1))
        recorder.close()
        whole = recorder.path.read_text()
        recorder.path.write_text(whole + whole[:20])
        history = read(tmp_path)
        assert (len(history.events), history.torn) == (1, frozenset({os.getpid()}))
        recorder.path.write_text(whole[:20] + "\n" + whole)
        with pytest.raises(ValueError, match="no record"):
            read(tmp_path)


class TestStore:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Iterator[Callable[[str, int], bool]]:
        with FencedStore(tmp_path) as store:
            client = StoreClient(store.port)
            yield lambda mode, token: client.write("/a", mode, token, "hold")
            client.close()
        writes = read(tmp_path).writes
        assert [write.number for write in writes] == list(range(1, len(writes) + 1))

    def test_writers(self, write: Callable[[str, int], bool]) -> None:
        """A writer that is older than the last is refused, however often; the same may write again."""
        assert [write("write", token) for token in (5, 5, 7, 5, 7, 5)] == [True, True, True, False, True, False]

    def test_readers(self, write: Callable[[str, int], bool]) -> None:
        """Readers come in any order, but not after a newer writer, nor an older writer after them."""
        assert [write("read", token) for token in (5, 7, 6)] == [True, True, True]
        assert not write("write", 6)
        assert write("write", 8)
        assert not write("read", 7)

    def test_it_is_written_down(self, tmp_path: Path) -> None:
        """What was refused is in the history as what was taken is."""
        with FencedStore(tmp_path) as store:
            for token in (5, 4):
                store.write(name="/a", mode="write", token=token, hold=f"h{token}")
        assert [(write.hold, write.accepted) for write in read(tmp_path).writes] == [("h5", True), ("h4", False)]


class TestReplay:
    def test_lifetimes(self) -> None:
        """A key that comes, is put again, goes, and comes again, has lived twice."""
        changes = [
            Change("put", "/a", 2, 2, 9, 1.0),
            Change("put", "/a", 3, 2, 9, 2.0),
            Change("delete", "/a", 4, 0, 0, 3.0),
            Change("put", "/a", 5, 5, 9, 4.0),
        ]
        account = replay(changes)
        assert not account.gaps
        assert [(each.created, each.deleted) for each in account.lifetimes] == [(2, 4), (5, float("inf"))]
        assert account.of("/a", 2) == account.lifetimes[0]

    @pytest.mark.parametrize("missing", range(4))
    def test_what_is_missing_is_a_gap(self, missing: int) -> None:
        """Whichever change is left out, of a put, a delete, a put and another, the rest does not fit together."""
        changes = [
            Change("put", "/a", 2, 2, 9, 1.0),
            Change("delete", "/a", 4, 0, 0, 3.0),
            Change("put", "/a", 5, 5, 9, 4.0),
            Change("put", "/a", 6, 5, 9, 4.0),
        ]
        assert not replay(changes).gaps
        del changes[missing]
        assert bool(replay(changes).gaps) == (missing != 3)  # a second put changes no lifetime


def put(transport: Any, key: str) -> int:
    return int(transport.txn(Txn([], [Put(PREFIX + key, b"")])).header.revision)


class Flaky(MemoryTransport):
    """A transport whose watches do what the test wants first."""

    def __init__(self, store: MemoryEtcd, first: list[Callable[[WatchStream], Iterator[WatchReply]]]) -> None:
        super().__init__(store)
        self._first = first

    def watch(self, request: Watch) -> Any:
        stream = super().watch(request)
        if not self._first:
            return stream
        how = self._first.pop(0)

        class Odd:
            def __iter__(self) -> Iterator[WatchReply]:
                return how(stream)

            def close(self) -> None:
                stream.close()

        return Odd()


def breaks(stream: WatchStream) -> Iterator[WatchReply]:
    """Tells of one change, and breaks."""
    for reply in stream:
        yield reply
        if reply.events:
            raise EtcdUnavailable("staged")


def silent(stream: WatchStream) -> Iterator[WatchReply]:
    """Tells of nothing until it is closed."""
    for _ in stream:
        yield from ()


class TestWitness:
    def test_what_happened_is_told(self, etcd: EtcdServer) -> None:
        """Every key under the prefix, and no other, with its revisions and lease."""
        transport = connect(etcd.url)
        with Witness(connect(etcd.url), "/safety/witness/") as witness:
            lease = transport.lease_grant(30).lease
            created = transport.txn(Txn([], [Put("/safety/witness/a", b"", lease)])).header.revision
            transport.txn(Txn([], [Put("/safety/other", b"")]))
            deleted = transport.delete(Delete("/safety/witness/a")).header.revision
            account = witness.testify()
        assert not account.gaps
        (lifetime,) = [each for each in account.lifetimes if not each.key.endswith(".witness")]
        assert (lifetime.key, lifetime.lease) == ("/safety/witness/a", lease)
        assert (lifetime.created, lifetime.deleted) == (created, deleted)
        assert lifetime.created_at <= lifetime.deleted_at <= now()
        transport.delete(Delete("/safety/", "/safety0"))
        transport.close()

    def test_it_must_be_there_from_the_beginning(self) -> None:
        """Where there is a key already, the witness does not begin."""
        store = MemoryEtcd()
        put(MemoryTransport(store), "a")
        with pytest.raises(ValueError, match="too late"):
            Witness(MemoryTransport(store), PREFIX)

    def test_a_member_that_is_killed(self) -> None:
        """When its member is killed and comes again, the witness goes on where it was."""
        with EtcdServer() as server, Witness(connect(server.url), PREFIX) as witness:
            transport = connect(server.url)
            put(transport, "a")
            witness.wait_for(PREFIX + "a")
            server.kill()
            server.start()
            put(transport, "b")
            transport.delete(Delete(PREFIX + "a"))
            account = witness.testify()
            transport.close()
        assert not account.gaps
        assert {each.key: each.deleted < float("inf") for each in account.lifetimes} == {
            PREFIX + "a": True,
            PREFIX + "b": False,
            PREFIX + ".witness": False,
        }

    def test_a_stream_that_breaks(self) -> None:
        """After a stream that breaks another begins with the revision that comes next."""
        store = MemoryEtcd()
        transport = MemoryTransport(store)
        with Witness(Flaky(store, [breaks] * 5), PREFIX) as witness:
            for number in range(20):
                put(transport, f"{number}")
            account = witness.testify()
        assert not account.gaps
        assert len(account.lifetimes) == 21

    def test_a_stream_that_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stream that does not even tell of the witness's own key is given up."""
        monkeypatch.setattr(witness_module, "_SILENT", 0.2)
        store = MemoryEtcd()
        with Witness(Flaky(store, [silent]), PREFIX) as witness:
            put(MemoryTransport(store), "a")
            assert not witness.testify().gaps

    def test_history_that_was_compacted(self) -> None:
        """What was compacted before it was told is a gap; what was compacted afterwards is none."""
        store = MemoryEtcd()
        transport = MemoryTransport(store)
        allowed = threading.Event()

        def late(stream: WatchStream) -> Iterator[WatchReply]:
            allowed.wait(30)
            yield from stream

        with Witness(Flaky(store, []), PREFIX) as witness:
            revision = put(transport, "a")
            until(lambda: witness.told >= revision)
            store.compact(witness.told)
            assert not witness.testify().gaps
        transport.delete(Delete(PREFIX, "/safety0"))
        with Witness(Flaky(store, [late]), PREFIX) as witness:
            put(transport, "b")
            store.compact(put(transport, "c"))
            allowed.set()
            assert "compacted" in witness.testify().gaps[0]

    def test_a_stream_that_leaves_something_out(self) -> None:
        """What the stream has kept from the witness shows in the end, when etcd says what is there."""
        store = MemoryEtcd()

        def leaves_out(stream: WatchStream) -> Iterator[WatchReply]:
            for reply in stream:
                kept = tuple(event for event in reply.events if event.kv.key != PREFIX + "a")
                yield WatchReply(reply.header, kept)

        with Witness(Flaky(store, [leaves_out]), PREFIX) as witness:
            put(MemoryTransport(store), "a")
            assert PREFIX + "a" in witness.testify().gaps[0]
        assert MemoryTransport(store).range(Range(PREFIX + "a")).kvs
