"""The rows of one shard: read, checked and cleaned, written into one tar, and a record that it is done."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.album import MissingPicture, develop
from data_tools.finished import WORK, read_record, record_of, shard_in, write_whole
from data_tools.holders import opened
from data_tools.looks import printed
from data_tools.plan import Settings, plain_name
from data_tools.rows import Placed, Rejected
from data_tools.turns import stripped
from mmit.data.sample import BoxPart, ImagePart, Message, Picture, Sample, SampleError, VideoPart
from mmit.data.shard_index import WrittenShard
from mmit.data.shard_writer import Stored, shard_name, stored, write_shard


@dataclass(frozen=True)
class Outcome:
    """What became of the rows of one shard."""

    number: int
    rows: int
    shard: WrittenShard | None
    rejected: tuple[Rejected, ...]
    missing: int
    """Of the rejected rows, those whose picture is missing."""
    without_pictures: int
    """Samples that lost a missing picture under `on_missing: text-only`."""


def place_of(item: Sample | Rejected, file: str, number: int) -> str:
    return item.where if isinstance(item, Placed) else f"{file} row {number}"


def one_shard(
    number: int, items: list[Sample | Rejected], file: str, source: str, settings: Settings, out: Path
) -> tuple[int, int]:
    """Writes one shard and, after it, the record that it is done; what an earlier run finished stays as it is.

    How many rows it had, and how many of them are rejected.
    """
    if (done := recorded(out, number)) is not None:
        return done.rows, len(done.rejected)
    rejected: list[Rejected] = []
    lost = absent = 0
    name = plain_name(source) or "row"

    def good() -> Iterator[Stored]:
        nonlocal lost, absent
        for offset, item in enumerate(items):
            row = number * settings.rows_per_shard + offset
            if isinstance(item, Rejected):
                rejected.append(item)
                continue
            where = place_of(item, file, row)
            try:
                sample, fewer = _ready(item, f"{name}-{row:09d}", source, where, settings)
            except SampleError as error:
                placed = item if isinstance(item, Placed) else Placed("", "", (), file=file, row=row, name=item.key)
                rejected.append(Rejected(placed.file, placed.row, placed.name, str(error)))
                absent += isinstance(error, MissingPicture)
                continue
            lost += fewer
            yield sample

    shard = write_shard(out / shard_name(number), good())
    if not shard.rows:
        (out / shard_name(number)).unlink()
        shard = None
    outcome = Outcome(number, len(items), shard, tuple(rejected), absent, lost)
    write_whole(out / WORK / f"{number:06d}.json", json.dumps(_record(outcome)))
    return outcome.rows, len(rejected)


def _ready(item: Sample, key: str, source: str, where: str, settings: Settings) -> tuple[Stored, bool]:
    """The sample with its pictures, as it will be stored; and whether it lost one that is missing."""
    item = opened(item)
    boxed = {part.image for said in item.messages for part in said.parts if isinstance(part, BoxPart)}
    pictures: list[Picture | None] = []
    for number, picture in enumerate(item.images):
        try:
            pictures.append(
                develop(
                    picture,
                    where,
                    decode_pixels=settings.decode,
                    keep_metadata=settings.keep_metadata,
                    window=settings.window,
                    look=printed if settings.prints else None,
                    boxed=number in boxed,
                )
            )
        except MissingPicture:
            if settings.on_missing != "text-only":
                raise
            pictures.append(None)
    meta = dict(item.meta) | ({"key": item.key} if item.key else {})
    kept = tuple([picture for picture in pictures if picture is not None])
    fewer = len(kept) < len(pictures)
    messages = _without(item.messages, pictures, where) if fewer else item.messages
    ready = stored(Sample(key, item.source or source, messages, kept, meta), where)
    if boxed:
        _check_boxes(ready.sample, where)
    return ready, fewer


def _check_boxes(sample: Sample, where: str) -> None:
    """Corners read as width and height, or boxes of another size of the picture, would else be clipped silently.

    Real boxes reach a little over the edge; a tenth of the side is no accident.
    """
    for part in (part for item in sample.messages for part in item.parts if isinstance(part, BoxPart)):
        shown = sample.images[part.image]
        across = max(-part.left, part.right - shown.width) / shown.width
        down = max(-part.top, part.bottom - shown.height) / shown.height
        if max(across, down) > 0.1:
            raise SampleError(
                f"{where}: the box [{part.left:g}, {part.top:g}, {part.right:g}, {part.bottom:g}] reaches out of its "
                f"picture of {shown.width} x {shown.height}; are its numbers corners, or of another size of it?"
            )


def _without(said: Sequence[Message], pictures: Sequence[Picture | None], where: str) -> tuple[Message, ...]:
    """The messages without the parts that show a picture that is None."""
    number = {old: new for new, old in enumerate(n for n, picture in enumerate(pictures) if picture is not None)}
    messages = []
    for item in said:
        parts = []
        for part in item.parts:
            match part:
                case ImagePart(image):
                    parts += [ImagePart(number[image])] if image in number else []
                case BoxPart(image) if image not in number:
                    raise SampleError(f"{where}: speaks of a place in a missing picture; leave the row out")
                case BoxPart():
                    parts.append(replace(part, image=number[part.image]))
                case VideoPart(frames, seconds):
                    there = [(number[f], second) for f, second in zip(frames, seconds, strict=True) if f in number]
                    parts += [VideoPart(tuple(f for f, _ in there), tuple(s for _, s in there))] if there else []
                case _:
                    parts.append(part)
        messages.append(replace(item, parts=stripped(parts)))
    if not any(item.train and item.parts for item in messages):
        raise SampleError(f"{where}: without its missing pictures no answer is left")
    return tuple(messages)


def _record(outcome: Outcome) -> dict[str, Any]:
    return vars(outcome) | {
        "shard": record_of(outcome.shard) if outcome.shard is not None else None,
        "rejected": [asdict(item) for item in outcome.rejected],
    }


def recorded(out: Path, number: int) -> Outcome | None:
    """The outcome of a shard that an earlier run finished and that still has its size."""
    record = read_record(out / WORK / f"{number:06d}.json")
    if record is None:
        return None
    shard = shard_in(out, record["shard"]) if record["shard"] is not None else None
    if shard is None and record["shard"] is not None:
        return None
    rejected = tuple(Rejected(**item) for item in record["rejected"])
    return Outcome(**record | {"shard": shard, "rejected": rejected})
