"""GQA: one object {question id: {imageId, question, answer, fullAnswer, isBalanced, ...}}, read member by member."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, field, fields, member_rows, text_field
from data_tools.turns import asked_about, named_by
from mmit.data.sample import Sample


def samples(
    path: Path,
    images: Path | None = None,
    *,
    strip: bool = True,
    prompt: str = "{question}",
    full: bool = False,
    balanced: bool = True,
    image_name: str = "{image_id}.jpg",
) -> Iterator[Sample | Rejected]:
    """`full`: learn the whole sentence and not the word. `balanced`: leave out questions whose isBalanced is false."""
    album = Album(images)

    def sample(row: Row) -> Sample:
        image_id = field(row, "imageId")
        picture = album.picture(named_by(image_name, image_id=image_id), row.where)
        pairs = [(text_field(row, "question"), text_field(row, "fullAnswer" if full else "answer"))]
        meta = {"question_id": fields(row)["key"], "image_id": image_id}
        return asked_about([picture], pairs, where=row.where, strip=strip, prompt=prompt, meta=meta)

    rows = member_rows(path)
    kept = (r for r in rows if not (balanced and isinstance(r.record, dict) and r.record.get("isBalanced") is False))
    return each(kept, sample)
