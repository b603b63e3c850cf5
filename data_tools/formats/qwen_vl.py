"""Qwen-VL finetuning: LLaVA rows, of which one may carry `data_path`, and a list of rows that were packed together.

Packing is how a step runs and not what a sample is, so the rows of a packed list become samples of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, field, fields, records, row_at
from data_tools.turns import pictures_named, place_pictures, refuse_media, sample_of, told_first, valued_turns
from mmit.data.sample import Sample


def samples(
    path: Path, images: Path | None = None, *, strip: bool = True, image_prefix: str = ""
) -> Iterator[Sample | Rejected]:
    album = Album(images, prefix=image_prefix)

    def sample(row: Row) -> Sample:
        record = fields(row)
        refuse_media(record, row.where, "video", "audio")
        turns = valued_turns(field(row, "conversations"), row.where)
        names = [_below(record.get("data_path"), name) for name in pictures_named(record, row.where)]
        placed = place_pictures(turns, len(names), row.where)
        return sample_of(
            told_first(placed, row.where, system=record.get("system"), tools=record.get("tools")),
            images=[album.picture(name, row.where) for name in names],
            meta={"id": record["id"]} if isinstance(record.get("id"), str | int) else {},
            where=row.where,
            strip=strip,
        )

    return each(_unpacked(records(path), path), sample)


def _unpacked(rows: Iterator[Row | Rejected], path: Path) -> Iterator[Row | Rejected]:
    for row in rows:
        if isinstance(row, Row) and isinstance(row.record, list) and row.record:
            for record in row.record:
                yield row_at(path, row.number, record, lines=":" in row.where)
        else:
            yield row


def _below(folder: Any, name: Any) -> Any:
    return f"{folder.rstrip('/')}/{name}" if isinstance(folder, str) and folder and isinstance(name, str) else name
