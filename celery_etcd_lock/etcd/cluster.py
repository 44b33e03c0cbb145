"""Which member of the cluster a request goes to, for how long, and as whom: rotation, log-in, forks.

The same for every transport that has a network below it; what a member is, and how to log in, is the transport's.

A request goes to the endpoint that worked last. When that does not answer within its share of the time, the
next one is asked, and so on round and round until the time is used up; a round in which nobody was there at
all, or everybody said the same definite no, ends it at once.
"""

from __future__ import annotations

import itertools
import os
import random
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeAlias, TypeVar
from weakref import WeakSet

from celery_etcd_lock.etcd.api import TLS
from celery_etcd_lock.etcd.gateway_codec import NoAnswer, TokenRefused
from celery_etcd_lock.etcd.gateway_http import checked_url, tls_context
from celery_etcd_lock.exceptions import (
    AuthRejected,
    Compacted,
    ConfigError,
    EtcdRejected,
    EtcdUnavailable,
    LeaseNotFound,
    NoSpace,
    PermissionDenied,
)

__all__ = ["Attempt", "Cluster", "Member", "checked"]


class Member(Protocol):
    """What a cluster needs to know of one of its endpoints."""

    url: str

    def look(self, timeout: float) -> NoAnswer | None:
        """Why it hangs up on everybody, if it is for TLS or the lack of it; see `diagnosis`."""

    def drop_streams(self, why: str) -> None:
        """End every stream from this member, because it no longer answers."""

    def close(self) -> None: ...

    def after_fork(self) -> None:
        """In the child: leave the parent's connections alone, and start over."""


def checked(urls: Sequence[str], tls: TLS | None) -> tuple[list[str], ssl.SSLContext | None]:
    """The different ones among `urls`, and what those with https need. `ConfigError` for what cannot be meant."""
    if isinstance(urls, str):
        raise ConfigError("etcd endpoints are a list of URLs, not one text")
    if not urls:
        raise ConfigError("no etcd endpoint is given: write one like http://127.0.0.1:2379")
    different = list(dict.fromkeys(map(checked_url, urls)))
    plain = [url for url in different if url.startswith("http://")]
    if tls and plain:
        raise ConfigError(f"TLS is set, and the etcd endpoint {plain[0]} is without: write https://")
    return different, tls_context(tls or TLS()) if len(plain) < len(different) else None


_CREDENTIALS = "etcd's user name and password (etcd_lock_username, etcd_lock_password)"

_LONGEST_REFUSAL = 10.0
"""Seconds for which a log-in that etcd has refused is not tried again; one at first, and twice as long each time."""

T = TypeVar("T")
E = TypeVar("E", bound=Member)
Attempt: TypeAlias = Callable[[E, Mapping[str, str], float], T]
"""Something to try on an endpoint, with headers, within a number of seconds; it raises `NoAnswer` to go on."""


class Cluster(ABC, Generic[E]):
    """The members `endpoints`, shared by threads and left alone by forks. Opens no socket by itself.

    `timeout` is what a request without one of its own may take, in seconds. `ConfigError` for what cannot be
    meant.
    """

    anonymous: Mapping[str, str]
    """The headers of a request without a token."""

    def __init__(self, endpoints: Sequence[E], timeout: float, username: str | None, password: str | None) -> None:
        if timeout <= 0:
            raise ConfigError(f"the etcd timeout is {timeout!r}, and must be more than 0 seconds")
        if (username is None) != (password is None):
            raise ConfigError("etcd's user name and password go together: set both, or none")
        self.timeout = timeout
        self.closed = False
        self.requests = 0
        self.endpoints = list(endpoints)
        self._username = username
        self._password = password
        self._headers: Mapping[str, str] | None = None if self.logs_in else self.anonymous
        self._start()
        _clusters.add(self)

    @property
    def logs_in(self) -> bool:
        """Whether there is a way to get a token."""
        return self._username is not None

    @abstractmethod
    def authenticate(self, endpoint: E, timeout: float) -> Mapping[str, str]:
        """Headers with a new token. Raises what the answer means, or `NoAnswer`, as any attempt."""

    def _start(self) -> None:
        self._counting = threading.RLock()  # a signal's handler may send while the main thread counts
        self._logging_in = threading.Lock()
        self._refusal: AuthRejected | None = None
        self._refused_until = self._refused_for = 0.0
        self._known: set[E] = set()
        self._current = random.randrange(len(self.endpoints))

    def after_fork(self) -> None:
        """In the child: connections and locks are the parent's, and made anew."""
        self._start()
        for endpoint in self.endpoints:
            endpoint.after_fork()

    def close(self) -> None:
        self.closed = True
        for endpoint in self.endpoints:
            endpoint.close()

    def count_request(self) -> None:
        with self._counting:
            self.requests += 1

    def everywhere(self, attempt: Attempt[E, T], timeout: float | None = None) -> tuple[T, bool]:
        """`attempt`, on one endpoint after the other, with headers and a timeout, until it returns.

        Its result, and whether an attempt before it is without an answer. `EtcdUnavailable` after `timeout`
        seconds; what `attempt` raises, unless it is `NoAnswer`.
        """
        total = self.timeout if timeout is None else timeout
        deadline, left = time.monotonic() + total, total
        share = total / (len(self.endpoints) + 1)
        failures: dict[E, NoAnswer] = {}
        unanswered = False
        for number in itertools.count(1):
            if left <= 0:
                break
            current = self._current
            endpoint = self.endpoints[current]
            try:
                return self.on_one(endpoint, attempt, min(share, left)), unanswered
            except NoAnswer as failure:
                if left >= share or endpoint not in failures:  # what a last glance did not see says little
                    failures[endpoint] = failure
                unanswered = unanswered or failure.sent
            except EtcdRejected as error:
                # a late first attempt may fare better than the one that was refused; not if the lease is gone
                if unanswered and not isinstance(error, LeaseNotFound | Compacted):
                    raise EtcdUnavailable(str(error), True) from error
                raise
            except NoSpace as error:
                raise NoSpace(str(error), unanswered) from error
            if self._current == current:
                self._current = (current + 1) % len(self.endpoints)
            if number % len(self.endpoints) == 0:
                if len(failures) == len(self.endpoints) and all(each.hopeless for each in failures.values()):
                    break
                time.sleep(max(0.0, min(random.uniform(0.02, 0.1), deadline - time.monotonic())))
            left = deadline - time.monotonic()
        # Not dying, then: the next call has a look at whether certificates or TLS have changed meanwhile.
        self._known.difference_update(endpoint for endpoint, failure in failures.items() if failure.unclear)
        raise self.nobody(failures, total, unanswered)

    def on_one(self, endpoint: E, attempt: Attempt[E, T], timeout: float) -> T:
        """`attempt` on one endpoint; once more, with a new token, if etcd does not like the one we have."""
        deadline = time.monotonic() + timeout
        if self.closed:
            raise EtcdUnavailable("the connection to etcd was closed")
        headers = self._headers or self._log_in(endpoint, None, deadline)
        try:
            return self._try(endpoint, attempt, headers, deadline)
        except TokenRefused as error:
            if not self.logs_in:
                raise AuthRejected(f"{endpoint.url}: {error}; set {_CREDENTIALS}", error.code) from error
        except NoAnswer as failure:
            if failure.silent:
                endpoint.drop_streams(f"{endpoint.url} does not answer: {failure.why}")
            if failure.hung_up and headers is not self.anonymous and self._headers is headers:
                self._headers = None  # some versions have no better answer to an old token
            raise
        try:
            headers = self._log_in(endpoint, headers, deadline)
            return self._try(endpoint, attempt, headers, deadline)
        except TokenRefused as error:
            if isinstance(error.__cause__, PermissionDenied):
                raise self._denied(endpoint, error.__cause__) from error
            raise AuthRejected(f"{endpoint.url}: {error}, even after logging in again", error.code) from error

    def _try(self, endpoint: E, attempt: Attempt[E, T], headers: Mapping[str, str], deadline: float) -> T:
        """`attempt`; says more of it than it knows itself: who may not do this, and whether it is for TLS."""
        try:
            result = attempt(endpoint, headers, max(0.001, deadline - time.monotonic()))
        except PermissionDenied as error:
            raise self._denied(endpoint, error) from error
        except NoAnswer as failure:
            # One that has answered before is dying, rather; then the next should be asked without delay.
            look = failure.unclear and endpoint not in self._known
            if look and (seen := endpoint.look(deadline - time.monotonic())) is not None:
                raise seen from failure
            raise
        self._known.add(endpoint)
        return result

    def _denied(self, endpoint: E, error: PermissionDenied) -> PermissionDenied:
        who = f"user {self._username!r}"
        if self._username is None:
            who = "the user that is our client certificate's common name (etcd_lock_username is not set)"
        return PermissionDenied(f"{endpoint.url}: permission denied to {who}", error.code)

    def nobody(self, failures: Mapping[E, NoAnswer], total: float, unanswered: bool) -> Exception:
        """What to raise after these `failures`, within `total` seconds."""
        verdicts = [failure.verdict for failure in failures.values() if failure.verdict]
        if verdicts and len(verdicts) == len(failures) and not unanswered:
            return verdicts[-1]
        what = "; ".join(f"{endpoint.url}: {failure.why}" for endpoint, failure in failures.items())
        if failures and all(failure.refused for failure in failures.values()):
            return EtcdUnavailable(f"no etcd there: {what}", unanswered)
        return EtcdUnavailable(f"no etcd member answered within {total:g} s: {what or 'no time was left'}", unanswered)

    # -- who we are

    def _log_in(self, endpoint: E, refused: Mapping[str, str] | None, deadline: float) -> Mapping[str, str]:
        """Headers with a token other than in `refused`: somebody else's new one, or ours. One log-in at a time."""
        if not self._logging_in.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise NoAnswer("another thread's log-in takes too long")
        try:
            if self._headers is not None and self._headers is not refused:
                return self._headers
            self._headers = self._unless_refused(endpoint, deadline)
            return self._headers
        finally:
            self._logging_in.release()

    def _unless_refused(self, endpoint: E, deadline: float) -> Mapping[str, str]:
        """As `_with_token`; for some time after a refusal the same again, without asking.

        A wrong password does not become right, and to check it costs etcd more than anything else we ask of it.
        """
        if self._refusal is not None and time.monotonic() < self._refused_until:
            raise AuthRejected(*self._refusal.args)
        try:
            headers = self._with_token(endpoint, deadline)
        except AuthRejected as error:
            self._refusal, self._refused_for = error, min(_LONGEST_REFUSAL, max(1.0, 2 * self._refused_for))
            self._refused_until = time.monotonic() + self._refused_for
            raise
        self._refusal, self._refused_for = None, 0.0
        return headers

    def _with_token(self, endpoint: E, deadline: float) -> Mapping[str, str]:
        def attempt(endpoint: E, _headers: Mapping[str, str], timeout: float) -> Mapping[str, str]:
            return self.authenticate(endpoint, timeout)

        try:
            return self._try(endpoint, attempt, self.anonymous, deadline)
        except NoAnswer as failure:
            if failure.silent:
                endpoint.drop_streams(f"{endpoint.url} does not answer: {failure.why}")
            raise NoAnswer(f"log-in: {failure.why}", refused=failure.refused, verdict=failure.verdict) from failure
        except EtcdRejected as error:
            if self._username is not None and "authentication is not enabled" in str(error):
                return dict(self.anonymous)
            if self._username is not None and "authentication failed" in str(error):
                raise AuthRejected(
                    f"{endpoint.url} does not accept user {self._username!r} with this password: check {_CREDENTIALS}",
                    error.code,
                ) from error
            raise AuthRejected(f"{endpoint.url}: {error}", error.code) from error


_clusters: WeakSet[Cluster[Any]] = WeakSet()


def _after_fork_in_child() -> None:
    for cluster in list(_clusters):
        cluster.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
