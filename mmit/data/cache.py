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

from mmit.data.files import FULL

HEADER = struct.Struct("<4sHxxII")  # magic, key bytes, value bytes, checksum of key and value
MAGIC = b"mmr1"


def cache_folder(configured: str | None) -> Path:
    """The folder for all that can be computed again: as configured, else $MMIT_CACHE, else ~/.cache/mmit."""
    return Path(configured or os.environ.get("MMIT_CACHE") or Path.home() / ".cache" / "mmit")


class RecordCache:
    """`get` and `put` of bytes under keys of at most 65,535 bytes; safe to share with forked and spawned processes.

    The file is open only during a call: a set has a cache a shard, more than a process may keep open.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._records: dict[bytes, tuple[int, int, int]] = {}  # start, bytes and checksum of key and value
        self._scanned = 0
        self._inode = 0

    def get(self, key: bytes) -> bytes | None:
        """The value under `key`, or None if no process has put it yet."""
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return self._read(descriptor, key)
        finally:
            os.close(descriptor)

    def put(self, key: bytes, value: bytes) -> None:
        """Keeps `value` under `key`; the first value stays. On a full disk nothing more is kept: that costs time."""
        try:
            self._put(key, value)
        except OSError as error:
            if error.errno not in FULL:
                raise

    def _put(self, key: bytes, value: bytes) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._scan(descriptor)
            if self._read(descriptor, key) is None:
                os.ftruncate(descriptor, self._scanned)  # nobody else writes: what does not parse is a torn end
                record = HEADER.pack(MAGIC, len(key), len(value), zlib.crc32(key + value)) + key + value
                os.pwrite(descriptor, record, self._scanned)
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _read(self, descriptor: int, key: bytes) -> bytes | None:
        if key in self._records:
            start, size, checksum = self._records[key]
            body = os.pread(descriptor, size, start)
            if zlib.crc32(body) == checksum:
                return body[len(key) :]
            self._forget()  # somebody cut or damaged the file since it was scanned
        self._scan(descriptor)
        if key not in self._records:
            return None
        start, size, _ = self._records[key]
        return os.pread(descriptor, size, start)[len(key) :]

    def _scan(self, descriptor: int) -> None:
        """Learns the records that other processes have appended since the last look."""
        status = os.fstat(descriptor)
        end = status.st_size
        if status.st_ino != self._inode or end < self._scanned:
            self._forget()
            self._inode = status.st_ino
        while self._scanned + HEADER.size <= end:
            magic, key_bytes, value_bytes, checksum = HEADER.unpack(os.pread(descriptor, HEADER.size, self._scanned))
            start, size = self._scanned + HEADER.size, key_bytes + value_bytes
            if magic != MAGIC or start + size > end:
                return
            body = os.pread(descriptor, size, start)
            if zlib.crc32(body) != checksum:
                return
            self._records.setdefault(body[:key_bytes], (start, size, checksum))
            self._scanned = start + size

    def _forget(self) -> None:
        self._records.clear()
        self._scanned = 0
