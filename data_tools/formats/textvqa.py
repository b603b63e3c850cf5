"""TextVQA: {data: [{question, question_id, image_id, answers: [10 texts], ...}]}; the answer given most is learned.
TextCaps has the same shape with caption_str."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, field, fields, json_document, listed, row_at, text_field
from data_tools.turns import asked_about, most_common, named_by
from mmit.data.sample import Sample


def samples(
    path: Path,
    images: Path | None = None,
    *,
    strip: bool = True,
    prompt: str = "{question}",
    image_name: str = "{image_id}.jpg",
) -> Iterator[Sample | Rejected]:
    album = Album(images)
    questions = listed(path, json_document(path), "data")

    def sample(row: Row) -> Sample:
        image_id = field(row, "image_id")
        picture = album.picture(named_by(image_name, image_id=image_id), row.where)
        if "caption_str" in fields(row):
            pairs = [("Describe the image, with the text in it.", text_field(row, "caption_str"))]
        else:
            pairs = [(text_field(row, "question"), most_common(field(row, "answers"), row.where))]
        meta = {key: fields(row)[key] for key in ("question_id", "image_id", "caption_id") if key in fields(row)}
        return asked_about([picture], pairs, where=row.where, strip=strip, prompt=prompt, meta=meta)

    return each((row_at(path, n, item, lines=False) for n, item in enumerate(questions)), sample)
