"""Pictures that lie inside a tar or a parquet file, named by their place and read by the worker that develops them.

Passed on as bytes, those of all rows in work stood in memory at once, and went through a pipe to the workers: 1.9 GB in
the reading process for 3,000 pictures of 300 KB and 2 workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.album import unread
from data_tools.holders import Holder
from mmit.data.sample import Picture, SampleError

SMALL = 1 << 14
"""Bytes up to which a value travels with its row."""
ROWS = 16
"""Of a parquet file that are unpacked at a time."""


@dataclass(frozen=True)
class Stretch(Holder):
    """A picture that is `size` bytes of a file, such as a member of a tar."""

    offset: int = 0
    size: int = 0

    def pictures(self) -> list[tuple[Picture, float]]:
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) < self.size:
            raise SampleError(f"{self.where}: {self.name} was cut while it was read; convert again")
        return [(unread(data, self.where), 0.0)]


@dataclass(frozen=True)
class Cell(Holder):
    """A picture that is a value in a row of a parquet file."""

    group: int = 0
    """The row group; `row` is counted from its beginning."""
    row: int = 0
    steps: tuple[str | int, ...] = ()
    """The column, and the names and positions inside its value."""

    def pictures(self) -> list[tuple[Picture, float]]:
        column, *steps = self.steps
        value = _value(self.path, self.group, str(column), self.row, self.where)
        for step in steps:
            value = value[step]
        return [(unread(value, self.where), 0.0)]


def stretch_of(file: Path, offset: int, size: int, where: str) -> Stretch:
    root, name = os.path.split(os.path.abspath(file))
    return Stretch(0, 0, "", "", name=name, root=root, where=where, offset=offset, size=size)


def cell_of(file: Path, group: int, row: int, column: str, where: str) -> Cell:
    root, name = os.path.split(os.path.abspath(file))
    return Cell(0, 0, "", "", name=name, root=root, where=where, group=group, row=row, steps=(column,))


def placed(value: Any, cell: Cell) -> Any:
    """A value of a row with all larger bytes in it become a `Cell` that says where they stand."""
    match value:
        case bytes() if len(value) > SMALL:
            return cell
        case dict():
            return {name: placed(item, replace(cell, steps=(*cell.steps, name))) for name, item in value.items()}
        case list():
            return [placed(item, replace(cell, steps=(*cell.steps, n))) for n, item in enumerate(value)]
        case _:
            return value


@dataclass
class _Reader:
    """The values of one column of a row group, unpacked a few rows at a time, forwards."""

    batches: Iterator[Any]
    start: int = 0
    batch: Any = None

    def value(self, row: int) -> Any:
        while self.batch is None or row >= self.start + self.batch.num_rows:
            self.start += self.batch.num_rows if self.batch is not None else 0
            self.batch = next(self.batches)
        return self.batch.column(0)[row - self.start].as_py()


_readers: dict[tuple[str, int, str], _Reader] = {}
"""Of the row group at hand: a worker is given rows in their order, so each is unpacked once."""


def _value(path: str, group: int, column: str, row: int, where: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = (path, group, column)
    if key not in _readers or row < _readers[key].start:
        if not any(known[:2] == key[:2] for known in _readers):
            _readers.clear()
        # Buffered, else a whole column of the row group is read at once.
        table = pq.ParquetFile(path, buffer_size=1 << 20)
        batches = table.iter_batches(batch_size=ROWS, row_groups=[group], columns=[column], use_threads=False)
        _readers[key] = _Reader(batches)
    try:
        return _readers[key].value(row)
    except (pa.ArrowException, StopIteration):
        _readers.clear()
        raise SampleError(f"{where}: the parquet file was changed or cut while it was read; convert again") from None
