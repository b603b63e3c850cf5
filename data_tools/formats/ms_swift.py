"""ms-swift: {messages: [{role, content, loss?}], images?, objects: {ref, bbox, bbox_type?, image_id?}?, tools?, ...} or
the older {query, response, system?, history?, images?}, also under the other names ms-swift accepts.

`<image>`, `<video>`, `<ref-object>` and `<bbox>` in a text are the places of images, videos, names and boxes, in order.
Boxes become typed parts in pixels of their picture, videos become frames (see the format video).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.album import Album, Unread, read
from data_tools.clips import Filming, clip_of
from data_tools.rows import Rejected, Row, each, fields, records
from data_tools.turns import (
    Said,
    Turn,
    box,
    conversation_of,
    pictures_named,
    refuse_media,
    refuse_unwanted,
    sample_of,
    text_of,
    told_first,
    valued_turns,
)
from mmit.data.images import size_of
from mmit.data.sample import BoxPart, ImagePart, Part, Sample, SampleError, TextPart, VideoPart

QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = (
    *("response", "answer", "output", "targets", "target", "answer_key", "answers", "solution"),
    *("text", "completion", "content"),
)
MESSAGES = ("messages", "conversations", "conversation")
MARKERS = re.compile(r"(<image>|<video>|<ref-object>|<bbox>)")


def samples(
    path: Path,
    images: Path | None = None,
    *,
    strip: bool = True,
    image_prefix: str = "",
    frames: int = 8,
    fps: float | None = None,
    times: bool = False,
) -> Iterator[Sample | Rejected]:
    album = Album(images, prefix=image_prefix)
    filming = Filming(frames, fps, times)

    def sample(row: Row) -> Sample:
        record = fields(row)
        refuse_media(record, row.where, "audio")
        refuse_unwanted(record, row.where, "label")
        said = _turns(record, row.where)
        pictures = [album.picture(name, row.where) for name in pictures_named(record, row.where)]
        clips = [clip_of(album, name, row.where, filming) for name in pictures_named(record, row.where, kind="video")]
        first = len(pictures)
        queue = {
            "<image>": [ImagePart(number) for number in range(first)],
            "<video>": [VideoPart((number,), (0.0,)) for number in range(first, first + len(clips))],
            **_objects(record.get("objects"), pictures, row.where),
        }
        waiting = {marker: list(reversed(parts)) for marker, parts in queue.items()}
        unmarked = not any("<image>" in text for _, text, _ in said)
        turns = []
        for role, text, train in said:
            parts: list[Part] = []
            if unmarked and role == "user":
                parts += [waiting["<image>"].pop() for _ in range(len(waiting["<image>"]))]
            for piece in MARKERS.split(text):
                if not queue.get(piece):
                    parts += [TextPart(piece)] if piece else []
                elif waiting[piece]:
                    parts.append(waiting[piece].pop())
                else:
                    raise SampleError(f"{row.where}: more {piece} markers than the {len(queue[piece])} of the row")
            turns.append(Turn(role, parts, train))
        for marker, left in waiting.items():
            if left:
                raise SampleError(f"{row.where}: {len(left)} of {len(queue[marker])} have no {marker} marker")
        system = record.get("system") or record.get("system_prompt")
        turns = told_first(turns, row.where, system=system, tools=record.get("tools"))
        keys = ("id", "channel", "label", "rejected_response")
        meta = {key: record[key] for key in keys if isinstance(record.get(key), str | int)}
        return sample_of(turns, images=[*pictures, *clips], meta=meta, where=row.where, strip=strip)

    return each(records(path), sample)


def _turns(record: Mapping[str, Any], where: str) -> list[Said]:
    listed = next((record[key] for key in MESSAGES if record.get(key) is not None), None)
    if listed is not None:
        return valued_turns(listed, where)
    turns: list[Said] = []
    for question, reply in conversation_of(record["history"], where) if record.get("history") else []:
        turns += [Said("user", text_of(question, where)), Said("assistant", text_of(reply, where))]
    asked = {key: text_of(record[key], where) for key in QUERY if record.get(key) is not None}
    if asked.keys() == {"instruction", "input"}:
        asked = {"query": "\n".join(text for text in (asked["instruction"], asked["input"]) if text)}
    answers = {key: record[key] for key in RESPONSE if record.get(key) is not None}
    if not answers:
        raise SampleError(f"{where}: no messages and no response; the row has {', '.join(record)}")
    if asked:
        turns.append(Said("user", _only(asked, "query", where)))
    return [*turns, Said("assistant", text_of(_only(answers, "response", where), where))]


def _only(found: Mapping[str, Any], name: str, where: str) -> Any:
    """The value under the name itself, else under the one other name that the row has for it."""
    if name not in found and len(found) > 1:
        raise SampleError(f"{where}: {', '.join(found)} could each be the {name}; call the one that is meant so")
    return found.get(name, next(iter(found.values())))


def _objects(objects: Any, pictures: list[Unread], where: str) -> dict[str, list[Part]]:
    if not objects:
        return {}
    if not isinstance(objects, dict):
        raise SampleError(f"{where}: objects is a {type(objects).__name__}; write {{ref: [...], bbox: [...]}}")
    boxes = objects.get("bbox") or []
    numbers = objects.get("image_id") or [0] * len(boxes)
    if len(numbers) != len(boxes):
        raise SampleError(f"{where}: {len(boxes)} boxes but {len(numbers)} numbers in image_id; write one for each")
    placed: list[Part] = [
        _box(value, number, objects.get("bbox_type", "real"), pictures, where)
        for value, number in zip(boxes, numbers, strict=True)
    ]
    return {"<ref-object>": [TextPart(text_of(text, where)) for text in objects.get("ref") or []], "<bbox>": placed}


def _box(value: Any, number: int, kind: str, pictures: list[Unread], where: str) -> BoxPart:
    if not isinstance(value, list) or len(value) != 4 or not 0 <= number < len(pictures):
        raise SampleError(f"{where}: the box {value} of image {number} is not [x1, y1, x2, y2] of one of the images")
    scale = {"real": (1.0, 1.0), "norm1000": (1000.0, 1000.0), "norm1": (1.0, 1.0)}.get(kind)
    if scale is None:
        raise SampleError(f"{where}: bbox_type {kind!r} is unknown; write real, norm1 or norm1000")
    width = height = 1
    if kind != "real":
        width, height = size_of(read(pictures[number]), where)
    left, top, right, bottom = (float(v) for v in value)
    return box(
        number,
        left * width / scale[0],
        top * height / scale[1],
        right * width / scale[0],
        bottom * height / scale[1],
        where,
    )
