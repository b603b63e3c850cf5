"""Shards: samples in standard webdataset tars, written to the same bytes every time, read back by offset.

A shard set is a folder of tars, in each sample `KEY.json` first and then its pictures `KEY.0.jpg`, `KEY.1.png`, ...,
with `samples.parquet` (one row a sample: where it lies and all that is needed to plan with it) and, written last,
`index.json` (the tars with sizes and hashes). Any webdataset reader takes the tars alone; we read one sample by one
`pread`, so every order is possible, nothing is lost at the end of a cut file, and nothing is ever unpacked to disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmit.data.images import decode, ending_of, size_of
from mmit.data.sample import Picture, Sample, SampleError, TextPart, check, from_json, to_json

FORMAT = 1
INDEX = "index.json"
SAMPLES = "samples.parquet"
UNFINISHED = "UNFINISHED"
"""A note that stands in the folder while it is written, so that what a killed writer left is known to be ours."""

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
TAR = re.compile(r"shard-\d{6,}\.tar")
BLOCK = tarfile.BLOCKSIZE
OPEN_TARS = 64

SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),  # position in the list of index.json
        ("offset", pa.int64()),  # of the tar header of KEY.json
        ("bytes", pa.int64()),  # of all members with their headers and padding
        ("json_bytes", pa.int64()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("widths", pa.list_(pa.int32())),
        ("heights", pa.list_(pa.int32())),
        ("sha256", pa.list_(pa.binary(32))),
        ("characters", pa.int64()),  # of all texts
        ("meta", pa.string()),  # JSON
    ]
)


@dataclass(frozen=True)
class SampleRow:
    """What `samples.parquet` says of one sample, but for the shard it lies in."""

    offset: int
    bytes: int
    json_bytes: int
    key: str
    source: str
    widths: tuple[int, ...]
    heights: tuple[int, ...]
    sha256: tuple[bytes, ...]
    characters: int
    meta: str


@dataclass(frozen=True)
class ShardEntry:
    """One tar as `index.json` lists it."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class WrittenShard:
    """One finished tar and its rows: all that the index needs, so processes can write shards and one the index."""

    entry: ShardEntry
    rows: tuple[SampleRow, ...]


@dataclass(frozen=True)
class Fault:
    """Something wrong in a shard set."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


# Writing ------------------------------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    """The file name of the shard that covers the input rows from `number` times the rows of a shard."""
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[Sample]) -> WrittenShard:
    """Write one tar, complete under its name or not there at all."""
    with _Tar(path) as tar:
        for sample in samples:
            tar.add(sample)
        return tar.finish()


def write_index(folder: Path, shards: Iterable[WrittenShard]) -> None:
    """Write `samples.parquet` and, last, `index.json` for the finished tars of `folder`, given in their order."""
    with _Index(folder) as index:
        for shard in shards:
            index.add(shard)
        index.finish()


def write_shards(
    samples: Iterable[Sample], folder: Path, *, samples_per_shard: int = 1000, overwrite: bool = False
) -> ShardSet:
    """Write a whole shard set and open it."""
    with ShardWriter(folder, samples_per_shard=samples_per_shard, overwrite=overwrite) as writer:
        for sample in samples:
            writer.write(sample)
    return ShardSet(folder)


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
        self._index = _Index(self.folder)
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
    ours: list[Path] = []
    if (folder / INDEX).exists():
        if not overwrite:
            raise SampleError(
                f"{folder}: already holds a finished shard set; write to another folder, or pass overwrite on purpose"
            )
        ours = [folder / INDEX, *(folder / entry.name for entry in _read_index(folder).entries)]
        note.touch()
    elif note.exists():
        ours = [path for path in folder.glob("*.tar") if TAR.fullmatch(path.name)]
    for path in ours:
        path.unlink(missing_ok=True)
    for cached in folder.glob("samples-*.arrow"):
        cached.unlink()
    strangers = sorted(path.name for path in folder.glob("*.tar"))
    if strangers:
        raise SampleError(f"{folder}: holds {strangers[0]}, which is of no shard set here; write to an empty folder")
    note.touch()


class _Tar:
    """One tar growing under a temporary name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self.file: IO[bytes] = self.temporary.open("wb")
        self.hash = hashlib.sha256()
        self.position = 0
        self.rows: list[SampleRow] = []
        self.keys: set[str] = set()

    def __enter__(self) -> _Tar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.file.closed:
            self.abandon()

    def add(self, sample: Sample) -> None:
        where = f"{self.path.name}:{sample.key}"
        _check_key(sample.key, self.keys, where)
        pictures = [
            _checked(picture, f"{where}: picture {number}")
            for number, picture in enumerate(check(sample, where).images)
        ]
        text = to_json(sample).encode()
        start = self.position
        self._member(f"{sample.key}.json", text)
        for number, data in enumerate(pictures):
            self._member(f"{sample.key}.{number}.{sample.images[number].ending}", data)
        self.keys.add(sample.key)
        self.rows.append(_row(sample, start, self.position - start, len(text)))

    def finish(self) -> WrittenShard:
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.position % tarfile.RECORDSIZE))
        _seal(self.file, self.temporary, self.path)
        entry = ShardEntry(self.path.name, self.position, self.hash.hexdigest(), len(self.rows))
        return WrittenShard(entry, tuple(self.rows))

    def abandon(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def _member(self, name: str, data: bytes) -> None:
        self._write(_header(name, len(data)))
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.position += len(data)


class _Index:
    """`samples.parquet` growing by one row group a shard, then `index.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / f"{SAMPLES}.{os.getpid()}.tmp"
        self.file: IO[bytes] = self.temporary.open("wb")
        self.parquet = pq.ParquetWriter(self.file, SCHEMA, compression="zstd")
        self.entries: list[ShardEntry] = []

    def __enter__(self) -> _Index:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.file.closed:
            self.abandon()

    def add(self, shard: WrittenShard) -> None:
        if shard.rows:
            columns = {
                name: [len(self.entries)] * len(shard.rows)
                if name == "shard"
                else [row.__dict__[name] for row in shard.rows]
                for name in SCHEMA.names
            }
            self.parquet.write_table(pa.table(columns, schema=SCHEMA))
        self.entries.append(shard.entry)

    def finish(self) -> None:
        self.parquet.close()
        _seal(self.file, self.temporary, self.folder / SAMPLES)
        record = {
            "format": FORMAT,
            "samples": sum(entry.samples for entry in self.entries),
            "fingerprint": _fingerprint(self.entries),
            "samples.parquet": {
                "bytes": (self.folder / SAMPLES).stat().st_size,
                "sha256": _file_sha256(self.folder / SAMPLES),
            },
            "shards": [
                {"name": entry.name, "bytes": entry.bytes, "sha256": entry.sha256, "samples": entry.samples}
                for entry in self.entries
            ],
        }
        temporary = self.folder / f"{INDEX}.{os.getpid()}.tmp"
        file = temporary.open("wb")
        file.write((json.dumps(record, indent=1) + "\n").encode())
        _seal(file, temporary, self.folder / INDEX)
        _sync_folder(self.folder)

    def abandon(self) -> None:
        self.parquet.close()
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def _check_key(key: str, taken: set[str], where: str) -> None:
    if not KEY.fullmatch(key):
        raise SampleError(
            f"{where!r}: a key names files in a tar; write 1 to 80 letters, digits, _ and -, not starting with -"
        )
    if key in taken:
        raise SampleError(f"{where}: two samples of one shard have this key; number them")


def _checked(picture: Picture, where: str) -> bytes:
    """The bytes of a picture that is what it says it is."""
    if picture.data is None:
        raise SampleError(f"{where}: has no bytes; read the sample with its images before writing it")
    found = hashlib.sha256(picture.data).hexdigest()
    if found != picture.sha256:
        raise SampleError(f"{where}: its bytes have sha256 {found[:16]}..., the sample says {picture.sha256[:16]}...")
    size = size_of(picture.data, where)
    if size != (picture.width, picture.height):
        raise SampleError(
            f"{where}: shown it has {size[0]} x {size[1]} pixels, the sample says {picture.width} x {picture.height}"
        )
    ending = ending_of(picture.data, where)
    if ending != picture.ending:
        raise SampleError(f"{where}: its content calls for the ending {ending!r}, the sample says {picture.ending!r}")
    return picture.data


def _row(sample: Sample, offset: int, size: int, json_bytes: int) -> SampleRow:
    return SampleRow(
        offset=offset,
        bytes=size,
        json_bytes=json_bytes,
        key=sample.key,
        source=sample.source,
        widths=tuple(picture.width for picture in sample.images),
        heights=tuple(picture.height for picture in sample.images),
        sha256=tuple(bytes.fromhex(picture.sha256) for picture in sample.images),
        characters=sum(len(part.text) for item in sample.messages for part in item.parts if isinstance(part, TextPart)),
        meta=json.dumps(dict(sample.meta), ensure_ascii=False, sort_keys=True, separators=(",", ":")),
    )


def _header(name: str, size: int) -> bytes:
    """A tar header that says nothing of who wrote it when."""
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    member.mtime = 0
    return member.tobuf(tarfile.USTAR_FORMAT)


def _seal(file: IO[bytes], temporary: Path, path: Path) -> None:
    """Close a file so that it survives a power cut, then give it its name."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(entries: Sequence[ShardEntry]) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *([e.name, e.sha256] for e in entries)]).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Reading ------------------------------------------------------------------------------------------------------------


class ShardSet:
    """A shard set opened for reading: everything a plan needs without touching a tar, and samples by number.

    Opening compares the size of every tar with the index and raises one `SampleError` if the set is not whole.
    May be pickled, forked and used by threads.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        for fault in _size_faults(self.folder, index):
            raise SampleError(str(fault))
        self.fingerprint = index.fingerprint
        self.shard_names = [entry.name for entry in index.entries]
        self.shard_sizes = [entry.samples for entry in index.entries]
        self.shard_sha256 = [entry.sha256 for entry in index.entries]
        self._starts = np.cumsum([0, *self.shard_sizes])
        self._arrow = _arrow_file(self.folder, index)
        self._table = _map(self._arrow)
        self._tars: OrderedDict[int, _OpenTar] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_table", "_tars")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._table = _map(self._arrow)
        self._tars = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def shard_of(self, i: int) -> tuple[int, int]:
        """The number of the shard that holds sample `i`, and its place in it."""
        self._check_number(i)
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return shard, i - int(self._starts[shard])

    def key(self, i: int) -> str:
        return self._value("key", i)

    def source(self, i: int) -> str:
        return self._value("source", i)

    def where(self, i: int) -> str:
        """How messages name sample `i`: FOLDER/SHARD:KEY."""
        return f"{self.folder.name}/{self.shard_names[self.shard_of(i)[0]]}:{self.key(i)}"

    def image_sizes(self, i: int) -> list[tuple[int, int]]:
        """Width and height of each picture of sample `i`, as shown."""
        return list(zip(self._value("widths", i), self._value("heights", i), strict=True))

    def characters(self, i: int) -> int:
        """Characters in all texts of sample `i`."""
        return self._value("characters", i)

    def meta(self, i: int) -> dict[str, Any]:
        return json.loads(self._value("meta", i))

    def read(self, i: int, *, images: bool = True) -> Sample:
        """Sample `i`, with `images=False` without reading a byte of its pictures."""
        shard, _ = self.shard_of(i)
        where = self.where(i)
        json_bytes = self._value("json_bytes", i)
        size = self._value("bytes", i) if images else BLOCK + json_bytes
        offset = self._value("offset", i)
        raw = os.pread(self._tar(shard).descriptor, size, offset)
        if len(raw) < size:
            raise SampleError(f"{where}: the tar ends at byte {offset + len(raw)} inside this sample; {_REMEDY}")
        return _sample(raw, self.key(i), json_bytes, where, images=images)

    def picture_groups(self) -> np.ndarray:
        """int64 (len,): samples that share a picture, directly or through others, have the same number.

        The number is that of the group's first sample; a sample without pictures is a group of its own.
        """
        counts = _lengths(self._table.column("sha256"))
        owners = np.repeat(np.arange(len(self), dtype=np.int64), counts)
        hashes = _flat_hashes(self._table.column("sha256"))
        pictures = np.unique(hashes, return_inverse=True)[1]
        return _components(len(self), owners, pictures)

    def meta_groups(self, key: str) -> np.ndarray:
        """int64 (len,): samples with an equal `meta` value under `key` have the same number, that of the first."""
        first: dict[str, int] = {}
        groups = np.empty(len(self), dtype=np.int64)
        i = 0
        for batch in self._table.column("meta").chunks:
            for text in batch:
                meta = json.loads(text.as_py())
                if key not in meta:
                    raise SampleError(
                        f"{self.where(i)}: has no meta value {key!r} (it has: {', '.join(sorted(meta)) or 'none'}); "
                        f"add it to every sample or group by another"
                    )
                groups[i] = first.setdefault(json.dumps(meta[key], sort_keys=True), i)
                i += 1
        return groups

    def verify(self) -> Iterator[Fault]:
        """All faults of the set; see `verify`."""
        return verify(self.folder)

    def _check_number(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in {self.folder}")

    def _value(self, column: str, i: int) -> Any:
        self._check_number(i)
        return self._table.column(column)[i].as_py()

    def _tar(self, shard: int) -> _OpenTar:
        tar = self._tars.get(shard)
        if tar is None:
            path = self.folder / self.shard_names[shard]
            try:
                tar = _OpenTar(os.open(path, os.O_RDONLY))
            except OSError as error:
                raise SampleError(f"{path}: cannot be opened ({error.strerror}); {_REMEDY}") from error
            self._tars[shard] = tar
            if len(self._tars) > OPEN_TARS:
                self._tars.popitem(last=False)
        return tar


_REMEDY = "the tar was changed or cut after its index was written: copy it again, or convert again"


class _OpenTar:
    """A file descriptor that closes with its last user, so that one thread cannot close it under another."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def verify(folder: Path | str) -> Iterator[Fault]:
    """Every fault of a shard set, also of one that `ShardSet` refuses to open: all hashes, members and pictures."""
    folder = Path(folder)
    try:
        index = _read_index(folder)
        table = _map(_arrow_file(folder, index))
    except SampleError as error:
        where, _, text = str(error).partition(": ")
        yield Fault(where, text)
        return
    row = 0
    for number, entry in enumerate(index.entries):
        path = folder / entry.name
        rows = table.slice(row, entry.samples)
        row += entry.samples
        faults = list(_size_faults(folder, index, only=number))
        yield from faults
        if not path.is_file():
            continue
        if not faults and _file_sha256(path) != entry.sha256:
            yield Fault(str(path), f"its sha256 is not the one in {INDEX}; {_REMEDY}")
        with path.open("rb") as tar:
            yield from _sample_faults(tar, f"{folder.name}/{entry.name}", rows, number)
    known = {entry.name for entry in index.entries}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            yield Fault(str(path), f"is not listed in {INDEX}, so we never read it but other tools do; remove it")


def _sample_faults(tar: IO[bytes], name: str, rows: pa.Table, shard: int) -> Iterator[Fault]:
    position = 0
    for record in rows.to_pylist():
        where = f"{name}:{record['key']}"
        if record["shard"] != shard or record["offset"] != position:
            yield Fault(where, f"{SAMPLES} says byte {record['offset']}, the sample before ends at {position}")
        position = record["offset"] + record["bytes"]
        tar.seek(record["offset"])
        raw = tar.read(record["bytes"])
        if len(raw) < record["bytes"]:
            yield Fault(where, f"the tar ends inside this sample; {_REMEDY}")
            return
        try:
            sample = _sample(raw, record["key"], record["json_bytes"], where, images=True)
        except SampleError as error:
            yield Fault(where, str(error).removeprefix(f"{where}: "))
            continue
        found = asdict(_row(sample, record["offset"], record["bytes"], record["json_bytes"]))
        if any(
            record[column] != (list(value) if isinstance(value, tuple) else value) for column, value in found.items()
        ):
            yield Fault(where, f"{SAMPLES} and the sample itself differ; convert again")
        for number, picture in enumerate(sample.images):
            here = f"{where}: picture {number}"
            try:
                decode(_checked(picture, here), here, window=picture.window)
            except SampleError as error:
                yield Fault(here, str(error).removeprefix(f"{here}: "))
    tar.seek(position)
    rest = tar.read()
    if rest.strip(b"\0") or len(rest) < 2 * BLOCK:
        yield Fault(name, f"does not end after its last sample as a tar must; {_REMEDY}")


def _sample(raw: bytes, key: str, json_bytes: int, where: str, *, images: bool) -> Sample:
    """The sample in the bytes of its members, each of which must carry the name that the index leads to expect."""
    text, position = _take(raw, 0, f"{key}.json", where)
    if len(text) != json_bytes:
        raise SampleError(f"{where}: its JSON has {len(text)} bytes, the index says {json_bytes}; {_REMEDY}")
    sample = from_json(text, where)
    if sample.key != key:
        raise SampleError(f"{where}: its JSON has the key {sample.key!r}; {_REMEDY}")
    if not images:
        return sample
    data = []
    for number, picture in enumerate(sample.images):
        content, position = _take(raw, position, f"{key}.{number}.{picture.ending}", where)
        data.append(content)
    if position != len(raw):
        raise SampleError(f"{where}: more members follow than its JSON names; {_REMEDY}")
    return from_json(text, where, data=data)


def _take(raw: bytes, position: int, name: str, where: str) -> tuple[bytes, int]:
    """The content of the member that begins at `position`, and where the next one begins."""
    try:
        header = tarfile.TarInfo.frombuf(raw[position : position + BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise SampleError(f"{where}: no tar header where {name} should begin; {_REMEDY}") from None
    start = position + BLOCK
    if header.name != name or not header.isreg() or start + header.size > len(raw):
        raise SampleError(f"{where}: found the member {header.name!r} where {name} should be; {_REMEDY}")
    return raw[start : start + header.size], start + header.size + -header.size % BLOCK


# The index ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _IndexFile:
    entries: tuple[ShardEntry, ...]
    fingerprint: str
    samples_bytes: int
    samples_sha256: str


def _read_index(folder: Path) -> _IndexFile:
    path = folder / INDEX
    if not path.is_file():
        hint = (
            "its writing was not finished: convert again"
            if (folder / UNFINISHED).exists()
            else ("this is not a folder of shards: name the one that `mmit-data convert` wrote")
        )
        raise SampleError(f"{folder}: has no {INDEX}; {hint}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise SampleError(
                f"{path}: format {record['format']!r}, this mmit reads {FORMAT}; upgrade mmit or convert again"
            )
        entries = tuple(
            ShardEntry(item["name"], item["bytes"], item["sha256"], item["samples"]) for item in record["shards"]
        )
        parquet = record["samples.parquet"]
        index = _IndexFile(entries, record["fingerprint"], parquet["bytes"], parquet["sha256"])
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SampleError(f"{path}: damaged ({type(error).__name__}: {error}); convert again") from error
    for entry in entries:
        if Path(entry.name).name != entry.name:
            raise SampleError(f"{path}: lists {entry.name!r}, which is outside of its folder; convert again")
    if _fingerprint(entries) != index.fingerprint:
        raise SampleError(f"{path}: its fingerprint does not belong to its list of shards; convert again")
    return index


def _size_faults(folder: Path, index: _IndexFile, *, only: int | None = None) -> Iterator[Fault]:
    for entry in index.entries if only is None else index.entries[only : only + 1]:
        path = folder / entry.name
        try:
            size = path.stat().st_size
        except OSError as error:
            yield Fault(
                str(path), f"is listed in {INDEX} but missing ({error.strerror}); copy it here or convert again"
            )
            continue
        if size != entry.bytes:
            yield Fault(str(path), f"has {size:,} bytes, {INDEX} says {entry.bytes:,}; {_REMEDY}")


def _arrow_file(folder: Path, index: _IndexFile) -> Path:
    """`samples.parquet` as an Arrow file that can be memory-mapped, made once and named by the hash of its content."""
    name = f"samples-{index.samples_sha256[:32]}.arrow"
    cache = Path(os.environ.get("MMIT_CACHE") or Path.home() / ".cache" / "mmit") / "samples"
    for candidate in (folder / name, cache / name):
        if candidate.is_file() and _is_whole(candidate, index):
            return candidate
    parquet = folder / SAMPLES
    if not parquet.is_file():
        raise SampleError(f"{parquet}: is missing; copy it here or convert again")
    if parquet.stat().st_size != index.samples_bytes or _file_sha256(parquet) != index.samples_sha256:
        raise SampleError(f"{parquet}: is not the one that {INDEX} was written with; copy both again or convert again")
    if os.access(folder, os.W_OK):
        target = folder / name
    else:
        cache.mkdir(parents=True, exist_ok=True)
        target = cache / name
    temporary = target.with_name(f"{name}.{os.getpid()}.tmp")
    source = pq.ParquetFile(parquet)
    with source, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in source.iter_batches(batch_size=65536):
            writer.write_batch(batch.cast(SCHEMA))
    os.replace(temporary, target)
    return target


def _is_whole(path: Path, index: _IndexFile) -> bool:
    try:
        return _map(path).num_rows == sum(entry.samples for entry in index.entries)
    except pa.ArrowInvalid:
        return False


def _map(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()


# Groups -------------------------------------------------------------------------------------------------------------


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    """How many entries each list of a column has."""
    parts = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def _flat_hashes(column: pa.ChunkedArray) -> np.ndarray:
    """The 32 bytes of every picture, all lists joined, straight from the mapped file."""
    parts = [np.empty(0, dtype="S32")]
    for chunk in column.chunks:
        hashes = chunk.flatten()
        if len(hashes):
            parts.append(np.frombuffer(hashes.buffers()[1], dtype="S32")[hashes.offset :][: len(hashes)])
    return np.concatenate(parts)


def _components(size: int, owners: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """int64 (size,): the first sample of the component of each, samples being linked by pictures they share."""
    parent = np.arange(size, dtype=np.int64)
    first_owner = np.full(int(pictures.max()) + 1 if len(pictures) else 0, size, dtype=np.int64)
    np.minimum.at(first_owner, pictures, owners)
    links = np.unique(np.stack([owners, first_owner[pictures]], axis=1), axis=0)
    for sample, other in links[links[:, 0] != links[:, 1]].tolist():
        a, b = _root(parent, sample), _root(parent, other)
        parent[max(a, b)] = min(a, b)
    while not np.array_equal(parent, parent[parent]):
        parent = parent[parent]
    return parent


def _root(parent: np.ndarray, i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = int(parent[i])
    return i
