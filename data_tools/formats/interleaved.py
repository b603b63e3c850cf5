"""Documents in which texts and pictures take turns: MMC4 and OBELICS. All of the text is learned, as in pre-training.

MMC4 is JSONL {text_list, image_info: [{image_name, matched_text_index, image_base64?}]}: a picture stands before the
sentence it was matched to. OBELICS is parquet {images: [url or null], texts: [text or null]} of equal length. Pictures
lie below --images under their names, OBELICS's under the name that `files` gives for their URL. Those that are not
there are left out of the document and counted in its meta as `absent`; with none left, the row is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.album import Album, from_base64, missing, unread
from data_tools.rows import Rejected, Row, each, field, fields, json_document, records
from data_tools.turns import Turn, sample_of, text_of
from mmit.config import ConfigError
from mmit.data.sample import ImagePart, Part, Picture, Sample, SampleError, TextPart


def samples(
    path: Path, images: Path | None = None, *, files: str = "", between: str = "\n", strip: bool = True
) -> Iterator[Sample | Rejected]:
    """`files`: a JSON file {url: name below --images}. `between`: what stands between neighbouring texts."""
    album = Album(images)
    named = json_document(Path(files)) if files else {}
    if not isinstance(named, dict):
        raise ConfigError(f"{files}: expected an object of URLs and file names")

    def sample(row: Row) -> Sample:
        record = fields(row)
        pieces = _mmc4(record, row) if "text_list" in record else _obelics(row)
        parts: list[Part] = []
        pictures: list[Picture] = []
        absent = 0
        for piece in pieces:
            if isinstance(piece, str):
                after_text = bool(parts) and isinstance(parts[-1], TextPart)
                parts.append(TextPart(between + piece if after_text else piece))
                continue
            picture = _picture(piece, album, named, row.where)
            if picture is None:
                absent += 1
                continue
            pictures.append(picture)
            parts.append(ImagePart(len(pictures) - 1))
        if absent and not pictures:
            raise SampleError(f"{row.where}: none of its {absent} pictures is below --images")
        meta: dict[str, Any] = {"absent": absent} if absent else {}
        return sample_of([Turn("assistant", parts)], images=pictures, meta=meta, where=row.where, strip=strip)

    return each(records(path), sample)


def _mmc4(record: Mapping[str, Any], row: Row) -> list[str | Mapping[str, Any]]:
    texts = field(row, "text_list")
    before: dict[int, list[Mapping[str, Any]]] = {}
    for info in record.get("image_info") or []:
        place = info.get("matched_text_index")
        if not isinstance(place, int) or not 0 <= place < len(texts):
            raise SampleError(f"{row.where}: matched_text_index {place!r} is none of the {len(texts)} texts")
        before.setdefault(place, []).append(info)
    pieces: list[str | Mapping[str, Any]] = []
    for number, text in enumerate(texts):
        pieces += before.get(number, [])
        pieces.append(text_of(text, row.where))
    return pieces


def _obelics(row: Row) -> list[str | Mapping[str, Any]]:
    images, texts = field(row, "images"), field(row, "texts")
    if len(images) != len(texts) or any((a is None) == (b is None) for a, b in zip(images, texts, strict=True)):
        raise SampleError(f"{row.where}: images and texts must be as many, with exactly one of them at every place")
    return [text if text is not None else {"url": image} for image, text in zip(images, texts, strict=True)]


def _picture(info: Mapping[str, Any], album: Album, named: Mapping[str, str], where: str) -> Picture | None:
    if info.get("image_base64"):
        return unread(from_base64(text_of(info["image_base64"], where), where), where)
    url = info.get("url", info.get("raw_url"))
    if isinstance(url, dict | bytes):
        return album.picture(url, where)
    name = info.get("image_name") or named.get(str(url))
    if not name:
        return None
    picture = album.picture(name, where)
    return None if missing(Sample("", "", (), (picture,))) else picture
