"""One etcd member over gRPC: calls on its channel, and the two streams that all watches and all renewals share.

A channel that failed is *retired*: new calls get a new one, which connects at once instead of after a pause, and
those that are under way on it go on to their end.
"""

from __future__ import annotations

import copy
import itertools
import queue
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from celery_etcd_lock.etcd import diagnosis
from celery_etcd_lock.etcd.api import Watch
from celery_etcd_lock.etcd.gateway_codec import NoAnswer
from celery_etcd_lock.etcd.grpc_channel import LINK_ERRORS, Channel, Duplex, Link, failure, not_connected
from celery_etcd_lock.etcd.grpc_messages import Message, messages, watch_cancel_out, watch_out

__all__ = ["Member", "Subscription"]

_WATCH = ("Watch/Watch", "WatchResponse")
_RENEW = ("Lease/LeaseKeepAlive", "LeaseKeepAliveResponse")


class Member:
    """The member at `url`; shared by threads. `connect` gives a channel to it; `context` is how to look at its TLS.

    A channel that is `lent` is somebody else's: it is neither closed nor replaced.
    """

    def __init__(
        self,
        url: str,
        connect: Callable[[], Channel],
        *,
        context: ssl.SSLContext | None = None,
        lent: bool = False,
    ) -> None:
        self.url = url
        self._connect = connect
        self._context = context if url.startswith("https") else None
        self._lent = lent
        self._closed = False
        self._left: list[object] = []
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()  # a signal's handler may send while its thread is in here
        self._link: Link | None = None
        self._watches: _Watches | None = None
        self._renewals: _Renewals | None = None
        self._older: list[_Watches] = []
        """Streams on which no new watches come, and old ones may still be."""

    def call(self, name: str, body: bytes, headers: Mapping[str, str], timeout: float) -> Message:
        """etcd's reply; raises `NoAnswer` if there is none within `timeout` seconds, and what etcd says instead."""
        link = self._link or self._current()
        try:
            with link:
                if not link.greeted:
                    deadline = time.monotonic() + timeout
                    self._greet(link, timeout)
                    timeout = max(0.001, deadline - time.monotonic())
                return link.unary(name)(body, timeout=timeout, metadata=tuple(headers.items()))
        except LINK_ERRORS as error:
            raise self._failure(link, error) from error

    def renew(self, lease: int, headers: Mapping[str, str], timeout: float) -> Message:
        """As `call`, on the stream of renewals."""
        with self._lock:
            link, stream = self._current(), self._renewals
            if stream is None or stream.over:
                stream = self._renewals = _Renewals(Duplex(link, _RENEW, headers, self._failure))
        return stream.renew(lease, timeout)

    def watch(self, request: Watch, headers: Mapping[str, str]) -> Subscription:
        """`request`, on the stream of watches; on a new one if that was opened with another token."""
        with self._lock:
            link, stream = self._current(), self._watches
            if stream is None or stream.over or stream.headers != headers:
                self._leave()
                stream = self._watches = _Watches(Duplex(link, _WATCH, headers, self._failure), headers)
        return stream.subscribe(request)

    def forget(self) -> None:
        """Let what comes next be on a channel asked for anew; calls and watches that are under way go on."""
        with self._lock:
            renewals = self._renewals
            self._leave()
            self._link = self._watches = self._renewals = None
        if renewals is not None:
            renewals.end(NoAnswer("another channel is used now", sent=True))

    def _leave(self) -> None:
        """Let no new watches come to the stream that there is."""
        if self._watches is not None:
            self._watches.leave()
            self._older = [each for each in (*self._older, self._watches) if not each.over]

    def look(self, timeout: float) -> NoAnswer | None:
        """Whether it is for TLS that there is no connection. gRPC gives no reasons, so by one of our own."""
        return None if self._lent else diagnosis.look(self.url, self._context, timeout)

    def drop_streams(self, why: str) -> None:
        """End every stream, because the member no longer answers; what comes next is on a new connection."""
        with self._lock:
            link, streams = self._link, [each for each in (*self._older, self._watches, self._renewals) if each]
            self._watches, self._renewals, self._older = None, None, []
        for stream in streams:
            stream.end(NoAnswer(why, sent=True))
        if link is not None:
            self._retire(link)

    def close(self) -> None:
        """End all of it, for good: whoever comes a moment too late opens nothing any more."""
        with self._lock:
            self._closed = True
        self.drop_streams("closed")

    def after_fork(self) -> None:
        """In the child: the parent's channel is not touched, not even by the garbage collector."""
        self._left += [self._link, self._watches, self._renewals, self._older]
        self._start()

    def _current(self) -> Link:
        with self._lock:
            if self._closed:
                raise NoAnswer("closed", silent=True)
            if self._link is None:
                self._link = Link(self._connect)
            return self._link

    def _greet(self, link: Link, timeout: float) -> None:
        try:
            link.greet(timeout)
        except LINK_ERRORS as error:
            meaning = self._failure(link, error)
            if isinstance(meaning, NoAnswer) and meaning.sent:
                raise NoAnswer("no connection in time", silent=True) from error
            raise meaning from error

    def _retire(self, link: Link) -> None:
        if self._lent:
            return
        with self._lock:
            if self._link is link:
                self._link = None
        link.retire()

    def _failure(self, link: Link, error: Exception) -> Exception:
        """What `error`, from `link`, means."""
        if not_connected(error):
            self._retire(link)
        return failure(self.url, error) or error


class _Renewals:
    """One stream for all renewals. etcd answers them in the order in which they were sent."""

    def __init__(self, duplex: Duplex) -> None:
        self._duplex = duplex
        self._lock = threading.RLock()
        self._waiting: deque[queue.SimpleQueue[Message | Exception]] = deque()
        self._end: Exception | None = None
        duplex.take(self._received, self.end, "etcd-lock-renewals")

    @property
    def over(self) -> bool:
        return self._end is not None

    def renew(self, lease: int, timeout: float) -> Message:
        answer: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        with self._lock:
            if self._end is not None:
                raise copy.copy(self._end)
            self._waiting.append(answer)  # first, so that an answer is never taken for that of a later request
            self._duplex.send(messages.LeaseKeepAliveRequest(ID=lease))
        try:
            reply = answer.get(timeout=max(0.0, timeout))
        except queue.Empty:
            raise NoAnswer("no answer", sent=True, silent=True) from None
        if isinstance(reply, Exception):
            raise reply
        if lease != reply.ID:
            raise NoAnswer("an answer to another renewal", sent=True, silent=True)
        return reply

    def _received(self, message: Message) -> None:
        with self._lock:
            answer = self._waiting.popleft() if self._waiting else None
        if answer is not None:
            answer.put(message)

    def end(self, error: Exception) -> None:
        with self._lock:
            self._end = self._end or error
            waiting, self._waiting = self._waiting, deque()
        for answer in waiting:
            answer.put(copy.copy(self._end))
        self._duplex.end()


class Subscription:
    """One watch on a stream of many: `get` its messages in one thread, `close` it from any."""

    def __init__(self, watch_id: int, left: Callable[[Subscription], None]) -> None:
        self.watch_id = watch_id
        self._left = left
        self._inbox: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        self.put = self._inbox.put

    def get(self, timeout: float | None = None) -> Message:
        """The next message, or raise what ended the watch. `NoAnswer` after `timeout` seconds."""
        try:
            message = self._inbox.get(timeout=timeout)
        except queue.Empty:
            raise NoAnswer("no answer", sent=True, silent=True) from None
        if isinstance(message, Exception):
            raise message
        return message

    def close(self) -> None:
        """End it, and a `get` that waits."""
        self.put(NoAnswer("closed"))
        self._left(self)


class _Watches:
    """One stream for all watches with the same token. The ids are ours, so that an answer finds its watch."""

    def __init__(self, duplex: Duplex, headers: Mapping[str, str]) -> None:
        self.headers = headers
        self._duplex = duplex
        self._lock = threading.RLock()
        self._ids = itertools.count(1)
        self._watching: dict[int, Subscription] = {}
        self._unconfirmed: deque[int] = deque()
        self._end: Exception | None = None
        self._left = False
        duplex.take(self._received, self.end, "etcd-lock-watches")

    @property
    def over(self) -> bool:
        return self._end is not None

    def subscribe(self, request: Watch) -> Subscription:
        with self._lock:
            if self._end is not None:
                raise copy.copy(self._end)
            subscription = Subscription(next(self._ids), self._unsubscribe)
            self._watching[subscription.watch_id] = subscription
            self._unconfirmed.append(subscription.watch_id)
            self._duplex.send(watch_out(request, subscription.watch_id))
            return subscription

    def _unsubscribe(self, subscription: Subscription) -> None:
        with self._lock:
            if self._watching.pop(subscription.watch_id, None) and self._end is None:
                self._duplex.send(watch_cancel_out(subscription.watch_id))
        self._end_if_left()

    def leave(self) -> None:
        """No new watches come: end once the last one has."""
        self._left = True
        self._end_if_left()

    def _end_if_left(self) -> None:
        if self._left and not self._watching:
            self.end(NoAnswer("closed"))

    def _received(self, message: Message) -> None:
        with self._lock:
            watch_id = message.watch_id
            if message.created and self._unconfirmed:
                # A watch that is refused may be answered without its id; they are answered in order.
                first = self._unconfirmed.popleft()
                watch_id = first if message.canceled else watch_id
            subscription = self._watching.get(watch_id)
            if message.canceled:
                self._watching.pop(watch_id, None)
        if subscription is not None:
            subscription.put(message)
        self._end_if_left()

    def end(self, error: Exception) -> None:
        with self._lock:
            self._end = self._end or error
            watching, self._watching = self._watching, {}
        for subscription in watching.values():
            subscription.put(copy.copy(self._end))
        self._duplex.end()
