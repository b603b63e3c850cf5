"""Writing shards: the same samples give the same bytes, and a file is complete or not there.

A tar holds of each sample `KEY.json` and then `KEY.0.jpg`, `KEY.1.png`, ...; its headers say nothing of who wrote it
when. `ShardWriter` writes a whole set; `write_shard` and `write_index` are its two halves for several processes.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from mmit.data.images import header
from mmit.data.sample import COMPACT, Picture, Sample, SampleError, TextPart, check, to_json
from mmit.data.shard_index import INDEX, UNFINISHED, IndexWriter, SampleRow, ShardEntry, WrittenShard, read_index, seal

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
TAR = re.compile(r"shard-\d{6,}\.tar")
TEMPORARY = re.compile(
    r"(shard-\d{6,}\.tar|samples\.parquet|samples-\w+\.arrow|(index|conversion)\.json|rejected\.jsonl)\.\d+\.tmp"
)
BLOCK = tarfile.BLOCKSIZE
SENT_AHEAD = 4 * 2**20
"""Bytes written between two times that the system is asked to bring them to the disk."""


def shard_name(number: int) -> str:
    """The file name of the shard that covers the input rows from `number` times the rows of a shard."""
    return f"shard-{number:06d}.tar"


@dataclass(frozen=True)
class Stored:
    """A sample as a tar holds it: found to be right, its pictures what it says they are, its JSON made."""

    sample: Sample
    json: bytes


def stored(sample: Sample, where: str) -> Stored:
    """The sample checked and as JSON; what it says of its pictures is believed, as by whoever has just measured them.

    `SampleError` at `where` if a part cannot be right or meta is nothing that JSON holds.
    """
    try:
        return Stored(sample, to_json(check(sample, where)).encode())
    except SampleError:
        raise
    except (TypeError, ValueError) as error:
        raise SampleError(f"{where}: cannot be stored as JSON ({error}); use plain texts, numbers and lists") from None


def write_shard(path: Path, samples: Iterable[Sample | Stored]) -> WrittenShard:
    """Write one tar, complete under its name or not there at all; what is `Stored` is not checked a second time."""
    try:
        with _Tar(path) as tar:
            for sample in samples:
                tar.add(sample)
            return tar.finish()
    except OSError as error:  # a full disk does not say which
        error.filename = error.filename or str(path)
        raise


def write_index(folder: Path, shards: Iterable[WrittenShard]) -> None:
    """Write `samples.parquet` and, last, `index.json` for the finished tars of `folder`, given in their order."""
    with IndexWriter(folder) as index:
        for shard in shards:
            index.add(shard)
        index.finish()


class ShardWriter:
    """Writes a shard set sample by sample, holding one picture and the rows of one shard in memory.

    A shard covers a fixed range of input rows: a row that gives no sample is reported by `skip` and leaves its place
    empty. The set exists once `close` has run without an exception inside the `with`.
    """

    def __init__(self, folder: Path, *, samples_per_shard: int = 1000, overwrite: bool = False) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; write 1 or more")
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        _claim(self.folder, overwrite)
        self._index = IndexWriter(self.folder)
        self._tar: _Tar | None = None
        self._rows = 0
        self._closed = False

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def write(self, sample: Sample) -> None:
        """Add a sample; `SampleError` if its key, parts or pictures cannot be right."""
        if self._tar is None:
            self._tar = _Tar(self.folder / shard_name(self._rows // self.samples_per_shard))
        self._tar.add(sample)
        self._advance()

    def skip(self) -> None:
        """Let the place of an input row that gave no sample stay empty."""
        if self._tar is None:
            self._tar = _Tar(self.folder / shard_name(self._rows // self.samples_per_shard))
        self._advance()

    def close(self) -> None:
        """Finish the last shard and write the index."""
        if self._closed:
            return
        self._closed = True
        self._finish_shard()
        self._index.finish()
        (self.folder / UNFINISHED).unlink()

    def abandon(self) -> None:
        """Drop the shard at hand and leave no index: the folder stays marked as unfinished."""
        self._closed = True
        if self._tar is not None:
            self._tar.abandon()
        self._index.abandon()

    def _advance(self) -> None:
        self._rows += 1
        if self._rows % self.samples_per_shard == 0:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is not None:
            self._index.add(self._tar.finish())
            self._tar = None


def _claim(folder: Path, overwrite: bool) -> None:
    """Make `folder` ready for writing without ever touching files that are not ours."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / UNFINISHED
    finished = (folder / INDEX).exists()
    if finished and not overwrite:
        raise SampleError(
            f"{folder}: already holds a finished shard set; write to another folder, or pass overwrite on purpose"
        )
    listed = {entry.name for entry in read_index(folder).entries} if finished else None
    tars = sorted(folder.glob("*.tar"))
    ours = [path for path in tars if TAR.fullmatch(path.name) and (note.exists() or path.name in (listed or ()))]
    for path in tars:
        if path not in ours:
            raise SampleError(f"{folder}: holds {path.name}, which is not ours to remove; write to an empty folder")
    note.touch()
    unfinished = [path for path in folder.glob("*.tmp") if TEMPORARY.fullmatch(path.name)]
    for path in [folder / INDEX, *ours, *unfinished, *folder.glob("samples-*.arrow")]:
        path.unlink(missing_ok=True)


class _Tar:
    """One tar growing under a temporary name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self.file: IO[bytes] = self.temporary.open("wb")
        self.hash = hashlib.sha256()
        self.position = 0
        self.sent = 0
        self.rows: list[SampleRow] = []
        self.keys: set[str] = set()

    def __enter__(self) -> _Tar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.file.closed:
            self.abandon()

    def add(self, item: Sample | Stored) -> None:
        ready = item if isinstance(item, Stored) else self._checked(item)
        sample = ready.sample
        _check_key(sample.key, self.keys, f"{self.path.name}:{sample.key}")
        start = self.position
        head = _member(f"{sample.key}.json", ready.json)
        for number, picture in enumerate(sample.images):
            assert picture.data is not None
            head += member_header(f"{sample.key}.{number}.{picture.ending}", len(picture.data))
            self._write(head)  # what is small goes with what is beside it: a call takes as long as a kilobyte
            self._write(picture.data)
            head = bytes(-len(picture.data) % BLOCK)
        self._write(head)
        self.keys.add(sample.key)
        self.rows.append(row_of(sample, start, self.position - start, len(ready.json)))

    def _checked(self, sample: Sample) -> Stored:
        where = f"{self.path.name}:{sample.key}"
        ready = stored(sample, where)
        for number, picture in enumerate(sample.images):
            checked(picture, f"{where}: picture {number}")
        return ready

    def finish(self) -> WrittenShard:
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.position % tarfile.RECORDSIZE))
        seal(self.file, self.temporary, self.path)
        entry = ShardEntry(self.path.name, self.position, self.hash.hexdigest(), len(self.rows))
        return WrittenShard(entry, tuple(self.rows))

    def abandon(self) -> None:
        with suppress(OSError):  # on a full disk closing fails too, and what is there must go all the more
            self.file.close()
        self.temporary.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.position += len(data)
        if self.position - self.sent >= SENT_AHEAD:
            self._send_ahead()

    def _send_ahead(self) -> None:
        """Begins to bring what is written to the disk, so that sealing the tar finds little left to wait for."""
        if hasattr(os, "posix_fadvise"):  # macOS has none
            os.posix_fadvise(self.file.fileno(), self.sent, self.position - self.sent, os.POSIX_FADV_DONTNEED)
        self.sent = self.position


def _member(name: str, data: bytes) -> bytes:
    return b"%b%b%b" % (member_header(name, len(data)), data, bytes(-len(data) % BLOCK))


def _check_key(key: str, taken: set[str], where: str) -> None:
    if not KEY.fullmatch(key):
        raise SampleError(
            f"{where!r}: a key names files in a tar; write 1 to 80 letters, digits, _ and -, not starting with -"
        )
    if key in taken:
        raise SampleError(f"{where}: two samples of one shard have this key; number them")


def checked(picture: Picture, where: str) -> bytes:
    """The bytes of a picture that is what it says it is."""
    if picture.data is None:
        raise SampleError(f"{where}: has no bytes; read the sample with its images before writing it")
    found = hashlib.sha256(picture.data).hexdigest()
    if found != picture.sha256:
        raise SampleError(f"{where}: its bytes have sha256 {found[:16]}..., the sample says {picture.sha256[:16]}...")
    shown = header(picture.data, where)
    if (shown.width, shown.height) != (picture.width, picture.height):
        raise SampleError(
            f"{where}: shown it has {shown.width} x {shown.height} pixels, "
            f"the sample says {picture.width} x {picture.height}"
        )
    if shown.ending != picture.ending:
        raise SampleError(
            f"{where}: its content calls for the ending {shown.ending!r}, the sample says {picture.ending!r}"
        )
    return picture.data


def row_of(sample: Sample, offset: int, size: int, json_bytes: int) -> SampleRow:
    return SampleRow(
        offset=offset,
        bytes=size,
        json_bytes=json_bytes,
        key=sample.key,
        source=sample.source,
        widths=tuple([picture.width for picture in sample.images]),
        heights=tuple([picture.height for picture in sample.images]),
        sha256=tuple([bytes.fromhex(picture.sha256) for picture in sample.images]),
        characters=sum(len(part.text) for item in sample.messages for part in item.parts if isinstance(part, TextPart)),
        meta=COMPACT.encode(dict(sample.meta)),
    )


def member_header(name: str, size: int) -> bytes:
    """A tar header (POSIX ustar) that says nothing of who wrote it when.

    The bytes that `tarfile` gives, at a tenth of its time, and whatever it will give in another Python.
    """
    encoded, digits = name.encode("ascii"), b"%011o" % size
    if len(encoded) > 100 or len(digits) > 11:
        raise SampleError(f"{name}: {size:,} bytes under this name do not fit into a tar header; use a shorter key")
    checksum = HEADER_SUM + sum(encoded) + sum(digits)
    return b"%b%b%b\0%b%06o\0 %b" % (encoded.ljust(100, b"\0"), OWNER, digits, TIME, checksum, REST)


OWNER = b"0000644\0" + b"0000000\0" * 2
TIME = b"00000000000\0"
REST = (b"0" + bytes(100) + b"ustar\00000").ljust(BLOCK - 156, b"\0")
HEADER_SUM = sum(OWNER) + sum(TIME) + 8 * ord(" ") + sum(REST)
