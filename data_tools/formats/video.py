"""Rows that show videos (messages or LLaVA turns with `<video>`, `videos` or `video`): each becomes frames with their
times. Needs pip install av; a folder of frames named like the video is read without it.

`frames` is how many are taken, evenly over the video, from the middle of each stretch; with `fps`, so many a second and
at most `frames`. With `times`, their seconds stand as text before the frames.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.album import Album, unread
from data_tools.rows import Rejected, Row, each, field, fields, records
from data_tools.turns import Turn, pictures_named, refuse_media, sample_of, told_first, valued_turns
from mmit.config import ConfigError
from mmit.data.sample import ImagePart, Part, Picture, Sample, SampleError, TextPart, VideoPart

PICTURES = {".jpg", ".jpeg", ".png", ".webp"}


def samples(
    path: Path,
    images: Path | None = None,
    *,
    frames: int = 8,
    fps: float | None = None,
    times: bool = False,
    strip: bool = True,
) -> Iterator[Sample | Rejected]:
    if frames < 1 or (fps is not None and fps <= 0):
        raise ConfigError("video: frames must be at least 1 and fps above 0")
    album = Album(images)

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
        videos = [_frames(album, name, frames, fps, row.where) for name in names]
        if text.count("<video>") != len(videos) or text.count("<image>") != len(shown):
            raise SampleError(
                f"{row.where}: {len(videos)} videos and {len(shown)} pictures, but {text.count('<video>')} <video> and "
                f"{text.count('<image>')} <image> markers; write one for each"
            )
        pictures: list[Picture] = []
        messages = [Turn(role, _parts(said, videos, shown, pictures, times), train) for role, said, train in turns]
        messages = told_first(messages, row.where, system=record.get("system"), tools=record.get("tools"))
        meta = {"id": record["id"]} if isinstance(record.get("id"), str | int) else {}
        return sample_of(messages, images=pictures, meta=meta, where=row.where, strip=strip)

    return each(records(path), sample)


def _parts(text: str, videos: list[Any], shown: list[Any], pictures: list[Picture], times: bool) -> list[Part]:
    """The parts of one turn; videos and pictures are taken from the front of their lists as their markers come."""
    parts: list[Part] = []
    for piece in re.split("(<video>|<image>)", text):
        if piece == "<image>":
            pictures.append(shown.pop(0))
            parts.append(ImagePart(len(pictures) - 1))
        elif piece == "<video>":
            taken = videos.pop(0)
            first = len(pictures)
            pictures += [picture for picture, _ in taken]
            seconds = tuple(second for _, second in taken)
            if times:
                parts.append(TextPart("Frames at " + ", ".join(f"{second:.1f}" for second in seconds) + " s: "))
            parts.append(VideoPart(tuple(range(first, len(pictures))), seconds))
        elif piece:
            parts.append(TextPart(piece))
    return parts


def _frames(album: Album, name: Any, most: int, fps: float | None, where: str) -> list[tuple[Picture, float]]:
    place = album.picture(name, where)
    path, root = Path(place.path), Path(place.root)
    if not place.name or not path.resolve().is_relative_to(root):
        raise SampleError(f"{where}: the video {str(name)[:80]!r} must be a file or folder below --images")
    if not path.exists():
        raise SampleError(f"{where}: the video {name} is missing below {root}")
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in PICTURES]
        if not files:
            raise SampleError(f"{where}: the folder {name} holds no frames")
        rate = fps or 1.0
        chosen = _spread(len(files), most)
        return [(album.picture(str(files[n].relative_to(root)), where), n / rate) for n in chosen]
    return _decoded(path, most, fps, where)


def _decoded(file: Path, most: int, fps: float | None, where: str) -> list[tuple[Picture, float]]:
    try:
        import av  # pyright: ignore[reportMissingImports]
        from av.error import FFmpegError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("format video needs PyAV to open video files: pip install 'mmit[video]'") from None
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            # Two passes, the first without keeping a picture: headers are often wrong about length and rate.
            seconds = [float(frame.time or 0.0) for frame in container.decode(stream)]
        if not seconds:
            raise SampleError(f"{where}: {file.name} holds no frame")
        chosen = set(_spread(len(seconds), _count(seconds, most, fps)))
        kept = []
        with av.open(str(file)) as container:
            for number, frame in enumerate(container.decode(container.streams.video[0])):
                if number in chosen:
                    stream = io.BytesIO()
                    # Phones store how the video is to be turned beside the frames.
                    frame.to_image().rotate(frame.rotation, expand=True).save(stream, format="PNG")
                    kept.append((unread(stream.getvalue(), where), round(seconds[number] - seconds[0], 3)))
        return kept
    except (FFmpegError, IndexError) as error:
        raise SampleError(f"{where}: {file.name} cannot be decoded as video ({type(error).__name__})") from None


def _count(seconds: list[float], most: int, fps: float | None) -> int:
    if fps is None:
        return most
    return max(1, min(most, round((seconds[-1] - seconds[0]) * fps)))


def _spread(length: int, count: int) -> list[int]:
    """The middles of `count` equal stretches of `length` frames."""
    count = min(length, count)
    return [int((number + 0.5) * length / count) for number in range(count)]
