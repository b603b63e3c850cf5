"""Reading other people's files row by row in constant memory, and what a converter says about a row it refuses.

A format is a function that yields, for every row in the order of the file, a `Sample` or a `Rejected`; nothing else
may happen to a row, so rows in = samples out + rejected.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mmit.config import ConfigError
from mmit.data.sample import Sample, SampleError

CHUNK = 1 << 20
csv.field_size_limit(1 << 27)


@dataclass(frozen=True)
class Row:
    """One record of a file. `number` is the line of a line-wise file (from 1), else the position (from 0)."""

    file: str
    number: int
    where: str
    """`notes.jsonl:13 (id 42)` or `notes.json[12] (id 42)`: the beginning of every error about this row."""
    record: Any

    @property
    def name(self) -> str:
        """What the file itself calls the row, or nothing."""
        return name_of(self.record)


@dataclass(frozen=True)
class Rejected:
    """A row that became no sample, and why."""

    file: str
    row: int
    key: str
    reason: str


def name_of(record: Any) -> str:
    if not isinstance(record, dict):
        return ""
    for key in ("id", "question_id", "image_id", "key"):
        if isinstance(record.get(key), str | int):
            return str(record[key])
    return ""


def row_at(file: Path, number: int, record: Any, *, lines: bool) -> Row:
    place = f"{file.name}:{number}" if lines else f"{file.name}[{number}]"
    name = name_of(record)
    return Row(file.name, number, f"{place} (id {name})" if name else place, record)


@dataclass(frozen=True)
class Placed(Sample):
    """A sample that knows the row it came from, so that a later fault can name it."""

    file: str = ""
    row: int = 0
    name: str = ""
    where: str = ""


def each(rows: Iterable[Row | Rejected], sample_of: Callable[[Row], Sample]) -> Iterator[Sample | Rejected]:
    """A sample for every row; a row of which `sample_of` raises `SampleError` is rejected with that reason."""
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        try:
            made = sample_of(row)
        except SampleError as error:
            yield Rejected(row.file, row.number, row.name, str(error))
            continue
        yield Placed(
            made.key, made.source, made.messages, made.images, made.meta, row.file, row.number, row.name, row.where
        )


def records(path: Path) -> Iterator[Row | Rejected]:
    """The records of a JSON, JSONL, CSV, TSV or parquet file, or of a folder of one kind of these."""
    names = {path.name} if path.is_file() else {file.name for file in path.rglob("*")}
    if any(re.search(r"\.(csv|tsv|parquet)(\.gz)?$", name) for name in names):
        return table_rows(path)
    return json_rows(path)


def json_rows(path: Path) -> Iterator[Row | Rejected]:
    """The records of a JSON list, a JSONL file or a folder of either, `.gz` or not, never all in memory."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if re.search(r"\.(json|jsonl|ndjson)(\.gz)?$", file.name)]
        if not files:
            raise ConfigError(f"{path}: the folder holds no .json or .jsonl file; name the file itself")
        for file in files:
            yield from json_rows(file)
        return
    match json_shape(path):
        case "lines":
            yield from _lines(path)
        case "list":
            yield from _list(path)
        case "object":
            yield row_at(path, 0, json_document(path), lines=False)


def json_shape(path: Path) -> str:
    """`lines` (JSONL), `list` or `object`, told from the name and the first bytes."""
    with opened(path) as stream:
        head = stream.read(CHUNK)
    text = head.lstrip(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise ConfigError(f"{path}: the file is empty; name a file that holds at least one row")
    if re.search(r"\.(jsonl|ndjson)(\.gz)?$", path.name):
        return "lines"
    if text.startswith(b"["):
        return "list"
    if not text.startswith(b"{"):
        raise ConfigError(f"{path}: this is not JSON (it begins with {text[:20]!r}); name a .json or .jsonl file")
    first, newline, rest = text.partition(b"\n")
    if newline and rest.strip():
        try:
            json.loads(first)
        except ValueError:
            return "object"
        return "lines"
    return "object"


def json_document(path: Path) -> Any:
    """A whole JSON file, for the formats that are one object."""
    with opened(path) as stream:
        try:
            return json.load(stream)
        except ValueError as error:
            raise SampleError(f"{path}: not valid JSON ({error}); the file may be cut, fetch it again") from None


def opened(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked when it is named `.gz`."""
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path (relative ones start in {Path.cwd()})") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: this is a folder; name the file inside it") from None
    except PermissionError:
        raise ConfigError(f"{path}: not allowed to read it; check its permissions") from None


def _lines(path: Path) -> Iterator[Row | Rejected]:
    with opened(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                yield Rejected(path.name, number, "", f"{path.name}:{number}: not a line of JSON ({error})")
                continue
            yield row_at(path, number, record, lines=True)


def member_rows(path: Path) -> Iterator[Row]:
    """The members of one JSON object {name: record, ...}, read piece by piece; a record gets its name as `key`."""
    for row in _list(path, members=True):
        name, record = row.record
        record = {"key": name, **record} if isinstance(record, dict) else record
        yield Row(row.file, row.number, f"{path.name}[{name!r}]", record)


def _list(path: Path, *, members: bool = False) -> Iterator[Row]:
    """The elements of one JSON list, or the (name, value) members of one object, read piece by piece."""
    opening, closing = "{}" if members else "[]"
    decoder = json.JSONDecoder()
    with opened(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        buffer, position, number, ended = "", 0, -1, False

        def broken(reason: str) -> SampleError:
            return SampleError(f"{path.name}[{max(number, 0)}]: {reason}; the file may be cut or hand-edited here")

        def more() -> None:
            nonlocal buffer, position, ended
            try:
                piece = text.read(max(CHUNK, len(buffer) - position))
            except UnicodeDecodeError as error:
                raise broken(f"not UTF-8 ({error.reason})") from None
            ended = not piece
            buffer, position = buffer[position:] + piece, 0

        def skip_space() -> str:
            nonlocal position
            while True:
                while position < len(buffer) and buffer[position] in " \t\r\n":
                    position += 1
                if position < len(buffer) or ended:
                    return buffer[position : position + 1]
                more()

        def value() -> Any:
            nonlocal position
            skip_space()
            while True:
                try:
                    found, end = decoder.raw_decode(buffer, position)
                    if end < len(buffer) or ended:
                        position = end
                        return found
                except (ValueError, RecursionError) as error:
                    if ended or isinstance(error, RecursionError):
                        raise broken(f"not valid JSON ({error})") from None
                more()

        if skip_space() != opening:
            raise broken(f"this is not JSON that begins with {opening}")
        position += 1
        if skip_space() == closing:
            return
        while True:
            number += 1
            record = value()
            if members:
                if skip_space() != ":":
                    raise broken("expected ':' after a name")
                position += 1
                record = (record, value())
            yield row_at(path, number, record, lines=False)
            following = skip_space()
            if following == closing:
                return
            if following != ",":
                raise broken(f"expected ',' or {closing!r} after the row, found {following!r}")
            position += 1


def table_rows(path: Path, *, delimiter: str | None = None) -> Iterator[Row | Rejected]:
    """The rows of a CSV or TSV file with a header line, or of a parquet file (or a folder of them), as dicts."""
    if path.is_dir() or path.suffix == ".parquet":
        yield from parquet_rows(path)
        return
    separator = delimiter or ("\t" if ".tsv" in path.suffixes else ",")
    with opened(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=separator, strict=True)
        number = -1
        try:
            for number, record in enumerate(reader):
                if None in record or None in record.values():
                    reason = f"{path.name}[{number}]: not the {len(reader.fieldnames or ())} columns of the header"
                    yield Rejected(path.name, number, "", f"{reason}; quote fields with {separator!r}")
                    continue
                yield row_at(path, number, record, lines=False)
        except (csv.Error, UnicodeDecodeError) as error:
            raise SampleError(f"{path.name}[{number + 1}]: not readable as CSV ({error}); check its quotes") from None


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of one parquet file, or of all those of a folder in the order of their names, a batch at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path}: the folder holds no .parquet file")
    for file in files:
        try:
            with pq.ParquetFile(file) as table:
                number = 0
                for batch in table.iter_batches(batch_size=64):
                    for record in batch.to_pylist():
                        yield row_at(file, number, record, lines=False)
                        number += 1
        except FileNotFoundError:
            raise ConfigError(f"{file}: no such file; check the path") from None
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise SampleError(f"{file}: not readable as parquet ({reason}); fetch it again") from None


def field(row: Row, *names: str) -> Any:
    """The first of these fields that the row has, or `SampleError` that lists what it has instead."""
    record = fields(row)
    for name in names:
        if record.get(name) is not None:
            return record[name]
    wanted = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    raise SampleError(f"{row.where}: no field {wanted}; the row has {', '.join(map(str, record)) or 'no fields'}")


def text_field(row: Row, *names: str) -> str:
    value = field(row, *names)
    if not isinstance(value, str):
        raise SampleError(f"{row.where}: {names[0]} is {type(value).__name__}, not text: {str(value)[:60]!r}")
    return value


def fields(row: Row) -> Mapping[str, Any]:
    if not isinstance(row.record, dict):
        raise SampleError(f"{row.where}: the row is a {type(row.record).__name__}, not an object with named fields")
    return row.record
