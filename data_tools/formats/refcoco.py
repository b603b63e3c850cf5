"""RefCOCO, RefCOCO+ and RefCOCOg as JSON or parquet: rows with sentences and a box, or refs joined with COCO instances.

A ref is {ref_id, ann_id, image_id, file_name, split, sentences: [{sent or raw}]}, its box in `instances` by ann_id; a
row of the re-uploads carries `bbox` and `image` itself. The original refs are a pickle, which is code and not read
here: save it as JSON once, where you trust it. Boxes are [x, y, width, height] in pixels unless `boxes` says corners.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_tools.album import Album
from data_tools.rows import Rejected, Row, by_number, each, fields, json_document, listed, records
from data_tools.turns import asked_about, box, text_of
from mmit.data.sample import Part, Sample, SampleError, TextPart


def samples(
    path: Path,
    images: Path | None = None,
    *,
    instances: str = "",
    split: str = "",
    strip: bool = True,
    ask: Literal["locate", "describe"] = "locate",
    boxes: Literal["xywh", "corners"] = "xywh",
    image_prefix: str = "",
) -> Iterator[Sample | Rejected]:
    """`instances`: COCO's instances file, when the rows hold no box. `split`: only refs of this split."""
    album = Album(images, prefix=image_prefix)
    known: dict[Any, Any] = {}
    names: dict[Any, Any] = {}
    if instances:
        file, described = Path(instances), json_document(Path(instances))
        known = {
            name: item.get("bbox") for name, item in by_number(listed(file, described, "annotations"), "id").items()
        }
        pictures = listed(file, described, "images") if "images" in described else []
        names = {name: item.get("file_name") for name, item in by_number(pictures, "id").items()}

    def sample(row: Row) -> Sample:
        record = fields(row)
        corners = record.get("bbox", known.get(record.get("ann_id")))
        if not isinstance(corners, list) or len(corners) != 4:
            raise SampleError(f"{row.where}: no bbox of 4 numbers; --set instances=FILE names COCO's instances file")
        left, top, right, bottom = (float(value) for value in corners)
        if boxes == "xywh":
            right, bottom = left + right, top + bottom
        region = box(0, left, top, right, bottom, row.where)
        name = record.get("image") or names.get(record.get("image_id")) or record.get("file_name")
        pairs: list[tuple[str | list[Part], str | list[Part]]] = []
        for sentence in _sentences(record, row.where):
            if ask == "locate":
                pairs.append((f"Where is {sentence}?", [region]))
            else:
                pairs.append(([TextPart("What is at "), region, TextPart("?")], sentence))
        keys = ("ref_id", "ann_id", "image_id", "split", "question_id")
        meta = {key: record[key] for key in keys if isinstance(record.get(key), str | int)}
        return asked_about([album.picture(name, row.where)], pairs, where=row.where, strip=strip, meta=meta)

    rows = records(path)
    return each((r for r in rows if not split or _split_of(r) in (split, None)), sample)


def _split_of(row: Row | Rejected) -> Any:
    return row.record.get("split") if isinstance(row, Row) and isinstance(row.record, dict) else None


def _sentences(record: Any, where: str) -> list[str]:
    found = next((record[key] for key in ("sentences", "captions", "answer", "phrase") if record.get(key)), None)
    listed = found if isinstance(found, list) else [found]
    texts = [item.get("sent") or item.get("raw") if isinstance(item, dict) else item for item in listed]
    return [text_of(text, where) for text in texts]
