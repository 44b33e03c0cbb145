"""A closer look at a member that hung up: does TLS, or the lack of it, explain that?

A server that wants TLS, gets plain text and hangs up looks like one that dies at that moment; so does one that wants
a client certificate and gets none, and to gRPC nearly everything. A connection of our own, on which nothing is asked
for, tells them apart. So what trying again cannot mend is said at once, in the same words on both transports.
"""

from __future__ import annotations

import socket
import ssl
import time
from urllib.parse import urlsplit

from celery_etcd_lock.etcd.gateway_codec import NoAnswer
from celery_etcd_lock.exceptions import AuthRejected, EtcdRejected

__all__ = ["hung_up", "look", "no_tls", "tls_failure", "wants_tls"]

_ALERT_COMES_WITHIN = 0.5
"""Seconds after our side of the handshake is done: in TLS 1.3 a server looks at our certificate only then."""

_EXPIRED = {9, 10}
_OTHER_HOST = {62, 63, 64}
"""OpenSSL's X509_V_ERR_… numbers."""

_ALERTS = {
    "CERTIFICATE_REQUIRED": "it asks for a client certificate: set certfile and keyfile",
    "CERTIFICATE_EXPIRED": "our client certificate has expired: renew the certfile",
    "UNKNOWN_CA": "it does not know the CA of our client certificate: check the certfile",
    "BAD_CERTIFICATE": "it refuses our client certificate, or that there is none: check certfile and keyfile",
}


def wants_tls(url: str) -> NoAnswer:
    return _verdict(EtcdRejected, url, "it speaks TLS: write https:// in etcd_lock_endpoints", 12)


def no_tls(url: str, reason: str) -> NoAnswer:
    why = f"it does not speak TLS ({reason}; is it http there?): write http:// in etcd_lock_endpoints"
    return _verdict(EtcdRejected, url, why, 12)


def tls_failure(url: str, error: ssl.SSLError) -> NoAnswer | None:
    """What `error` says of their certificate or of ours, if it does."""
    if isinstance(error, ssl.SSLCertVerificationError):
        said = error.verify_message.rstrip(".")
        if error.verify_code in _EXPIRED:
            why = f"its TLS certificate cannot be trusted ({said}): etcd needs a new one, or a clock is wrong"
        elif error.verify_code in _OTHER_HOST:
            why = f"its TLS certificate is not for this host name ({said}): check etcd_lock_endpoints"
        else:
            why = f"its TLS certificate cannot be trusted ({said}): check ca_certs in etcd_lock_use_ssl"
    elif "alert" in str(error).lower():
        reason = error.reason or str(error)
        said = next((text for name, text in _ALERTS.items() if name in reason), "")
        why = f"{said or f'it refuses our side of TLS ({reason}): check certfile and keyfile'} in etcd_lock_use_ssl"
    else:
        return None
    return _verdict(AuthRejected, url, why, 16)


def hung_up(error: BaseException | None) -> bool:
    """Whether a handshake ended as it does where nobody knows TLS, or where somebody is about to die."""
    return isinstance(error, ssl.SSLEOFError | ConnectionResetError | BrokenPipeError)


def look(url: str, context: ssl.SSLContext | None, timeout: float) -> NoAnswer | None:
    """Why the member at `url` hangs up on everybody, as far as it is for TLS; None if it is not.

    `context`: what we connect with, None without TLS. Within about `timeout` seconds, by two connections at the most.
    """
    deadline = time.monotonic() + timeout
    try:
        if context is None:
            return wants_tls(url) if _speaks_tls(url, deadline) else None
        return _look_at_tls(url, context, deadline)
    except OSError:
        return None


def _look_at_tls(url: str, context: ssl.SSLContext, deadline: float) -> NoAnswer | None:
    shaken = False
    try:
        with (
            _connected(url, deadline) as plain,
            context.wrap_socket(plain, server_hostname=urlsplit(url).hostname) as secure,
        ):
            shaken = True
            secure.settimeout(min(_ALERT_COMES_WITHIN, _left(deadline)))
            secure.recv(1)
            return None
    except (ssl.SSLError, ConnectionResetError, BrokenPipeError) as error:
        if isinstance(error, ssl.SSLError) and (meaning := tls_failure(url, error)) is not None:
            return meaning
        if shaken:
            return None
        if not hung_up(error):
            return no_tls(url, str(getattr(error, "reason", None) or error))
    return no_tls(url, "it answers in plain HTTP") if _speaks_http(url, deadline) else None


def _speaks_tls(url: str, deadline: float) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is told to it, and nothing believed
    try:
        with _connected(url, deadline) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return "alert" in str(error).lower()


def _speaks_http(url: str, deadline: float) -> bool:
    with _connected(url, deadline) as plain:
        plain.sendall(b"GET /version HTTP/1.0\r\n\r\n")
        return plain.recv(5) == b"HTTP/"


def _connected(url: str, deadline: float) -> socket.socket:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return socket.create_connection((parts.hostname or "", port), timeout=_left(deadline))


def _left(deadline: float) -> float:
    return max(0.05, deadline - time.monotonic())


def _verdict(kind: type[EtcdRejected], url: str, why: str, code: int) -> NoAnswer:
    return NoAnswer(why, verdict=kind(f"{url}: {why}", code))
