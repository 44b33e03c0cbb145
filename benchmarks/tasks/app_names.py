"""The peers, as people call them."""

from __future__ import annotations

__all__ = ["PEERS"]

PEERS = {"once": "celery-once", "singleton": "celery-singleton", "heimdall": "celery-heimdall"}
