"""easy-VQA: `questions.json` is a list of [question, answer, picture number], the pictures are `images/NUMBER.png`.

The questions of a picture become one conversation, with the picture before the first. They are drawn and ordered by
(seed, picture) alone, so the rest of the file changes no conversation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, json_rows, row_at
from data_tools.turns import asked_about, text_of
from mmit.config import ConfigError
from mmit.data.sample import Sample, SampleError

YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    picture: int
    row: int


def samples(
    path: Path,
    images: Path | None = None,
    *,
    split: Literal["train", "test"] = "train",
    joined: bool = True,
    open_questions: int | None = None,
    yes_no_questions: int | None = None,
    seed: int = 0,
) -> Iterator[Sample | Rejected]:
    """The conversations of one split, in the order in which the file first names their pictures.

    `path` is the folder of the set, of which `split` is read, or of one split, or a `questions.json`. `open_questions`
    and `yes_no_questions` are the most of each kind a picture is asked (None: all); a picture left without any has no
    sample. `joined=False` gives every question its own sample, as an evaluation needs it: in a conversation, one
    question can tell another's answer.
    """
    for name, value in {"open_questions": open_questions, "yes_no_questions": yes_no_questions}.items():
        if value is not None and value < 0:
            raise ConfigError(f"easy-vqa: {name} is {value}; write 0 or more, or leave it out for all of them")
    if split not in ("train", "test"):
        raise ConfigError(f"easy-vqa: split {split!r} is unknown; write train or test")
    file = _questions_file(path, split)
    album = Album(images if images is not None else file.parent / "images")

    def sample(row: Row) -> Sample:
        asked: list[Question] = row.record
        picture = album.picture(f"{asked[0].picture}.png", row.where)
        pairs = [(question.text, question.answer) for question in asked]
        return asked_about([picture], pairs, where=row.where, meta={"picture": asked[0].picture})

    def rows() -> Iterator[Row | Rejected]:
        pictures: dict[int, list[Question]] = {}
        for row in json_rows(file):
            if isinstance(row, Rejected):
                yield row
                continue
            try:
                question = _question(row)
                pictures.setdefault(question.picture, []).append(question)
            except SampleError as error:
                yield Rejected(row.file, row.number, row.name, str(error))
        for picture, questions in pictures.items():
            chosen = _choose(questions, open_questions, yes_no_questions, f"{seed} {picture}")
            for asked in [chosen] if joined and chosen else [[question] for question in chosen]:
                yield row_at(file, min(question.row for question in asked), asked, lines=False)

    return each(rows(), sample)


def _questions_file(path: Path, split: str) -> Path:
    candidates = [path / split / "questions.json", path / "questions.json"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"{path}: neither {split}/questions.json nor questions.json is here; "
        f"name the data folder of the easy-vqa package"
    )


def _question(row: Row) -> Question:
    record: Any = row.record
    if not isinstance(record, list) or len(record) != 3 or not isinstance(record[2], int):
        raise SampleError(f"{row.where}: expected [question, answer, picture number], found {str(record)[:60]!r}")
    return Question(text_of(record[0], row.where), text_of(record[1], row.where), record[2], row.number)


def _choose(questions: list[Question], most_open: int | None, most_yes_no: int | None, seed: str) -> list[Question]:
    """The drawn questions, kinds mixed: with all open ones first, most yes/no answers could be read off the text."""
    draw = random.Random(seed)
    shuffled = draw.sample(questions, len(questions))
    drawn = [question for question in shuffled if question.answer not in YES_NO][:most_open]
    drawn += [question for question in shuffled if question.answer in YES_NO][:most_yes_no]
    return draw.sample(drawn, len(drawn))
