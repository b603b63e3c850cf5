"""COCO captions: {images: [{id, file_name}], annotations: [{image_id, id, caption}]}, one sample a caption.

Nocaps, TextCaps in COCO form and Flickr30k in COCO form read alike. LLaVA's {image, captions: [...]} lines do too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_tools.album import Album
from data_tools.rows import (
    Rejected,
    Row,
    by_number,
    each,
    fields,
    json_document,
    json_shape,
    listed,
    records,
    row_at,
    text_field,
)
from data_tools.turns import asked_about
from mmit.data.sample import Sample, SampleError


def samples(
    path: Path,
    images: Path | None = None,
    *,
    strip: bool = True,
    image_prefix: str = "",
    prompt: str = "Describe the image in one sentence.",
    captions: Literal["each", "first"] = "each",
) -> Iterator[Sample | Rejected]:
    album = Album(images, prefix=image_prefix)

    def sample(row: Row) -> Sample:
        if "image_id" in fields(row) and "file_name" in fields(row) and fields(row)["file_name"] is None:
            raise SampleError(f"{row.where}: no picture of the file has the id {fields(row)['image_id']!r}")
        picture = album.picture(text_field(row, "file_name", "image"), row.where)
        meta = {key: fields(row)[key] for key in ("image_id", "id") if isinstance(fields(row).get(key), str | int)}
        return asked_about(
            [picture],
            [(prompt, text_field(row, "caption"))],
            where=row.where,
            strip=strip,
            prompt="{question}",
            meta=meta,
        )

    rows = _listed(path) if json_shape(path) == "lines" else _joined(path)
    return each(_first(rows) if captions == "first" else rows, sample)


def _joined(path: Path) -> Iterator[Row]:
    record = json_document(path)
    images, annotations = (listed(path, record, name) for name in ("images", "annotations"))
    named = by_number(images, "id")
    for number, item in enumerate(annotations):
        image_id = item.get("image_id")
        picture = named.get(image_id, {}) if isinstance(image_id, str | int) else {}
        yield row_at(path, number, {**item, "file_name": picture.get("file_name")}, lines=False)


def _listed(path: Path) -> Iterator[Row | Rejected]:
    """Lines that hold several captions of a picture: a row for each caption."""
    for row in records(path):
        if isinstance(row, Rejected) or not isinstance(row.record, dict) or "captions" not in row.record:
            yield row
            continue
        captions = row.record["captions"]
        kept = {key: row.record[key] for key in ("id", "image", "file_name") if key in row.record}
        for caption in captions if isinstance(captions, list) and captions else [None]:
            yield Row(row.file, row.number, row.where, kept | {"caption": caption})


def _first(rows: Iterator[Row | Rejected]) -> Iterator[Row | Rejected]:
    seen: set[Any] = set()
    for row in rows:
        if isinstance(row, Row) and isinstance(row.record, dict):
            name = row.record.get("file_name", row.record.get("image"))
            if name in seen:
                continue
            seen.add(name)
        yield row
