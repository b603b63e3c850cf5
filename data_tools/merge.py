"""Shard sets -> one. Parts of one conversion give exactly the files that one run would have written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_tools.convert import COUNTS, conversion
from mmit.config import ConfigError
from mmit.data.provenance import CONVERSION, REJECTED, licenses
from mmit.data.sample import SampleError
from mmit.data.shard_index import INDEX, SAMPLES, UNFINISHED, SampleRow, ShardEntry, WrittenShard, read_index
from mmit.data.shard_writer import shard_name, write_index
from mmit.data.shards import ShardSet


def merge(folders: Sequence[Path], out: Path) -> ShardSet:
    """Joins shard sets by linking their tars (copying across disks); the sets given stay as they are.

    Parts i/n of one conversion must all be there and come back in their order; other sets follow each other and their
    shards are numbered anew.
    """
    if (out / INDEX).exists() or (out.exists() and any(path.name != UNFINISHED for path in out.iterdir())):
        raise ConfigError(f"{out}: the folder is not empty; --out names a new one")
    sets = [_Opened(folder) for folder in folders]
    parts = [opened.part for opened in sets if opened.part is not None]
    if parts and len(parts) < len(sets):
        raise ConfigError("some of these folders are parts of a conversion and some are not; merge the parts first")
    if parts:
        _check_parts(sets)
        shards = _in_order(sets)
    else:
        numbered = enumerate((opened, shard) for opened in sets for shard in opened.shards())
        shards = ((opened, shard, shard_name(number)) for number, (opened, shard) in numbered)
    out.mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED).touch()
    keys: set[str] = set()

    def placed() -> Iterator[WrittenShard]:
        for opened, shard, name in shards:
            for row in shard.rows if not parts else ():  # keys of parts hold the number of the row
                if row.key in keys:
                    raise SampleError(
                        f"{opened.folder}: the key {row.key} is already in another of these sets; convert "
                        f"one of them again with another --source"
                    )
                keys.add(row.key)
            _link(opened.folder / shard.entry.name, out / name)
            entry = ShardEntry(name, shard.entry.bytes, shard.entry.sha256, shard.entry.samples)
            yield WrittenShard(entry, shard.rows)

    rejected = _rejected(sets)
    if rejected:
        (out / REJECTED).write_text("".join(rejected), encoding="utf-8")
    (out / CONVERSION).write_text(json.dumps(_summary(sets, rejected), indent=1) + "\n", encoding="utf-8")
    write_index(out, placed())
    (out / UNFINISHED).unlink()
    return ShardSet(out)


class _Opened:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_index(folder)
        self.entries = index.entries
        if index.in_place:
            raise ConfigError(
                f"{folder}: its tars are somebody else's, indexed where they lie; convert them first: "
                f"mmit-data convert webdataset {folder} --out shards/"
            )
        if self.entries:
            ShardSet(folder)  # checks sizes and versions
        self.summary = conversion(folder)
        part = self.summary["plan"]["part"] if self.summary is not None and "plan" in self.summary else None
        self.part: tuple[int, int] | None = tuple(part) if part else None

    def shards(self) -> Iterator[WrittenShard]:
        """The shards with their rows, one in memory at a time."""
        with pq.ParquetFile(self.folder / SAMPLES) as table:
            rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for entry in self.entries:
                yield WrittenShard(entry, tuple(_row(next(rows)) for _ in range(entry.samples)))

    def rejected(self) -> Iterator[tuple[int, str]]:
        """The number of the shard that lacks the row, for a part, and its line."""
        path = self.folder / REJECTED
        lines = iter(path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else [])
        for number, count in (self.summary or {}).get("rejected_by_shard", {}).items():
            yield from ((int(number), line) for line in islice(lines, count))
        yield from ((0, line) for line in lines)


def _row(record: dict[str, Any]) -> SampleRow:
    record = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    del record["shard"]
    return SampleRow(**record)


def _check_parts(sets: list[_Opened]) -> None:
    ours = {"part": None, "images": None}  # each machine may have its own folder
    plans = {json.dumps(opened.summary["plan"] | ours, sort_keys=True) for opened in sets if opened.summary}
    if len(plans) > 1:
        raise ConfigError("these parts are of different inputs or options; convert all parts with the same command")
    count = {opened.part[1] for opened in sets if opened.part}
    present = sorted(opened.part[0] for opened in sets if opened.part)
    total = count.pop()
    if count or present != list(range(1, total + 1)):
        raise ConfigError(f"of {total} parts these are here: {', '.join(map(str, present))}; give each exactly once")


def _in_order(sets: list[_Opened]) -> Iterator[tuple[_Opened, WrittenShard, str]]:
    """The shards of all parts by their names, which are the rows they cover."""
    readers = [(opened, opened.shards()) for opened in sets]
    heads = [(opened, reader, shard) for opened, reader in readers if (shard := next(reader, None)) is not None]
    while heads:
        opened, reader, shard = min(heads, key=lambda head: head[2].entry.name)
        yield opened, shard, shard.entry.name
        heads = [head for head in heads if head[0] is not opened]
        following = next(reader, None)
        if following is not None:
            heads.append((opened, reader, following))


def _rejected(sets: list[_Opened]) -> list[str]:
    """The lines of all sets, those of parts in the order of one run."""
    lines = [line for opened in sets for line in opened.rejected()]
    return [line for _, line in sorted(lines, key=lambda line: line[0])]


def _summary(sets: list[_Opened], rejected: list[str]) -> dict[str, Any]:
    """One summary: of parts, the one a single run writes; of other sets, all of theirs."""
    summaries = [opened.summary for opened in sets if opened.summary is not None]
    totals = {key: sum(summary.get(key, 0) for summary in summaries) for key in COUNTS}
    first = [json.loads(line)["reason"] for line in rejected[:5]]
    if any(opened.part for opened in sets):
        return {"plan": summaries[0]["plan"] | {"part": None}, **totals, "first": first}
    stated = {"licenses": sorted({license for opened in sets for license in licenses(opened.folder)})}
    merged = [summary["plan"] for summary in summaries]
    return {"plan": {"merged": merged, "part": None}, **totals, **stated, "first": first}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        temporary = target.with_suffix(".tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
