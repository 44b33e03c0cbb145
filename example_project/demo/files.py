"""Celery's filesystem transport and results, for a demo on a machine without a broker.

As they come they let a reader see a file before it is written. Here each is written aside, then renamed.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from celery.backends.filesystem import FilesystemBackend
from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    def _put(self, queue: str, payload: Any, **_: Any) -> None:  # type: ignore[override]  # its stubs disagree
        name = f"{time.monotonic_ns():020}_{uuid.uuid4()}.{queue}.msg"
        _write(Path(self.data_folder_out, name), dumps(payload).encode())


class Transport(filesystem.Transport):
    Channel = Channel


class Results(FilesystemBackend):
    def set(self, key: Any, value: Any) -> None:
        _write(Path(self._filename(key).decode()), value.encode() if isinstance(value, str) else value)  # type: ignore[attr-defined]


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{uuid.uuid4()}")
    aside.write_bytes(content)
    aside.rename(path)
