"""A TCP proxy that stands between clients and one etcd member, and misbehaves as it is told.

It runs in a thread of its own, with `url` for clients to go to, and does one of these at a time, to the connections
that are there and to new ones alike:

* `pass_on`: nothing.
* `delay`: each piece of what is said in one direction, or in both, goes on so many seconds later.
* `drop`: what is said in one direction, or in both, is swallowed. A connection that has lost something stays
  deaf in that direction for good, as one does that a firewall has forgotten; new ones are well again.
* `fade`: requests are swallowed, and what answers those before comes so many seconds later.
* `black_hole`: connections are accepted, and nobody reads or answers. What was said meanwhile goes on afterwards, as
  it does when a network comes back: late.
* `reset`: every connection is ended with an RST, new ones as soon as they come.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import urlsplit

__all__ = ["Direction", "Proxy"]

Direction: TypeAlias = Literal["to_member", "to_client"]
T = TypeVar("T")

_BOTH: frozenset[Direction] = frozenset({"to_member", "to_client"})
_CHUNK = 65_536
_PIECES = 1_000
"""Under way in one direction of a connection, at most."""


@dataclass(frozen=True)
class _Behaviour:
    delay: float = 0.0
    delays: frozenset[Direction] = frozenset()
    drops: frozenset[Direction] = frozenset()
    holds: bool = False
    resets: bool = False


class Proxy:
    """A context manager. `target` is the URL of the member, which need not be there."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "", parts.port or 0)
        self._behaviour = _Behaviour()
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._loop = asyncio.new_event_loop()
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy of {target}", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"{parts.scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __repr__(self) -> str:
        return f"<Proxy {self.url} {self._behaviour}>"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def pass_on(self) -> None:
        self._become(_Behaviour())

    def delay(self, seconds: float, *directions: Direction) -> None:
        """What goes in `directions`; without any, in both."""
        self._become(_Behaviour(delay=seconds, delays=frozenset(directions) or _BOTH))

    def drop(self, *directions: Direction) -> None:
        """What goes in `directions`; without any, in both."""
        self._become(_Behaviour(drops=frozenset(directions) or _BOTH))

    def fade(self, seconds: float) -> None:
        self._become(_Behaviour(delay=seconds, delays=frozenset({"to_client"}), drops=frozenset({"to_member"})))

    def black_hole(self) -> None:
        self._become(_Behaviour(holds=True))

    def reset(self) -> None:
        self._become(_Behaviour(resets=True))

    @property
    def connections(self) -> int:
        """How many clients are connected, answered or not."""
        return len(self._clients)

    def close(self) -> None:
        """End every connection. Safe to call twice."""
        if not self._loop.is_closed():
            self._call(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # -- in its thread

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def _become(self, behaviour: _Behaviour) -> None:
        self._call(self._change(behaviour))

    async def _change(self, behaviour: _Behaviour) -> None:
        self._behaviour = behaviour
        if behaviour.holds:
            self._goes_on.clear()
        else:
            self._goes_on.set()
        if behaviour.resets:
            for task, client in self._clients.items():
                _will_reset(client)
                task.cancel()

    async def _end(self) -> None:
        self._server.close()
        tasks = list(self._clients)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._clients[task] = client
        member: asyncio.StreamWriter | None = None
        try:
            if self._behaviour.resets:
                _will_reset(client)
                return
            await self._goes_on.wait()
            replies, member = await asyncio.open_connection(*self._target)
            ways = [
                asyncio.ensure_future(self._pump(reader, member, "to_member")),
                asyncio.ensure_future(self._pump(replies, client, "to_client")),
            ]
            try:
                # Neither HTTP nor gRPC says anything more after one side has hung up.
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            _will_reset(client)  # nobody there: as near as a proxy comes to a refused connection
        except asyncio.CancelledError:
            pass  # by `reset` or `close`; this is the whole of the task
        finally:
            for side in (client, member):
                if side is not None:
                    side.transport.abort()
            del self._clients[task]

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction) -> None:
        """Until one of the two has hung up: that, too, is something said, and takes its time."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_PIECES)
        delivery = asyncio.ensure_future(self._deliver(pieces, writer, way))
        data = b"-"
        try:
            while data:
                try:
                    data = await reader.read(_CHUNK)
                except OSError:
                    data = b""
                late = self._behaviour.delay if way in self._behaviour.delays else 0.0
                await pieces.put((self._loop.time() + late, data))
            await delivery
        finally:
            delivery.cancel()
            await asyncio.gather(delivery, return_exceptions=True)

    async def _deliver(
        self, pieces: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: Direction
    ) -> None:
        deaf = False
        while True:
            due, data = await pieces.get()
            await asyncio.sleep(due - self._loop.time())
            await self._goes_on.wait()
            if not data:
                return
            deaf = deaf or way in self._behaviour.drops
            if not deaf:
                with contextlib.suppress(OSError):  # whoever listened is gone: the other way will tell
                    writer.write(data)
                    await writer.drain()


def _will_reset(client: asyncio.StreamWriter) -> None:
    """Let the connection end with an RST when it is closed."""
    sock: socket.socket | None = client.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
