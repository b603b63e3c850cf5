"""ms-swift: {messages: [{role, content, loss?}], images?, objects: {ref, bbox, bbox_type?, image_id?}?, tools?, ...} or
the older {query, response, system?, history?, images?}, also under the other names ms-swift accepts.

`<image>`, `<ref-object>` and `<bbox>` in a text are the places of images, names and boxes, in order. Boxes become typed
parts in pixels of their picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.album import Album, Unread, read
from data_tools.rows import Rejected, Row, each, fields, records
from data_tools.turns import Turn, box, conversation_of, names_of, role_of, sample_of, text_of
from mmit.data.images import size_of
from mmit.data.sample import BoxPart, ImagePart, Part, Role, Sample, SampleError, TextPart

QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = ("response", "answer", "output", "targets", "target", "answers", "solution", "text", "completion", "content")
MARKERS = re.compile(r"(<image>|<ref-object>|<bbox>)")


def samples(
    path: Path, images: Path | None = None, *, strip: bool = True, image_prefix: str = ""
) -> Iterator[Sample | Rejected]:
    album = Album(images, prefix=image_prefix)

    def sample(row: Row) -> Sample:
        record = fields(row)
        for key in ("videos", "audios"):
            if names_of(record.get(key), row.where):
                raise SampleError(f"{row.where}: the row has {key}; only texts and images are read here")
        said = _turns(record, row.where)
        pictures = [album.picture(name, row.where) for name in names_of(record.get("images"), row.where)]
        queue = {
            "<image>": [ImagePart(number) for number in range(len(pictures))],
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
        meta = {key: record[key] for key in ("id", "channel", "label") if isinstance(record.get(key), str | int)}
        return sample_of(turns, images=pictures, meta=meta, where=row.where, strip=strip)

    return each(records(path), sample)


def _turns(record: Mapping[str, Any], where: str) -> list[tuple[Role, str, bool | None]]:
    turns: list[tuple[Role, str, bool | None]] = []
    if record.get("system"):
        turns.append(("system", text_of(record["system"], where), None))
    if record.get("messages") is not None:
        for number, item in enumerate(conversation_of(record["messages"], where)):
            here = f"{where}: message {number}"
            if not isinstance(item, dict):
                raise SampleError(f"{here}: expected an object with role and content, found {str(item)[:60]!r}")
            role = role_of(item.get("role"), here)
            weight = item.get("loss", item.get("loss_scale"))
            if weight not in (None, 0, 1):
                raise SampleError(f"{here}: loss_scale {weight} is between off and on; write 0 or 1")
            train = bool(weight) if weight is not None and role == "assistant" else None
            turns.append((role, text_of(item.get("content"), here), train))
        return turns
    for question, reply in record.get("history") or []:
        turns.append(("user", text_of(question, where), None))
        turns.append(("assistant", text_of(reply, where), None))
    asked = next((record[key] for key in QUERY if record.get(key) is not None), None)
    answered = next((record[key] for key in RESPONSE if record.get(key) is not None), None)
    if answered is None:
        raise SampleError(f"{where}: no messages and no response; the row has {', '.join(record)}")
    if asked is not None:
        turns.append(("user", text_of(asked, where), None))
    turns.append(("assistant", text_of(answered, where), None))
    return turns


def _objects(objects: Any, pictures: list[Unread], where: str) -> dict[str, list[Part]]:
    if not objects:
        return {}
    if not isinstance(objects, dict):
        raise SampleError(f"{where}: objects is a {type(objects).__name__}; write {{ref: [...], bbox: [...]}}")
    boxes = objects.get("bbox") or []
    numbers = objects.get("image_id") or [0] * len(boxes)
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
