"""A whole chat in one text, its turns told apart by marks: Baize (`[|Human|]`, `[|AI|]` in `input`), OIG (`<human>:`,
`<bot>:` in `text`), openassistant-guanaco (`### Human:`, `### Assistant:` in `text`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data_tools.rows import Rejected, Row, each, fields, records, text_field
from data_tools.turns import Turn, refuse_media, said, sample_of
from mmit.data.sample import Sample, SampleError

MARKS = [
    (re.compile(r"\[\|(Human|AI)\|\]"), "Human"),
    (re.compile(r"(?:^|\n)<(human|bot)>:"), "human"),
    (re.compile(r"(?:^|\n?)### (Human|Assistant):"), "Human"),
]


def samples(path: Path, images: Path | None = None, *, strip: bool = True) -> Iterator[Sample | Rejected]:
    del images

    def sample(row: Row) -> Sample:
        refuse_media(fields(row), row.where, "image", "video", "audio")
        text = text_field(row, "text", "input", "conversation")
        marks, user = next(((marks, user) for marks, user in MARKS if marks.search(text)), (None, ""))
        if marks is None:
            raise SampleError(f"{row.where}: no turn marks such as [|Human|], <human>: or ### Human: in the text")
        before, *pieces = marks.split(text)
        turns: list[Turn] = [said("system", before.strip())] if before.strip() else []
        turns += [
            said("user" if name == user else "assistant", said_text)
            for name, said_text in zip(pieces[::2], pieces[1::2], strict=True)
        ]
        # Baize ends with an empty mark that only opens the user's next turn.
        if turns and turns[-1].role == "user" and not pieces[-1].strip():
            turns.pop()
        return sample_of(turns, where=row.where, strip=strip)

    return each(records(path), sample)
