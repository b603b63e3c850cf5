"""A file of records that many processes append to and a kill cannot harm: what was computed once is kept.

A record is lost (and computed again) at worst, never wrong: each carries a checksum, and a torn end is cut off by the
next writer. Used for rendered ids (one file a shard) and for the features of a frozen tower.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from pathlib import Path
from typing import Any

HEADER = struct.Struct("<4sHxxII")  # magic, key bytes, value bytes, checksum of key and value
MAGIC = b"mmr1"


def cache_folder(configured: str | None) -> Path:
    """The folder for all that can be computed again: as configured, else $MMIT_CACHE, else ~/.cache/mmit."""
    return Path(configured or os.environ.get("MMIT_CACHE") or Path.home() / ".cache" / "mmit")


class RecordCache:
    """`get` and `put` of bytes under keys of at most 65,535 bytes; safe to share with forked and spawned processes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._opened: tuple[int, int] | None = None
        self._places: dict[bytes, tuple[int, int]] = {}
        self._scanned = 0

    def get(self, key: bytes) -> bytes | None:
        """The value under `key`, or None if no process has put it yet."""
        if key not in self._places:
            self._scan()
        place = self._places.get(key)
        return None if place is None else os.pread(self._descriptor(), place[1], place[0])

    def put(self, key: bytes, value: bytes) -> None:
        """Keeps `value` under `key`; the first value stays."""
        descriptor = self._descriptor()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            self._scan()
            if key in self._places:
                return
            os.ftruncate(descriptor, self._scanned)  # under the lock nobody writes: what does not parse is a torn end
            record = HEADER.pack(MAGIC, len(key), len(value), zlib.crc32(key + value)) + key + value
            os.pwrite(descriptor, record, self._scanned)
            self._scan()
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _scan(self) -> None:
        """Learns the records that other processes have appended since the last look."""
        descriptor = self._descriptor()
        end = os.fstat(descriptor).st_size
        while self._scanned + HEADER.size <= end:
            magic, key_bytes, value_bytes, checksum = HEADER.unpack(os.pread(descriptor, HEADER.size, self._scanned))
            start = self._scanned + HEADER.size
            if magic != MAGIC or start + key_bytes + value_bytes > end:
                return
            body = os.pread(descriptor, key_bytes + value_bytes, start)
            if zlib.crc32(body) != checksum:
                return
            self._places.setdefault(body[:key_bytes], (start + key_bytes, value_bytes))
            self._scanned = start + key_bytes + value_bytes

    def _descriptor(self) -> int:
        # A lock belongs to an open file, which forked children share: each process must open its own.
        if self._opened is None or self._opened[0] != os.getpid():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._opened = (os.getpid(), os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def __del__(self) -> None:
        if self._opened is not None and self._opened[0] == os.getpid():
            os.close(self._opened[1])
