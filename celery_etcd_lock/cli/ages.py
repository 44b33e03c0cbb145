"""Times as people read them in a table: how long ago, and how long still. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone

from celery_etcd_lock.cli.leases import GONE
from celery_etcd_lock.etcd.api import LeaseKeys

__all__ = ["age", "ago", "iso", "lasting", "left", "moment"]

_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def lasting(seconds: float) -> str:
    """``3m12s``: the two largest units. Less than nothing, where clocks differ, is nothing."""
    rest, parts = max(0, round(seconds)), list[str]()
    for unit, size in _UNITS:
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count:02}{unit}" if parts else f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


def moment(text: object) -> datetime | None:
    """ISO 8601, UTC unless it says otherwise; None for anything else."""
    try:
        when = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


def iso(when: datetime, timespec: str = "seconds") -> str:
    """The other way round: UTC, with a Z."""
    return when.astimezone(timezone.utc).isoformat(timespec=timespec).replace("+00:00", "Z")


def age(text: object, now: datetime) -> float | None:
    """Seconds from `text`, ISO 8601, until `now`; None where it is no time."""
    when = moment(text)
    return None if when is None else (now - when).total_seconds()


def ago(text: object, now: datetime) -> str:
    """The same for a table."""
    seconds = age(text, now)
    return "?" if seconds is None else lasting(seconds)


def left(lease: int, asked: Mapping[int, LeaseKeys]) -> str:
    """The time to live of `lease`, for a table."""
    if not lease:
        return "never"
    if lease not in asked:
        return "?"
    ttl = asked[lease].ttl
    return "gone" if ttl <= GONE else lasting(ttl)
