"""VQAv2 and what shares its files (OK-VQA): questions {questions: [{image_id, question, question_id}]} joined with
{annotations: [{question_id, multiple_choice_answer, answers}]} by question_id. INPUT is the questions file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.album import Album
from data_tools.rows import Rejected, Row, by_number, each, field, json_document, listed, row_at, text_field
from data_tools.turns import asked_about, most_common, named_by
from mmit.config import ConfigError
from mmit.data.sample import Sample, SampleError


def samples(
    path: Path,
    images: Path | None = None,
    *,
    annotations: str,
    strip: bool = True,
    prompt: str = "{question}",
    image_name: str = "COCO_{subtype}_{image_id:012d}.jpg",
) -> Iterator[Sample | Rejected]:
    """`annotations`: the file of answers. `image_name`: how an image_id becomes a file name below --images."""
    album = Album(images)
    if not Path(annotations).is_file():
        raise ConfigError(f"{annotations}: no such file; --set annotations=FILE names the answers to these questions")
    document = json_document(path)
    questions = listed(path, document, "questions")
    found_answers = listed(Path(annotations), json_document(Path(annotations)), "annotations")
    answers = by_number(found_answers, "question_id")
    subtype = document.get("data_subtype", "")

    def sample(row: Row) -> Sample:
        number = field(row, "question_id")
        found = answers.get(number)
        if found is None:
            raise SampleError(f"{row.where}: {annotations} has no answer to question_id {number}")
        answer = found.get("multiple_choice_answer")
        if answer is None:
            answer = most_common(found["answers"], row.where)
        image_id = int(field(row, "image_id"))
        picture = album.picture(named_by(image_name, image_id=image_id, subtype=subtype), row.where)
        pairs = [(text_field(row, "question"), answer)]
        meta = {"question_id": number, "image_id": image_id}
        return asked_about([picture], pairs, where=row.where, strip=strip, prompt=prompt, meta=meta)

    return each((row_at(path, n, item, lines=False) for n, item in enumerate(questions)), sample)
