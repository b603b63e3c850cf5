"""Reading other people's files row by row in constant memory, and what a converter says about a row it refuses.

A format is a function that yields, for every row in the order of the file, a `Sample` or a `Rejected`; nothing else
may happen to a row, so rows in = samples out + rejected.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from data_tools.cells import cell_of, placed
from mmit.config import ConfigError
from mmit.data.sample import Sample, SampleError

CHUNK = 1 << 20
LONGEST_ROW = 1 << 26
"""Of a line that is looked at to tell JSONL in a file named .json."""
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
        value = record.get(key)
        if isinstance(value, (str, int)):  # a union would take longer than all the rest
            return str(value)
    return ""


def row_at(file: Path, number: int, record: Any, *, lines: bool) -> Row:
    called = file.name
    place = f"{called}:{number}" if lines else f"{called}[{number}]"
    name = name_of(record)
    return Row(called, number, f"{place} (id {name})" if name else place, record)


@dataclass(frozen=True)
class Placed(Sample):
    """A sample that knows the row it came from, so that a later fault can name it."""

    file: str = ""
    row: int = 0
    name: str = ""
    where: str = ""


def each(rows: Iterable[Row | Rejected], sample_of: Callable[[Row], Sample]) -> Iterator[Sample | Rejected]:
    """A sample for every row; a row of which `sample_of` raises `SampleError` is rejected with that reason.

    So is one in which something is of another type than the format has it: files of strangers hold a number where a
    list belongs, and one such row must not cost the others.
    """
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        try:
            made = sample_of(row)
        except SampleError as error:
            yield Rejected(row.file, row.number, row.name, str(error))
            continue
        except ConfigError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            found = f"{type(error).__name__}: {str(error)[:100]}"
            reason = f"{row.where}: a field is not what this format has there ({found})"
            yield Rejected(row.file, row.number, row.name, reason)
            continue
        yield Placed(
            made.key, made.source, made.messages, made.images, made.meta, row.file, row.number, row.name, row.where
        )


def records(path: Path) -> Iterator[Row | Rejected]:
    """The records of a JSON, JSONL, CSV, TSV or parquet file, or of all files of one of these kinds in a folder."""
    if path.is_dir():
        yield from _folder_rows(path)
    elif re.search(r"\.(csv|tsv|parquet)(\.gz)?$", path.name):
        yield from table_rows(path)
    else:
        yield from json_rows(path)


KINDS = {
    "JSON": re.compile(r"\.(json|jsonl|ndjson)(\.gz)?$"),
    "CSV": re.compile(r"\.(csv|tsv)(\.gz)?$"),
    "parquet": re.compile(r"\.parquet$"),
}


def _folder_rows(folder: Path) -> Iterator[Row | Rejected]:
    names = [file for file in files_below(folder) if file.is_file()]
    found = {kind: [file for file in names if ending.search(file.name)] for kind, ending in KINDS.items()}
    held = [kind for kind, files in found.items() if files]
    if len(held) != 1:
        seen = f"holds files of several kinds ({', '.join(held)})" if held else "holds no JSON, CSV or parquet file"
        raise ConfigError(f"{folder}: the folder {seen}; name the file, or the folder of those that are the rows")
    for file in found[held[0]]:
        below = file.parent.relative_to(folder).as_posix()
        for row in records(file):
            yield row if below == "." else _named_below(row, below)


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and of its folders, in the order of their names; hidden ones are no data: editors and
    systems leave them (`.ipynb_checkpoints/rows-checkpoint.json`, `._rows.json`)."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _named_below(row: Row | Rejected, folder: str) -> Row | Rejected:
    """Files of one name in several folders are told apart."""
    if isinstance(row, Rejected):
        return replace(row, file=f"{folder}/{row.file}", reason=f"{folder}/{row.reason}")
    return replace(row, file=f"{folder}/{row.file}", where=f"{folder}/{row.where}")


def json_rows(path: Path) -> Iterator[Row | Rejected]:
    """The records of a JSON list or a JSONL file, `.gz` or not, never all in memory."""
    match json_shape(path):
        case "lines":
            yield from _lines(path)
        case "list":
            yield from _list(path)
        case "object":
            yield row_at(path, 0, json_document(path), lines=False)


def json_shape(path: Path) -> str:
    """`lines` (JSONL), `list` or `object`, told from the name and the first line."""
    with opened(path) as stream:
        head = stream.readline(CHUNK)
        while head and not head.lstrip(b"\xef\xbb\xbf").strip():
            head = stream.readline(CHUNK)
        if head.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") and not head.endswith(b"\n"):
            head += stream.readline(LONGEST_ROW)
        more = any(line.strip() for line in iter(lambda: stream.readline(CHUNK), b""))
    text = head.lstrip(b"\xef\xbb\xbf").strip()
    if not text:
        raise ConfigError(f"{path}: the file is empty; name a file that holds at least one row")
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}: this is UTF-16 text; save it as UTF-8")
    if re.search(r"\.(jsonl|ndjson)(\.gz)?$", path.name):
        return "lines"
    if text.startswith(b"["):
        return "list"
    if not text.startswith(b"{"):
        raise ConfigError(f"{path}: this is not JSON (it begins with {text[:20]!r}); name a .json or .jsonl file")
    if more:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return "object"
        return "lines"
    return "object"


def json_document(path: Path) -> Any:
    """A whole JSON file, for the formats that are one object."""
    with opened(path) as stream:
        try:
            return json.load(stream)
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{path}: not valid JSON ({error}); the file may be cut, fetch it again") from None


def listed(path: Path, document: Any, name: str) -> list[Mapping[str, Any]]:
    """The list of objects that a whole JSON file holds under a name."""
    found = document.get(name) if isinstance(document, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise SampleError(f"{path}: it has no list of objects called {name}; is it another file of the set?")
    return found


def text_beside(file: Path, root: Path, where: str) -> str:
    """The text of a file below the folder; refuses what a link leads to outside of it."""
    if not file.resolve().is_relative_to(root):
        raise SampleError(f"{where}: {file.name} is a link that leads out of the folder; copy the file into it")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SampleError(f"{where}: {file.name} is not UTF-8; save it again as UTF-8") from None
    except FileNotFoundError:
        raise SampleError(f"{where}: there is no {file.name} beside it") from None
    except OSError as error:
        raise SampleError(f"{where}: cannot read {file.name} ({error.strerror})") from None


def by_number(items: list[Mapping[str, Any]], key: str) -> dict[str | int, Mapping[str, Any]]:
    """The objects by what they call themselves under `key`; those without such a name are left to be missed."""
    return {item[key]: item for item in items if isinstance(item.get(key), str | int)}


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked when it is named `.gz`."""
    if path.suffix in (".zst", ".bz2", ".xz", ".zip", ".7z"):
        raise ConfigError(f"{path}: files packed as {path.suffix} are not read (only .gz is); unpack it first")
    try:
        stream: Any = (gzip.open if path.suffix == ".gz" else open)(path, "rb")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path (relative ones start in {Path.cwd()})") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: this is a folder; name the file inside it") from None
    except PermissionError:
        raise ConfigError(f"{path}: not allowed to read it; check its permissions") from None
    with stream:
        try:
            yield stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise SampleError(f"{path}: the gzip file is cut or damaged ({error}); fetch it again") from None


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

        def ends() -> None:
            """Lists written one after the other would else lose all but the first."""
            nonlocal position
            position += 1
            if skip_space():
                raise broken(f"more stands after the closing {closing}: write one list, or one value a line as .jsonl")

        if skip_space() != opening:
            raise broken(f"this is not JSON that begins with {opening}")
        position += 1
        if skip_space() == closing:
            ends()
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
                ends()
                return
            if following != ",":
                raise broken(f"expected ',' or {closing!r} after the row, found {following!r}")
            position += 1


def table_rows(path: Path) -> Iterator[Row | Rejected]:
    """The rows of a CSV or TSV file with a header line, or of a parquet file, as dicts."""
    if path.suffix == ".parquet":
        yield from parquet_rows(path)
        return
    separator = "\t" if ".tsv" in path.suffixes else ","
    number = -1
    with opened(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        try:
            reader = csv.DictReader(text, delimiter=separator, strict=True)
            names = reader.fieldnames or ()
            if len(set(names)) < len(names):
                raise ConfigError(f"{path}: two columns of the header have one name ({', '.join(names)}); rename one")
            for number, record in enumerate(reader):
                if None in record or None in record.values():
                    reason = f"{path.name}[{number}]: not the {len(names)} columns of the header"
                    yield Rejected(path.name, number, "", f"{reason}; quote fields with {separator!r}")
                    continue
                yield row_at(path, number, record, lines=False)
        except UnicodeDecodeError:
            raise SampleError(f"{path.name}[{number + 1}]: not UTF-8 from here on; save the table as UTF-8") from None
        except csv.Error as error:
            raise SampleError(f"{path.name}[{number + 1}]: not readable as CSV ({error}); check its quotes") from None


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a parquet file, a few at a time; pictures in them by their place."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=CHUNK) as table:
            columns = [item.name for item in table.schema_arrow if "binary" in str(item.type)]
            number = 0
            for group in range(table.num_row_groups):
                first = number
                for batch in table.iter_batches(batch_size=16, row_groups=[group], use_threads=False):
                    for record in batch.to_pylist():
                        row = row_at(path, number, record, lines=False)
                        for column in columns:
                            cell = cell_of(path, group, number - first, column, row.where)
                            record[column] = placed(record[column], cell)
                        yield row
                        number += 1
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path") from None
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise SampleError(f"{path}: not readable as parquet ({reason}); fetch it again") from None


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
