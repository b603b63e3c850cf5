"""Shard sets -> one. Parts of one conversion give exactly the files that one run would have written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_tools.convert import COUNTS, conversion
from data_tools.finished import PLAN, WORK, read_record, refuse_other_files, write_whole
from data_tools.plan import only_writer
from mmit.config import ConfigError
from mmit.data.files import whole
from mmit.data.provenance import CONVERSION, REJECTED, licenses
from mmit.data.sample import SampleError
from mmit.data.shard_index import INDEX, SAMPLES, UNFINISHED, SampleRow, ShardEntry, WrittenShard, read_index
from mmit.data.shard_writer import TAR, TEMPORARY, shard_name, write_index
from mmit.data.shards import ShardSet

TOOL = "mmit-data merge"
REWRITTEN = (REJECTED, CONVERSION, SAMPLES)


def merge(folders: Sequence[Path], out: Path) -> ShardSet:
    """Joins shard sets by linking their tars (copying across disks); the sets given stay as they are.

    Parts i/n of one conversion must all be there and come back in their order; other sets follow each other and their
    shards are numbered anew. Whoever is interrupted and starts the same merge again goes on with the tars that are
    there.
    """
    sets = [_Opened(folder) for folder in folders]
    parts = [opened.part for opened in sets if opened.part is not None]
    if parts and len(parts) < len(sets):
        raise ConfigError("some of these folders are parts of a conversion and some are not; merge the parts first")
    if parts:
        _check_parts(sets)
    listed = [(opened, entry) for opened in sets for entry in opened.entries]
    if parts:  # names say which rows a shard covers
        listed.sort(key=lambda item: item[1].name)
    names = [entry.name if parts else shard_name(number) for number, (_, entry) in enumerate(listed)]
    joined = tuple(replace(entry, name=name) for (_, entry), name in zip(listed, names, strict=True))
    if (out / INDEX).exists():
        if read_index(out).entries != joined:
            raise ConfigError(f"{out}: already holds a finished shard set, and not of these; name another --out")
    else:
        refuse_other_files(out, TOOL)
        out.mkdir(parents=True, exist_ok=True)
        with only_writer(out):
            _start(out, joined)
            rejected = _rejected(sets)
            if rejected:
                write_whole(out / REJECTED, "".join(rejected))
            write_whole(out / CONVERSION, json.dumps(_summary(sets, rejected), indent=1) + "\n")
            write_index(out, _placed(listed, joined, out, numbered=bool(parts)))
    shutil.rmtree(out / WORK, ignore_errors=True)
    (out / UNFINISHED).unlink(missing_ok=True)
    return ShardSet(out)


def _placed(
    listed: Sequence[tuple[_Opened, ShardEntry]], joined: Sequence[ShardEntry], out: Path, *, numbered: bool
) -> Iterator[WrittenShard]:
    """The shards with their rows, each in its place; `numbered`: their keys hold the number of the row."""
    readers = {id(opened): opened.shards() for opened, _ in listed}
    keys: set[str] = set()
    for (opened, entry), new in zip(listed, joined, strict=True):
        rows = next(readers[id(opened)])
        for row in () if numbered else rows:
            if row.key in keys:
                raise SampleError(
                    f"{opened.folder}: the key {row.key} is already in another of these sets; convert "
                    f"one of them again with another --source"
                )
            keys.add(row.key)
        _link(opened.folder / entry.name, out / new.name, new)
        yield WrittenShard(new, rows)


def _start(out: Path, joined: Sequence[ShardEntry]) -> None:
    """Claims the folder for this merge. What an interrupted one left is taken away, but for tars of the same merge."""
    note = out / WORK / PLAN
    plan = {"tool": TOOL, "shards": [asdict(entry) for entry in joined]}
    same = read_record(note) == plan
    for path in out.iterdir():
        if TEMPORARY.fullmatch(path.name) or (TAR.fullmatch(path.name) and not same) or path.name in REWRITTEN:
            path.unlink()
    if not same:
        note.parent.mkdir(exist_ok=True)
        write_whole(note, json.dumps(plan))


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

    def shards(self) -> Iterator[tuple[SampleRow, ...]]:
        """The rows of each shard, those of one in memory at a time."""
        with pq.ParquetFile(self.folder / SAMPLES) as table:
            rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for entry in self.entries:
                yield tuple(_row(next(rows)) for _ in range(entry.samples))

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


def _link(source: Path, target: Path, entry: ShardEntry) -> None:
    """The tar under its new name, unless an interrupted merge has put it there."""
    if target.exists() and target.stat().st_size == entry.bytes:
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        with source.open("rb") as original, whole(target) as temporary, temporary.open("wb") as copy:
            shutil.copyfileobj(original, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
