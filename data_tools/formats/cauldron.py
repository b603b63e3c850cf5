"""The Cauldron and FineVision: parquet files of {images: [picture] or null, texts: [{user, assistant, source?}]}.

Their texts hold no places for pictures: all pictures stand before the first question. With `least`, turns whose
FineVision rating is lower are left out; a row that loses all of them is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, field, fields, records
from data_tools.turns import asked_about, names_of, text_of
from mmit.data.sample import Sample, SampleError


def samples(
    path: Path,
    images: Path | None = None,
    *,
    strip: bool = True,
    least: int = 0,
    ratings: str = "relevance_ratings",
) -> Iterator[Sample | Rejected]:
    album = Album(images)

    def sample(row: Row) -> Sample:
        record = fields(row)
        texts = field(row, "texts")
        if not isinstance(texts, list) or not texts:
            raise SampleError(f"{row.where}: texts is no list of turns: {str(texts)[:60]!r}")
        rated = record.get(ratings) or [None] * len(texts)
        if least and len(rated) != len(texts):
            raise SampleError(f"{row.where}: {len(texts)} turns but {len(rated)} {ratings}")
        pairs = [
            (text_of(turn.get("user"), row.where), text_of(turn.get("assistant"), row.where))
            for turn, rating in zip(texts, rated, strict=False)
            if not least or (rating is not None and rating >= least)
        ]
        if not pairs:
            raise SampleError(f"{row.where}: no turn is rated {least} or better in {ratings}")
        pictures = [album.picture(item, row.where) for item in names_of(record.get("images"), row.where)]
        source = record.get("source") or (texts[0].get("source") if texts else None)
        meta = {"subset": source} if isinstance(source, str) else {}
        return asked_about(pictures, pairs, where=row.where, strip=strip, meta=meta)

    return each(records(path), sample)
