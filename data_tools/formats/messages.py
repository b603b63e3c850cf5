"""OpenAI messages and their relatives: TRL, xtuner, LLaMA-Factory v1, Anthropic blocks, axolotl.

A row is {messages: [{role, content}], images?, tools?}, {prompt, completion, images?}, or the bare list of messages.
Content is a text or a list of parts. A part may hold its picture (`image_url`, `source`, `path`, ...) or only mark its
place; then the row's `images` are used in order. Which texts hold markers is an option, because most hold none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_tools.album import Album, from_base64
from data_tools.rows import Rejected, Row, each, fields, records
from data_tools.turns import (
    Turn,
    call_of,
    called,
    conversation_of,
    first_shown,
    pictures_named,
    refuse_media,
    refuse_unwanted,
    role_of,
    sample_of,
    text_of,
    told_first,
    trained,
)
from mmit.data.sample import ImagePart, Part, Picture, Role, Sample, SampleError, TextPart

PICTURE_TYPES = ("image", "image_url", "input_image", "img")
TEXT_TYPES = ("text", "input_text", "output_text")


def samples(
    path: Path,
    images: Path | None = None,
    *,
    strip: bool = True,
    image_prefix: str = "",
    marker: str | None = "<image>",
    marked: Literal["row", "part"] = "row",
    unmarked: Literal["error", "first"] = "error",
) -> Iterator[Sample | Rejected]:
    """`marked="row"`: markers in texts are the places of the row's `images`; `"part"`: of the picture parts of the same
    message (xtuner). `unmarked="first"`: pictures without any place stand before the first user turn (TRL)."""
    album = Album(images, prefix=image_prefix)

    def sample(row: Row) -> Sample:
        record = {"messages": row.record} if isinstance(row.record, list) else fields(row)
        turns, pictures = parts_of_row(record, row.where, album, marker=marker, marked=marked, unmarked=unmarked)
        meta = {key: record[key] for key in ("id", "source", "channel") if isinstance(record.get(key), str | int)}
        return sample_of(turns, images=pictures, meta=meta, where=row.where, strip=strip)

    return each(records(path), sample)


def parts_of_row(
    record: Mapping[str, Any],
    where: str,
    album: Album,
    *,
    marker: str | None = "<image>",
    marked: Literal["row", "part"] = "row",
    unmarked: Literal["error", "first"] = "error",
) -> tuple[list[Turn], list[Picture]]:
    """The turns of a row with its pictures in the order of their places."""
    refuse_media(record, where, "video", "audio")
    refuse_unwanted(record, where, "label")
    names = pictures_named(record, where)
    reader = _Reader(album, where, names, marker, marked)
    turns = [reader.turn(item, number) for number, item in enumerate(_messages(record, where))]
    turns = told_first(turns, where, system=record.get("system"), tools=record.get("tools") or record.get("functions"))
    if reader.used < len(names):
        if reader.used or unmarked == "error":
            raise SampleError(
                f"{where}: {len(names)} pictures but {reader.used} places for them; write one place (an image part"
                f"{f' or {marker}' if marker else ''}) for each, or set unmarked=first to put them before the first "
                f"user turn"
            )
        turns = first_shown(turns, reader.pictures_of(names), where)
    return turns, reader.pictures


def _messages(record: Any, where: str) -> list[Any]:
    for key in ("messages", "conversations", "conversation", "chat"):
        if record.get(key) is not None:
            return conversation_of(record[key], where)
    if record.get("prompt") is not None and record.get("completion") is not None:
        asked, answered = record["prompt"], record["completion"]
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else conversation_of(asked, where)
        if isinstance(answered, str):
            return [*asked, {"role": "assistant", "content": answered}]
        return [*asked, *conversation_of(answered, where)]
    raise SampleError(f"{where}: no messages and no prompt with completion; the row has {', '.join(map(str, record))}")


@dataclass
class _Reader:
    """Reads the messages of one row, numbering its pictures in the order of their places."""

    album: Album
    where: str
    names: list[Any]
    marker: str | None
    marked: Literal["row", "part"]
    pictures: list[Picture] = field(default_factory=list)
    used: int = 0
    """How many of the row's `images` have found their place."""

    def turn(self, item: Any, number: int) -> Turn:
        here = f"{self.where}: message {number}"
        if not isinstance(item, dict):
            raise SampleError(f"{here}: expected an object with role and content, found {str(item)[:60]!r}")
        name = item.get("role", item.get("from"))
        role: Role = "assistant" if name == "pretrain" else role_of(name, here)
        content = item.get("content", item.get("value"))
        if isinstance(content, str):
            parts = self.marked_text(content, here) if self.marked == "row" else [TextPart(text_of(content, here))]
        elif content is None:
            parts = []
        else:
            parts = self.listed(content, here)
        calls = called(item, here)
        if calls:
            parts.append(TextPart(f"\n{calls}" if parts else calls))
        return Turn(role, parts, trained(item, role, here))

    def listed(self, content: Any, here: str) -> list[Part]:
        if not isinstance(content, list):
            raise SampleError(f"{here}: content is a {type(content).__name__}; write a text or a list of parts")
        parts: list[Part] = []
        for number, item in enumerate(content):
            place = f"{here} part {number}"
            if isinstance(item, str):
                parts.append(TextPart(text_of(item, place)))
                continue
            if not isinstance(item, dict):
                raise SampleError(f"{place}: expected a part with a type, found {str(item)[:60]!r}")
            kind = item.get("type") or next((key for key in (*TEXT_TYPES, *PICTURE_TYPES) if item.get(key)), None)
            if kind in TEXT_TYPES:
                said = next(
                    (item[key] for key in ("text", "value", "content", kind) if item.get(key) is not None), None
                )
                parts.append(TextPart(text_of(said, place)))
            elif kind in PICTURE_TYPES:
                parts.append(self.picture(item, place))
            elif kind == "tool_use":
                parts.append(TextPart(call_of(text_of(item.get("name"), place), item.get("input"))))
            elif kind == "tool_result":
                parts += (
                    self.listed(item["content"], place)
                    if isinstance(item.get("content"), list)
                    else [TextPart(text_of(item.get("content") or "", place))]
                )
            else:
                raise SampleError(f"{place}: type {kind!r} is not read here; write text or image parts")
        return self.moved_to_markers(parts, here) if self.marked == "part" else parts

    def picture(self, item: dict[str, Any], place: str) -> ImagePart:
        """The picture that a part holds, or the next of the row's when it only marks the place."""
        found = next((item[k] for k in ("image_url", "image", "url", "path", "value", "img") if item.get(k)), None)
        if isinstance(found, dict) and "url" in found:
            found = found["url"]
        if item.get("base64"):
            found = from_base64(text_of(item["base64"], place), place)
        source = item.get("source")
        if isinstance(source, dict):
            found = from_base64(text_of(source["data"], place), place) if source.get("data") else source.get("url")
        if found is None:
            if self.used >= len(self.names):
                raise SampleError(
                    f"{place}: the place of picture {self.used}, but the row has {len(self.names)} images"
                )
            found = self.names[self.used]
            self.used += 1
        self.pictures.append(self.album.picture(found, place))
        return ImagePart(len(self.pictures) - 1)

    def pictures_of(self, names: list[Any]) -> list[Part]:
        self.pictures = [self.album.picture(name, self.where) for name in names]
        return [ImagePart(number) for number in range(len(names))]

    def marked_text(self, text: str, here: str) -> list[Part]:
        """A text in which markers are the places of the row's images; a word like any other when it has none."""
        text = text_of(text, here)
        if not self.marker or not self.names or self.marker not in text:
            return [TextPart(text)] if text else []
        parts: list[Part] = []
        for number, piece in enumerate(text.split(self.marker)):
            if number:
                parts.append(self.picture({}, here))
            if piece:
                parts.append(TextPart(piece))
        return parts

    def moved_to_markers(self, parts: list[Part], here: str) -> list[Part]:
        """The message's pictures moved to its markers, in order."""
        assert self.marker is not None
        pictures = [part for part in parts if isinstance(part, ImagePart)]
        count = sum(part.text.count(self.marker) for part in parts if isinstance(part, TextPart))
        if count != len(pictures):
            raise SampleError(f"{here}: {len(pictures)} pictures but {count} {self.marker} markers; write one for each")
        moved: list[Part] = []
        waiting = iter(pictures)
        for part in parts:
            if not isinstance(part, TextPart):
                continue
            for number, piece in enumerate(part.text.split(self.marker)):
                moved += [next(waiting)] if number else []
                moved += [TextPart(piece)] if piece else []
        return moved
