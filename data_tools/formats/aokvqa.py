"""A-OKVQA: a list of {image_id, question_id, question, choices, correct_choice_idx, direct_answers, rationales}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, field, fields, records, text_field
from data_tools.turns import asked_about, list_of, most_common, named_by, text_of
from mmit.data.sample import Sample, SampleError


def samples(
    path: Path,
    images: Path | None = None,
    *,
    strip: bool = True,
    prompt: str = "{question}",
    answer: Literal["direct", "choice", "rationale"] = "direct",
    image_name: str = "{image_id:012d}.jpg",
) -> Iterator[Sample | Rejected]:
    """`answer`: the most frequent direct answer, the right one of the choices (told in the question), or the first
    rationale and then the right choice."""
    album = Album(images)

    def sample(row: Row) -> Sample:
        question = text_field(row, "question")
        if answer == "direct":
            said = most_common(field(row, "direct_answers"), row.where)
        else:
            choices = list_of(field(row, "choices"), row.where, "list of choices", "texts")
            right = field(row, "correct_choice_idx")
            if not isinstance(right, int) or not 0 <= right < len(choices):
                raise SampleError(f"{row.where}: correct_choice_idx {right!r} is none of the {len(choices)} choices")
            question = f"{question}\nOptions: {', '.join(choices)}"
            said = text_of(choices[right], row.where)
            if answer == "rationale":
                told = list_of(field(row, "rationales"), row.where, "list of rationales", "texts")
                said = f"{text_of(told[0], row.where)}\nThe answer is {said}."
        shown = fields(row).get("image")
        image_id = int(field(row, "image_id")) if shown is None else None
        picture = album.picture(shown if shown is not None else named_by(image_name, image_id=image_id), row.where)
        meta = {key: fields(row)[key] for key in ("question_id", "image_id", "split") if key in fields(row)}
        return asked_about([picture], [(question, said)], where=row.where, strip=strip, prompt=prompt, meta=meta)

    return each(records(path), sample)
