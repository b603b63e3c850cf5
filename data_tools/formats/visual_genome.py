"""Visual Genome: region_descriptions.json ([{id or image_id, regions: [{x, y, width, height, phrase}]}]) or
question_answers.json ([{id or image_id, qas: [{question, answer}]}]); one conversation a picture.

Pictures are looked for in VG_100K and VG_100K_2 below --images, then in it. Regions become boxes in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, fields, records
from data_tools.turns import asked_about, box, text_of
from mmit.data.sample import Part, Sample, SampleError, TextPart

PLACES = ("VG_100K/", "VG_100K_2/", "")


def samples(
    path: Path,
    images: Path | None = None,
    *,
    strip: bool = True,
    ask: Literal["describe", "locate"] = "describe",
    most: int | None = None,
) -> Iterator[Sample | Rejected]:
    """`ask`: what stands at a box, or the box of a phrase. `most`: how many regions of a picture (default: all)."""
    album = Album(images)

    def sample(row: Row) -> Sample:
        record = fields(row)
        listed = record.get("regions", record.get("qas"))
        if not isinstance(listed, list) or not listed:
            raise SampleError(f"{row.where}: no regions and no qas; the row has {', '.join(record)}")
        number = record.get("image_id", record.get("id", listed[0].get("image_id")))
        name = f"{number}.jpg"
        place = next((p for p in PLACES if album.root is not None and (album.root / p / name).exists()), "")
        pairs = [_pair(item, ask, row.where) for item in listed[:most]]
        picture = album.picture(place + name, row.where)
        return asked_about([picture], pairs, where=row.where, strip=strip, meta={"image_id": number})

    return each(records(path), sample)


def _pair(item: Any, ask: str, where: str) -> tuple[str | list[Part], str | list[Part]]:
    if "question" in item:
        return text_of(item["question"], where), text_of(item.get("answer"), where)
    left, top = float(item["x"]), float(item["y"])
    region = box(0, left, top, left + float(item["width"]), top + float(item["height"]), where)
    phrase = text_of(item.get("phrase"), where)
    if ask == "locate":
        return f"Where is {phrase}?", [region]
    return [TextPart("What is at "), region, TextPart("?")], phrase
