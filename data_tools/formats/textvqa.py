"""TextVQA: {data: [{question, question_id, image_id, answers: [10 texts], ...}]}; the answer given most is learned.
TextCaps has the same shape with caption_str."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, field, fields, json_document, row_at, text_field
from data_tools.turns import asked_about, most_common
from mmit.data.sample import Sample, SampleError


def samples(
    path: Path,
    images: Path | None = None,
    *,
    strip: bool = True,
    prompt: str = "{question}",
    image_name: str = "{image_id}.jpg",
) -> Iterator[Sample | Rejected]:
    album = Album(images)
    record = json_document(path)
    if not isinstance(record, dict) or not isinstance(record.get("data"), list):
        raise SampleError(f"{path}: no TextVQA file; it needs a list named data")

    def sample(row: Row) -> Sample:
        image_id = field(row, "image_id")
        picture = album.picture(image_name.format(image_id=image_id), row.where)
        if "caption_str" in fields(row):
            pairs = [("Describe the image, with the text in it.", text_field(row, "caption_str"))]
        else:
            pairs = [(text_field(row, "question"), most_common(field(row, "answers"), row.where))]
        meta = {key: fields(row)[key] for key in ("question_id", "image_id", "caption_id") if key in fields(row)}
        return asked_about([picture], pairs, where=row.where, strip=strip, prompt=prompt, meta=meta)

    return each((row_at(path, n, item, lines=False) for n, item in enumerate(record["data"])), sample)
