"""Turns as bare texts, the user's first: LIMA ({conversations: [text, ...], source}), UltraChat ({id, data: [...]}).

A last question without an answer stays in the file's order and is simply never trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.rows import Rejected, Row, each, field, fields, records
from data_tools.turns import conversation_of, refuse_media, said, sample_of, text_of
from mmit.data.sample import Sample


def samples(path: Path, images: Path | None = None, *, strip: bool = True) -> Iterator[Sample | Rejected]:
    del images

    def sample(row: Row) -> Sample:
        refuse_media(fields(row), row.where, "image", "video", "audio")
        texts = conversation_of(field(row, "conversations", "data", "dialogue", "turns"), row.where)
        turns = [
            said("assistant" if number % 2 else "user", text_of(text, f"{row.where}: turn {number}"))
            for number, text in enumerate(texts)
        ]
        record = fields(row)
        meta = {key: record[key] for key in ("id", "source") if isinstance(record.get(key), str | int)}
        return sample_of(turns, meta=meta, where=row.where, strip=strip)

    return each(records(path), sample)
