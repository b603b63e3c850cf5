"""CSV, TSV or parquet (a file or a folder) with named columns: a picture, a question, an answer; the first holds file
names or, in parquet, the pictures themselves. The other columns go into the sample's meta. A row without a picture is
text only where the table has questions, and rejected where a picture is all there is to ask about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, fields, records
from data_tools.turns import asked_about, said, sample_of, text_of
from mmit.data.sample import Sample, SampleError

IMAGES = ("image", "images", "image_path", "file_name", "filepath", "path")
QUESTIONS = ("question", "prompt", "instruction", "query", "input")
ANSWERS = ("answer", "caption", "text", "response", "output", "completion", "label", "title")


def samples(
    path: Path,
    images: Path | None = None,
    *,
    image: str = "",
    question: str = "",
    answer: str = "",
    prompt: str = "Describe the image.",
    image_prefix: str = "",
    strip: bool = True,
) -> Iterator[Sample | Rejected]:
    """`image`, `question`, `answer`: names of columns (default: the usual names). `prompt`: what is asked where the
    table has no column of questions."""
    album = Album(images, prefix=image_prefix)

    def sample(row: Row) -> Sample:
        record = fields(row)

        def column(named: str, usual: tuple[str, ...], *, needed: bool) -> str:
            if named and named not in record:
                raise SampleError(f"{row.where}: no column {named!r}; the table has {', '.join(record)}")
            found = named or next((name for name in usual if name in record), "")
            if needed and not found:
                raise SampleError(
                    f"{row.where}: none of the columns {', '.join(record)} is an answer by its name; "
                    f"write --set answer=COLUMN (and image=, question=)"
                )
            return found

        told = column(answer, ANSWERS, needed=True)
        asks = "question_id" in record and not {"answer_id", *QUESTIONS} & record.keys()
        if told == "text" and not answer and asks:
            raise SampleError(
                f"{row.where}: text beside question_id may be a question to be asked, as in LLaVA's files for "
                f"evaluation, and no other column is an answer; write --set question=text and --set answer=COLUMN, or "
                f"--set answer=text if it is one"
            )
        shown, asked = column(image, IMAGES, needed=False), column(question, QUESTIONS, needed=False)
        pictures = record.get(shown) if shown else None
        listed = pictures if isinstance(pictures, list) else [pictures] if pictures else []
        text = text_of(record[asked], row.where) if asked else prompt
        reply = _told(record[told], f"{row.where}: {told}")
        if shown and not listed and not asked:
            raise SampleError(f"{row.where}: no picture in {shown}, so there is nothing to describe")
        rest = {k: v for k, v in record.items() if k not in (told, shown, asked) and _is_plain(v)}
        if listed:
            found = [album.picture(item, row.where) for item in listed]
            return asked_about(found, [(text, reply)], where=row.where, strip=strip, meta=rest)
        turns = [said("user", text), said("assistant", reply)] if asked else [said("assistant", reply)]
        return sample_of(turns, meta=rest, where=row.where, strip=strip)

    return each(records(path), sample)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _told(value: Any, where: str) -> str:
    """An answer as text; numbers are written out."""
    if not _is_plain(value):
        raise SampleError(f"{where} is {str(value)[:60]!r}; an answer is a text or a number")
    return text_of(value if isinstance(value, str) else str(value), where)
