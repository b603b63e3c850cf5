"""Shards: samples in standard webdataset tars, read back by offset.

A shard set is a folder of tars with `samples.parquet` (one row a sample: where it lies and all that is needed to plan
with it) and `index.json` (the tars with sizes and hashes). Any webdataset reader takes the tars alone; we read one
sample by one `pread`, so every order is possible, a cut file is refused instead of read to where it ends, and nothing
is ever unpacked to disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from mmit.data.cache import cache_folder
from mmit.data.images import decode
from mmit.data.remote import LIMIT, RemoteTars, fetch_index, is_remote, title
from mmit.data.sample import Sample, SampleError, from_json
from mmit.data.shard_index import (
    INDEX,
    REMEDY,
    SAMPLES,
    SCHEMA,
    Fault,
    Index,
    arrow_file,
    file_sha256,
    map_samples,
    read_index,
    same_rows,
    size_faults,
)
from mmit.data.shard_writer import BLOCK, ShardWriter, checked, row_of

OPEN_TARS = 64
REQUEST = 10**6
"""Bytes that come in the time that it takes to ask for some: less of a tar than this is not worth asking for alone."""


def write_shards(
    samples: Iterable[Sample], folder: Path, *, samples_per_shard: int = 1000, overwrite: bool = False
) -> ShardSet:
    """Write a whole shard set and open it."""
    with ShardWriter(folder, samples_per_shard=samples_per_shard, overwrite=overwrite) as writer:
        for sample in samples:
            writer.write(sample)
    return ShardSet(folder)


class ShardSet:
    """A shard set opened for reading: everything a plan needs without touching a tar, and samples by number.

    Opening compares the size of every tar with the index and raises one `SampleError` if the set is not whole; tars
    that lie elsewhere are compared, hash and all, when they are fetched.
    May be pickled, forked and used by threads.
    """

    def __init__(self, folder: Path | str, *, cache: Path | None = None, limit: int = LIMIT) -> None:
        """`folder` may be any address of fsspec; then its tars come through `cache`, at most `limit` bytes of them."""
        self._remote: RemoteTars | None = None
        if is_remote(folder):
            address, cache = str(folder).rstrip("/"), cache_folder(str(cache) if cache is not None else None)
            self.folder, self.name = fetch_index(address, cache), title(address)
            index = read_index(self.folder)
            self._remote = RemoteTars(address, index.entries, cache, limit)
        else:
            self.folder, self.name = Path(folder), Path(folder).name
            index = read_index(self.folder)
            for fault in size_faults(self.folder, index):
                raise SampleError(str(fault))
        self.fingerprint = index.fingerprint
        self.shard_names = [entry.name for entry in index.entries]
        self.shard_sizes = [entry.samples for entry in index.entries]
        self.shard_bytes = [entry.bytes for entry in index.entries]
        self.shard_sha256 = [
            # What is read from somebody else's tar depends on how it was indexed.
            entry.sha256
            if index.texts is None
            else hashlib.sha256(f"{entry.sha256} {index.texts}".encode()).hexdigest()
            for entry in index.entries
        ]
        self._in_place = index.in_place
        self._starts = np.cumsum([0, *self.shard_sizes])
        self._arrow = arrow_file(self.folder, index)
        self._table = map_samples(self._arrow)
        self._tars: OrderedDict[int, _OpenTar] = OrderedDict()
        self._alone: frozenset[int] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_table", "_tars")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._table = map_samples(self._arrow)
        self._tars = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def shard_of(self, i: int) -> tuple[int, int]:
        """The number of the shard that holds sample `i`, and its place in it."""
        self._check_number(i)
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return shard, i - int(self._starts[shard])

    def for_few(self, indices: Iterable[int]) -> ShardSet:
        """The same set for whoever reads these samples alone: a tar that would have to be fetched, and of which they
        are little, does not come for them. They are fetched and kept one by one."""
        few = copy(self)
        if self._remote is not None:
            needed: Counter[int] = Counter()
            for i in set(indices):
                needed[self.shard_of(i)[0]] += self._value("bytes", i) + REQUEST
            entries = self._remote.entries
            few._alone = frozenset(shard for shard, size in needed.items() if size < entries[shard].bytes)
        return few

    @property
    def is_remote(self) -> bool:
        """Whether reading may first have to fetch."""
        return self._remote is not None

    def key(self, i: int) -> str:
        return self._value("key", i)

    def source(self, i: int) -> str:
        return self._value("source", i)

    def where(self, i: int) -> str:
        """How messages name sample `i`: FOLDER/SHARD:KEY."""
        return f"{self.name}/{self.shard_names[self.shard_of(i)[0]]}:{self.key(i)}"

    def image_sizes(self, i: int) -> list[tuple[int, int]]:
        """Width and height of each picture of sample `i`, as shown."""
        return list(zip(self._value("widths", i), self._value("heights", i), strict=True))

    def picture_hashes(self, i: int) -> list[str]:
        """The sha256 of each picture of sample `i`."""
        return [value.hex() for value in self._value("sha256", i)]

    def characters(self, i: int) -> int:
        """Characters in all texts of sample `i`."""
        return self._value("characters", i)

    def meta(self, i: int) -> dict[str, Any]:
        return json.loads(self._value("meta", i))

    def read(self, i: int, *, images: bool = True) -> Sample:
        """Sample `i`, with `images=False` without reading a byte of its pictures."""
        shard, _ = self.shard_of(i)
        where = self.where(i)
        if self._in_place:
            return self._read_in_place(i, shard, where, images=images)
        json_bytes = self._value("json_bytes", i)
        alone = shard in self._alone  # then it comes whole, as it is kept
        size = self._value("bytes", i) if images or alone else BLOCK + json_bytes
        offset = self._value("offset", i)
        raw = self._bytes(shard, size, offset, partial(self._check_row, i, where))
        if len(raw) < size:
            raise SampleError(f"{where}: the tar ends at byte {offset + len(raw)} inside this sample; {REMEDY}")
        return _sample(raw, self.key(i), json_bytes, where, images=images)

    def keys(self) -> list[str]:
        """The key of every sample, in order."""
        return self._table.column("key").to_pylist()

    def pictures(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every picture in turn: the sample that shows it (int64), and the 32 bytes of its sha256."""
        counts = _lengths(self._table.column("sha256"))
        owners = np.repeat(np.arange(len(self), dtype=np.int64), counts)
        return owners, _flat_hashes(self._table.column("sha256"))

    def picture_groups(self) -> np.ndarray:
        """int64 (len,): samples that share a picture, directly or through others, have the same number.

        The number is that of the group's first sample; a sample without pictures is a group of its own.
        """
        owners, hashes = self.pictures()
        return components(len(self), owners, np.unique(hashes, return_inverse=True)[1])

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
        if self._remote is not None:
            raise SampleError(
                f"{self._remote.address}: only files of this machine are verified; copy the set here first"
            )
        return verify(self.folder)

    def _check_number(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in {self.folder}")

    def _value(self, column: str, i: int) -> Any:
        self._check_number(i)
        return self._table.column(column)[i].as_py()

    def _read_in_place(self, i: int, shard: int, where: str, *, images: bool) -> Sample:
        """A sample of somebody else's tar: its text from the index, its pictures from where they lie."""
        sample = from_json(self._value("json", i), where)
        if not images:
            return sample
        pictures = []
        places = zip(sample.images, self._value("picture_offsets", i), self._value("picture_bytes", i), strict=True)
        for number, (picture, offset, size) in enumerate(places):
            check = partial(_check_picture, f"{where}: picture {number}", picture.sha256)
            content = self._bytes(shard, size, offset, check)
            check(content)
            pictures.append(replace(picture, data=content))
        return replace(sample, images=tuple(pictures))

    def _check_row(self, i: int, where: str, raw: bytes) -> None:
        """`SampleError` if these are not the bytes of sample `i`, as far as the index can tell."""
        record = {name: self._value(name, i) for name in SCHEMA.names}
        if _differs(_sample(raw, record["key"], record["json_bytes"], where, images=True), record):
            raise SampleError(f"{where}: is not as {SAMPLES} says; {REMEDY}")

    def _bytes(self, shard: int, size: int, offset: int, check: Callable[[bytes], None]) -> bytes:
        """`check` is for bytes that come from elsewhere without the tar whose hash would be known."""
        if self._remote is not None and shard in self._alone:
            return self._remote.read_alone(shard, size, offset, check)
        if self._remote is not None:
            return self._remote.read(shard, size, offset)
        tar = self._tar(shard)  # held by name while it is read: another thread may put it out of the list
        return os.pread(tar.descriptor, size, offset)

    def _tar(self, shard: int) -> _OpenTar:
        tar = self._tars.get(shard)
        if tar is None:
            path = self.folder / self.shard_names[shard]
            try:
                tar = _OpenTar(os.open(path, os.O_RDONLY))
            except OSError as error:
                raise SampleError(f"{path}: cannot be opened ({error.strerror}); {REMEDY}") from error
            self._tars[shard] = tar
            if len(self._tars) > OPEN_TARS:
                self._tars.popitem(last=False)
        return tar


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
        index = read_index(folder)
        table = map_samples(arrow_file(folder, index))
    except SampleError as error:
        where, _, text = str(error).partition(": ")
        yield Fault(where, text)
        return
    row = 0
    faults = list(_table_faults(folder, index, table))
    yield from faults
    if faults:
        return
    if index.in_place:
        yield from _in_place_faults(folder, index)
        return
    for number, entry in enumerate(index.entries):
        path = folder / entry.name
        rows = table.slice(row, entry.samples)
        row += entry.samples
        faults = list(size_faults(folder, index, only=number))
        yield from faults
        if not path.is_file():
            continue
        if not faults and file_sha256(path) != entry.sha256:
            yield Fault(str(path), f"its sha256 is not the one in {INDEX}; {REMEDY}")
        with path.open("rb") as tar:
            yield from _sample_faults(tar, f"{folder.name}/{entry.name}", rows, number)
    known = {entry.name for entry in index.entries}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            yield Fault(str(path), f"is not listed in {INDEX}, so we never read it but other tools do; remove it")


def _table_faults(folder: Path, index: Index, table: pa.Table) -> Iterator[Fault]:
    """What is wrong with the table of samples itself, which a mapped copy beside it would hide."""
    path = folder / SAMPLES
    if not path.is_file():
        yield Fault(str(path), "is missing; copy it here or convert again")
    elif file_sha256(path) != index.samples_sha256:
        yield Fault(str(path), f"its sha256 is not the one in {INDEX}; copy both again or convert again")
    elif not same_rows(path, table):
        yield Fault(str(arrow_file(folder, index)), f"is not what {SAMPLES} says; remove it, it will be made anew")


def _in_place_faults(folder: Path, index: Index) -> Iterator[Fault]:
    faults = list(size_faults(folder, index))
    yield from faults
    if faults:
        return
    for entry in index.entries:
        if file_sha256(folder / entry.name) != entry.sha256:
            yield Fault(str(folder / entry.name), f"its sha256 is not the one in {INDEX}; {REMEDY}")
    samples = ShardSet(folder)
    for i in range(len(samples)):
        where = samples.where(i)
        try:
            for number, picture in enumerate(samples.read(i).images):
                here = f"{where}: picture {number}"
                decode(checked(picture, here), here, window=picture.window)
        except SampleError as error:
            yield Fault(where, str(error).removeprefix(f"{where}: "))


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
            yield Fault(where, f"the tar ends inside this sample; {REMEDY}")
            return
        try:
            sample = _sample(raw, record["key"], record["json_bytes"], where, images=True)
        except SampleError as error:
            yield Fault(where, str(error).removeprefix(f"{where}: "))
            continue
        if _differs(sample, record):
            yield Fault(where, f"{SAMPLES} and the sample itself differ; convert again")
        for number, picture in enumerate(sample.images):
            here = f"{where}: picture {number}"
            try:
                decode(checked(picture, here), here, window=picture.window)
            except SampleError as error:
                yield Fault(here, str(error).removeprefix(f"{here}: "))
    tar.seek(position)
    rest = tar.read()
    if rest.strip(b"\0") or len(rest) < 2 * BLOCK:
        yield Fault(name, f"does not end after its last sample as a tar must; {REMEDY}")


def _check_picture(where: str, sha256: str, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SampleError(f"{where} is not the one that was indexed (sha256 differs); {REMEDY}")


def _differs(sample: Sample, record: Mapping[str, Any]) -> bool:
    """Whether the index says otherwise of a sample than it is."""
    found = asdict(row_of(sample, record["offset"], record["bytes"], record["json_bytes"]))
    return any(record[name] != (list(value) if isinstance(value, tuple) else value) for name, value in found.items())


def _sample(raw: bytes, key: str, json_bytes: int, where: str, *, images: bool) -> Sample:
    """The sample in the bytes of its members, each of which must carry the name that the index leads to expect."""
    text, position = _take(raw, 0, f"{key}.json", where)
    if len(text) != json_bytes:
        raise SampleError(f"{where}: its JSON has {len(text)} bytes, the index says {json_bytes}; {REMEDY}")
    try:
        sample = from_json(text.decode(), where)
    except (UnicodeDecodeError, RecursionError) as error:
        raise SampleError(f"{where}: its JSON cannot be read ({type(error).__name__}); {REMEDY}") from error
    if sample.key != key:
        raise SampleError(f"{where}: its JSON has the key {sample.key!r}; {REMEDY}")
    if not images:
        return sample
    pictures = []
    for number, picture in enumerate(sample.images):
        content, position = _take(raw, position, f"{key}.{number}.{picture.ending}", where)
        # 30 us of a picture's 2 ms, so that no other pixels are ever learned under this name.
        if hashlib.sha256(content).hexdigest() != picture.sha256:
            raise SampleError(f"{where}: picture {number} is not the one that was written (sha256 differs); {REMEDY}")
        pictures.append(replace(picture, data=content))
    if position != len(raw):
        raise SampleError(f"{where}: more members follow than its JSON names; {REMEDY}")
    return replace(sample, images=tuple(pictures))


def _take(raw: bytes, position: int, name: str, where: str) -> tuple[bytes, int]:
    """The content of the member that begins at `position`, and where the next one begins."""
    try:
        header = tarfile.TarInfo.frombuf(raw[position : position + BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise SampleError(f"{where}: no tar header where {name} should begin; {REMEDY}") from None
    start = position + BLOCK
    if header.name != name or not header.isreg() or start + header.size > len(raw):
        raise SampleError(f"{where}: found the member {header.name!r} where {name} should be; {REMEDY}")
    return raw[start : start + header.size], start + header.size + -header.size % BLOCK


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


def components(size: int, owners: np.ndarray, pictures: np.ndarray) -> np.ndarray:
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
