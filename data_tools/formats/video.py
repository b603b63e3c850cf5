"""Rows that show videos (messages or LLaVA turns with `<video>`, `videos` or `video`): each becomes frames with their
times. Needs pip install av; a folder of frames named like the video is read without it.

`frames` is how many are taken, evenly over the video, from the middle of each stretch; with `fps`, so many a second and
at most `frames`. With `times`, their seconds stand as text before the frames.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data_tools.album import Album, Unread
from data_tools.clips import Clip, Filming, clip_of
from data_tools.rows import Rejected, Row, each, field, fields, records
from data_tools.turns import Turn, pictures_named, refuse_media, sample_of, told_first, valued_turns
from mmit.data.sample import ImagePart, Part, Picture, Sample, SampleError, TextPart, VideoPart


def samples(
    path: Path,
    images: Path | None = None,
    *,
    frames: int = 8,
    fps: float | None = None,
    times: bool = False,
    strip: bool = True,
    image_prefix: str = "",
) -> Iterator[Sample | Rejected]:
    album = Album(images, prefix=image_prefix)
    filming = Filming(frames, fps, times)

    def sample(row: Row) -> Sample:
        record = fields(row)
        refuse_media(record, row.where, "audio")
        turns = valued_turns(field(row, "messages", "conversations"), row.where)
        names = pictures_named(record, row.where, kind="video")
        shown = [album.picture(name, row.where) for name in pictures_named(record, row.where)]
        text = "".join(turn.text for turn in turns)
        if "<video>" not in text and not shown and text.count("<image>") == len(names):
            # LLaVA-Video marks its videos so.
            turns = [turn._replace(text=turn.text.replace("<image>", "<video>")) for turn in turns]
            text = text.replace("<image>", "<video>")
        videos = [clip_of(album, name, row.where, filming) for name in names]
        if text.count("<video>") != len(videos) or text.count("<image>") != len(shown):
            raise SampleError(
                f"{row.where}: {len(videos)} videos and {len(shown)} pictures, but {text.count('<video>')} <video> and "
                f"{text.count('<image>')} <image> markers; write one for each"
            )
        pictures: list[Picture] = []
        messages = [Turn(role, _parts(said, videos, shown, pictures), train) for role, said, train in turns]
        messages = told_first(messages, row.where, system=record.get("system"), tools=record.get("tools"))
        meta = {"id": record["id"]} if isinstance(record.get("id"), str | int) else {}
        return sample_of(messages, images=pictures, meta=meta, where=row.where, strip=strip)

    return each(records(path), sample)


def _parts(text: str, videos: list[Clip], shown: list[Unread], pictures: list[Picture]) -> list[Part]:
    """The parts of one turn; videos and pictures are taken from the front of their lists as their markers come."""
    parts: list[Part] = []
    for piece in re.split("(<video>|<image>)", text):
        if piece == "<image>":
            pictures.append(shown.pop(0))
            parts.append(ImagePart(len(pictures) - 1))
        elif piece == "<video>":
            pictures.append(videos.pop(0))
            parts.append(VideoPart((len(pictures) - 1,), (0.0,)))
        elif piece:
            parts.append(TextPart(piece))
    return parts
