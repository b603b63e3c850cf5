"""ScienceQA: the folder with problems.json and pid_splits.json, or the parquet files of its re-uploads.

A problem is {question, choices, answer (number), hint, image, lecture, solution, split, ...}; its picture, if it has
one, is SPLIT/PID/image.png below --images. With `explain`, the solution is learned before the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, field, fields, json_document, records, row_at, text_field
from data_tools.turns import asked_about, list_of
from mmit.config import ConfigError
from mmit.data.sample import Sample, SampleError

LETTERS = "ABCDEFGHIJ"


def samples(
    path: Path, images: Path | None = None, *, split: str = "train", strip: bool = True, explain: bool = False
) -> Iterator[Sample | Rejected]:
    folder_of_problems = path.is_dir() and (path / "problems.json").exists()
    album = Album(images)

    def rows() -> Iterator[Row | Rejected]:
        if not folder_of_problems:
            yield from records(path)
            return
        problems, splits = (json_document(path / name) for name in ("problems.json", "pid_splits.json"))
        if split not in splits:
            raise ConfigError(f"scienceqa: split {split!r} is unknown; write one of {', '.join(splits)}")
        for number, name in enumerate(splits[split]):
            yield row_at(path / "problems.json", number, {"id": name, **problems[name]}, lines=False)

    def sample(row: Row) -> Sample:
        record = fields(row)
        choices = list_of(field(row, "choices"), row.where, "list of choices", "texts")
        answer = field(row, "answer")
        if not isinstance(answer, int) or not 0 <= answer < len(choices) <= len(LETTERS):
            raise SampleError(f"{row.where}: answer {answer!r} is none of the {len(choices)} choices")
        hint = f"Context: {record['hint']}\n" if record.get("hint") else ""
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        question = f"{hint}Question: {text_field(row, 'question')}\nOptions: {options}"
        said = f"The answer is {LETTERS[answer]}."
        if explain and record.get("solution"):
            said = f"{record['solution']}\n{said}"
        pictures = []
        if record.get("image"):
            name = f"{split}/{record['id']}/{record['image']}" if folder_of_problems else record["image"]
            pictures = [album.picture(name, row.where)]
        meta = {key: record[key] for key in ("id", "subject", "topic", "grade") if isinstance(record.get(key), str)}
        return asked_about(pictures, [(question, said)], where=row.where, strip=strip, meta=meta)

    return each(rows(), sample)
