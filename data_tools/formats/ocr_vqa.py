"""OCR-VQA: one object {id: {questions, answers, imageURL, title, split}}; the picture is `ID` with the URL's ending."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, field, fields, member_rows
from data_tools.turns import asked_about, list_of, text_of
from mmit.data.sample import Sample, SampleError

SPLITS = {"train": 1, "val": 2, "test": 3, "all": 0}


def samples(
    path: Path, images: Path | None = None, *, strip: bool = True, prompt: str = "{question}", split: str = "train"
) -> Iterator[Sample | Rejected]:
    """`split`: train, val, test or all (1, 2 and 3 in the file)."""
    album = Album(images)

    def sample(row: Row) -> Sample:
        record = fields(row)
        questions = list_of(field(row, "questions"), row.where, "list of questions", "texts")
        answers = list_of(field(row, "answers"), row.where, "list of answers", "texts")
        if len(questions) != len(answers):
            raise SampleError(f"{row.where}: {len(questions)} questions but {len(answers)} answers")
        ending = Path(str(record.get("imageURL", ""))).suffix or ".jpg"
        picture = album.picture(f"{record['key']}{ending}", row.where)
        pairs = [(text_of(q, row.where), text_of(a, row.where)) for q, a in zip(questions, answers, strict=True)]
        meta = {"id": record["key"]} | ({"title": record["title"]} if isinstance(record.get("title"), str) else {})
        return asked_about([picture], pairs, where=row.where, strip=strip, prompt=prompt, meta=meta)

    rows = member_rows(path)
    wanted = SPLITS.get(split)
    kept = (r for r in rows if not wanted or not isinstance(r.record, dict) or r.record.get("split") == wanted)
    return each(kept, sample)
