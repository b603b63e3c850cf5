"""LLaVA: a JSON list or JSONL of {id, image: name | [names] | absent, conversations: [{from, value}]}.

`<image>` in a value is the place of a picture and stays there. Seen in the wild and read: a list stored as a Python
literal, a conversation that begins with gpt, rows without pictures, OpenAI role names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, field, fields, records
from data_tools.turns import (
    Markers,
    pictures_first,
    pictures_named,
    place_pictures,
    refuse_media,
    sample_of,
    told_first,
    valued_turns,
)
from mmit.data.sample import Sample


def samples(
    path: Path,
    images: Path | None = None,
    *,
    strip: bool = True,
    image_prefix: str = "",
    image_first: bool = False,
    unmarked: Literal["error", "first"] = "error",
    markers: Markers = "error",
) -> Iterator[Sample | Rejected]:
    """`image_first` moves pictures before the text of their turn, as LLaVA-1.5 trained; else they keep their place."""
    album = Album(images, prefix=image_prefix)

    def sample(row: Row) -> Sample:
        record = fields(row)
        refuse_media(record, row.where, "video", "audio")
        turns = valued_turns(field(row, "conversations", "conversation"), row.where)
        names = pictures_named(record, row.where)
        placed = place_pictures(turns, len(names), row.where, unmarked=unmarked, markers=markers)
        if image_first:
            placed = [turn._replace(parts=pictures_first(turn.parts)) for turn in placed]
        return sample_of(
            told_first(placed, row.where, system=record.get("system"), tools=record.get("tools")),
            images=[album.picture(name, row.where) for name in names],
            meta={"id": record["id"]} if "id" in record else {},
            where=row.where,
            strip=strip,
        )

    return each(records(path), sample)
