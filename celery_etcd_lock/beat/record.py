"""What etcd knows of one entry of the schedule, as JSON in ``/<namespace>/beat/<name>/entry/<entry>``."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

from celery_etcd_lock.beat.slots import Slot

__all__ = ["Record", "beat_prefix", "entry_key", "entry_name", "entry_prefix", "leader_name"]

_STATES: Final = ("", "sending", "sent", "failed")


class Record(NamedTuple):
    """How far an entry has come. ``sending`` is a promise: whoever leads sends that slot, under that id."""

    last_run_at: datetime | None = None
    """UTC. While it is ``sending``: that of the tick before, by which this one is due."""
    total_run_count: int = 0
    state: str = ""
    """``"sending"``, ``"sent"``, ``"failed"`` (it cannot be published); ``""``: no tick so far."""
    slot: Slot | None = None

    def sending(self, slot: Slot) -> Record:
        return self._replace(state="sending", slot=slot)

    def to_json(self) -> bytes:
        record: dict[str, Any] = {"state": self.state} if self.state else {}
        if self.slot is not None:
            record |= {"due": self.slot.due.isoformat(), "task_id": self.slot.task_id}
        if self.last_run_at is not None:
            record["last_run_at"] = self.last_run_at.isoformat()
        record["total_run_count"] = self.total_run_count
        return json.dumps(record, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, value: bytes) -> Record:
        """What `to_json` made; an entry that was never sent, for anything else."""
        try:
            record = json.loads(value)
            state, at = str(record.get("state", "")), record.get("last_run_at")
            slot = Slot(_utc(record["due"]), str(record["task_id"])) if state else None
            if state not in _STATES:
                return cls()
            return cls(_utc(at) if at else None, int(record.get("total_run_count", 0)), state, slot)
        except (ValueError, TypeError, KeyError, AttributeError):
            return cls()


def _utc(text: str) -> datetime:
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)


def beat_prefix(namespace: str, beat: str) -> str:
    """Under which all beats of this name have what they share."""
    return f"/{namespace}/beat/{beat}/"


def leader_name(namespace: str, beat: str) -> str:
    """The election in which they stand."""
    return f"{beat_prefix(namespace, beat)}leader"


def entry_prefix(namespace: str, beat: str) -> str:
    return f"{beat_prefix(namespace, beat)}entry/"


def entry_key(prefix: str, entry: str) -> str:
    """Where the record of `entry` is, under an `entry_prefix`."""
    return prefix + quote(entry, safe="")


def entry_name(prefix: str, key: str) -> str:
    """The entry whose record is at `key`."""
    return unquote(key.removeprefix(prefix))
