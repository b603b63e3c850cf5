"""The index of a shard set: which tars there are, and one row a sample to plan with.

`index.json` is small and written last; `samples.parquet` holds a row a sample and is mapped into memory through an
Arrow file, so a set of any size opens at once and its rows are shared by all processes of a machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from mmit.config import ConfigError
from mmit.data.files import named, whole
from mmit.data.sample import SampleError

FORMAT = 1
INDEX = "index.json"
SAMPLES = "samples.parquet"
UNFINISHED = "UNFINISHED"
"""A note that stands in the folder while it is written, so that what a killed writer left is known to be ours."""
REMEDY = "the tar was changed or cut after its index was written: copy it again, or convert again"

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


IN_PLACE = pa.schema(
    [
        *SCHEMA,
        ("json", pa.string()),
        ("picture_offsets", pa.list_(pa.int64())),
        ("picture_bytes", pa.list_(pa.int64())),
    ]
)
"""Of tars that somebody else wrote: the sample's JSON stands in the index, its pictures stay where they lie."""


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
class InPlaceRow(SampleRow):
    """A sample of a tar that somebody else wrote; `offset` and `bytes` span its members."""

    json: str
    picture_offsets: tuple[int, ...]
    picture_bytes: tuple[int, ...]


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


@dataclass(frozen=True)
class Index:
    """What `index.json` says."""

    entries: tuple[ShardEntry, ...]
    fingerprint: str
    samples_bytes: int
    samples_sha256: str
    texts: str | None = None
    """sha256 of the JSON of all samples, if the tars are somebody else's, indexed where they lie."""

    @property
    def in_place(self) -> bool:
        return self.texts is not None

    @property
    def schema(self) -> pa.Schema:
        return IN_PLACE if self.in_place else SCHEMA


def read_index(folder: Path) -> Index:
    """The index of a folder, checked to be ours, of a known format and in itself consistent."""
    path = folder / INDEX
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name a folder of shards (relative ones start in {Path.cwd()})")
    if not path.is_file():
        hint = (
            "its writing was not finished: convert again"
            if (folder / UNFINISHED).exists()
            else "this is not a folder of shards: name the one that `mmit-data convert` wrote"
        )
        raise SampleError(f"{folder}: has no {INDEX}; {hint}")
    return index_of(path.read_bytes(), str(path))


def index_of(raw: bytes, path: str) -> Index:
    """The index in the bytes of an `index.json`; `path` is what messages call it."""
    try:
        record = json.loads(raw.decode("utf-8"))
        if record["format"] != FORMAT:
            raise SampleError(
                f"{path}: format {record['format']!r}, this mmit reads {FORMAT}; upgrade mmit or convert again"
            )
        entries = tuple(
            ShardEntry(item["name"], item["bytes"], item["sha256"], item["samples"]) for item in record["shards"]
        )
        parquet = record["samples.parquet"]
        index = Index(entries, record["fingerprint"], parquet["bytes"], parquet["sha256"], record.get("in_place"))
        for entry in entries:
            if not (isinstance(entry.name, str) and isinstance(entry.bytes, int) and isinstance(entry.samples, int)):
                raise TypeError(f"shard {entry.name!r}")
    except (KeyError, TypeError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise SampleError(f"{path}: damaged ({type(error).__name__}: {error}); convert again") from error
    for entry in entries:
        if Path(entry.name).name != entry.name:
            raise SampleError(f"{path}: lists {entry.name!r}, which is outside of its folder; convert again")
    for value in (index.samples_sha256, *(entry.sha256 for entry in entries)):
        if not (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)):
            raise SampleError(f"{path}: damaged ({value!r} is no sha256); convert again")
    if _fingerprint(entries, index.texts) != index.fingerprint:
        raise SampleError(f"{path}: its fingerprint does not belong to its list of shards; convert again")
    return index


def size_faults(folder: Path, index: Index, *, only: int | None = None) -> Iterator[Fault]:
    """Tars that are missing or not as long as they were written; `only` looks at the one of that number."""
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
            yield Fault(str(path), f"has {size:,} bytes, {INDEX} says {entry.bytes:,}; {REMEDY}")


def arrow_file(folder: Path, index: Index) -> Path:
    """`samples.parquet` as an Arrow file that can be memory-mapped, made once and named by the hash of its content."""
    name = f"samples-{index.samples_sha256[:32]}.arrow"
    cache = Path(os.environ.get("MMIT_CACHE") or Path.home() / ".cache" / "mmit") / "samples"
    for candidate in (folder / name, cache / name):
        if candidate.is_file() and _is_whole(candidate, index):
            return candidate
    parquet = folder / SAMPLES
    if not parquet.is_file():
        raise SampleError(f"{parquet}: is missing; copy it here or convert again")
    if parquet.stat().st_size != index.samples_bytes or file_sha256(parquet) != index.samples_sha256:
        raise SampleError(f"{parquet}: is not the one that {INDEX} was written with; copy both again or convert again")
    if os.access(folder, os.W_OK):
        target = folder / name
    else:
        cache.mkdir(parents=True, exist_ok=True)
        target = cache / name
    with (
        whole(target) as temporary,
        pq.ParquetFile(parquet) as source,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, index.schema) as writer,
    ):
        for batch in source.iter_batches(batch_size=65536):
            writer.write_batch(batch.cast(index.schema))
    return target


def _is_whole(path: Path, index: Index) -> bool:
    try:
        return map_samples(path).num_rows == sum(entry.samples for entry in index.entries)
    except (pa.ArrowInvalid, OSError):
        return False


def map_samples(path: Path) -> pa.Table:
    """The rows of an Arrow file, mapped: nothing is read before it is asked for."""
    return pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()


def same_rows(parquet: Path, table: pa.Table) -> bool:
    """Whether `samples.parquet` holds exactly these rows; a part of them at a time."""
    row = 0
    with pq.ParquetFile(parquet) as source:
        for batch in source.iter_batches(batch_size=65536):
            if not pa.Table.from_batches([batch.cast(table.schema)]).equals(table.slice(row, batch.num_rows)):
                return False
            row += batch.num_rows
    return row == table.num_rows


class IndexWriter:
    """`samples.parquet` growing by one row group a shard, then `index.json`."""

    def __init__(self, folder: Path, *, in_place: bool = False) -> None:
        self.folder = folder
        self.in_place = in_place
        self.schema = IN_PLACE if in_place else SCHEMA
        self.temporary = folder / f"{SAMPLES}.{os.getpid()}.tmp"
        self.file: IO[bytes] = self.temporary.open("wb")
        self.parquet = pq.ParquetWriter(self.file, self.schema, compression="zstd")
        self.entries: list[ShardEntry] = []
        self.texts = hashlib.sha256()

    def __enter__(self) -> IndexWriter:
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
                for name in self.schema.names
            }
            with named(self.folder / SAMPLES):
                self.parquet.write_table(pa.table(columns, schema=self.schema))
        for row in shard.rows if self.in_place else ():
            assert isinstance(row, InPlaceRow)
            self.texts.update(row.json.encode() + b"\n")
        self.entries.append(shard.entry)

    def finish(self) -> None:
        with named(self.folder / SAMPLES):
            self.parquet.close()
            seal(self.file, self.temporary, self.folder / SAMPLES)
        texts = self.texts.hexdigest() if self.in_place else None
        record = {
            "format": FORMAT,
            **({} if texts is None else {"in_place": texts}),
            "samples": sum(entry.samples for entry in self.entries),
            "fingerprint": _fingerprint(self.entries, texts),
            "samples.parquet": {
                "bytes": (self.folder / SAMPLES).stat().st_size,
                "sha256": file_sha256(self.folder / SAMPLES),
            },
            "shards": [
                {"name": entry.name, "bytes": entry.bytes, "sha256": entry.sha256, "samples": entry.samples}
                for entry in self.entries
            ],
        }
        with whole(self.folder / INDEX) as temporary, temporary.open("wb") as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self.folder)

    def abandon(self) -> None:
        for closing in (self.parquet.close, self.file.close):
            with suppress(OSError):  # on a full disk closing fails too, and what is there must go all the more
                closing()
        self.temporary.unlink(missing_ok=True)


def seal(file: IO[bytes], temporary: Path, path: Path) -> None:
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


def _fingerprint(entries: Sequence[ShardEntry], texts: str | None) -> str:
    named = [FORMAT, *([] if texts is None else [texts]), *([e.name, e.sha256] for e in entries)]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
