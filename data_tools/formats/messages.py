"""OpenAI messages and their relatives: TRL, xtuner, LLaMA-Factory v1, Anthropic blocks, axolotl.

A row is {messages: [{role, content}], images?, tools?}, {prompt, completion, images?}, or the bare list of messages.
Content is a text or a list of parts. A part may hold its picture (`image_url`, `source`, `path`, ...) or only mark its
place; then the row's `images` are used in order. Which texts hold markers is an option, because most hold none.
Videos go the same ways (`video_url`, `videos`) and become frames: see the format video for `frames`, `fps`, `times`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_tools.album import Album, from_base64
from data_tools.clips import Filming, clip_of
from data_tools.rows import Rejected, Row, each, fields, records
from data_tools.turns import (
    Turn,
    call_of,
    called,
    conversation_of,
    first_shown,
    pictures_named,
    refuse_media,
    refuse_unanswered,
    refuse_unwanted,
    role_of,
    sample_of,
    text_of,
    told_first,
    trained,
)
from mmit.data.sample import ImagePart, Part, Picture, Role, Sample, SampleError, TextPart, VideoPart

PICTURE_TYPES = ("image", "image_url", "input_image", "img")
VIDEO_TYPES = ("video", "video_url", "input_video")
TEXT_TYPES = ("text", "input_text", "output_text")


def samples(
    path: Path,
    images: Path | None = None,
    *,
    strip: bool = True,
    image_prefix: str = "",
    marker: str | None = "<image>",
    video_marker: str | None = "<video>",
    marked: Literal["row", "part"] = "row",
    unmarked: Literal["error", "first"] = "error",
    frames: int = 8,
    fps: float | None = None,
    times: bool = False,
) -> Iterator[Sample | Rejected]:
    """`marked="row"`: markers in texts are the places of the row's `images` and `videos`; `"part"`: of the picture and
    video parts of the same message (xtuner). `unmarked="first"`: pictures without any place stand before the first user
    turn (TRL)."""
    album = Album(images, prefix=image_prefix)
    places = Places(marker, video_marker, marked, unmarked, Filming(frames, fps, times))

    def sample(row: Row) -> Sample:
        record = {"messages": row.record} if isinstance(row.record, list) else fields(row)
        turns, pictures = parts_of_row(record, row.where, album, places)
        meta = {key: record[key] for key in ("id", "source", "channel") if isinstance(record.get(key), str | int)}
        return sample_of(turns, images=pictures, meta=meta, where=row.where, strip=strip)

    return each(records(path), sample)


@dataclass(frozen=True)
class Places:
    """How texts say where pictures and videos belong, and which frames are taken; as the options of `samples`."""

    marker: str | None = "<image>"
    video_marker: str | None = "<video>"
    marked: Literal["row", "part"] = "row"
    unmarked: Literal["error", "first"] = "error"
    filming: Filming = field(default_factory=Filming)


def parts_of_row(
    record: Mapping[str, Any], where: str, album: Album, places: Places = Places()
) -> tuple[list[Turn], list[Picture]]:
    """The turns of a row with its pictures in the order of their places."""
    refuse_media(record, where, "audio")
    refuse_unwanted(record, where, "label", "kto_tag")
    names = {kind: pictures_named(record, where, kind=kind) for kind in ("image", "video")}
    reader = _Reader(album, where, names, places)
    turns = [reader.turn(item, number) for number, item in enumerate(_messages(record, where))]
    refuse_unanswered(record, turns, where)
    turns = told_first(turns, where, system=record.get("system"), tools=record.get("tools") or record.get("functions"))
    for kind, marker in (("video", places.video_marker), ("image", places.marker)):
        named, used = len(names[kind]), reader.used[kind]
        if used == named:
            continue
        if used or places.unmarked == "error" or kind == "video":
            what = "pictures" if kind == "image" else "videos"
            first = ", or set unmarked=first to put them before the first user turn" if kind == "image" else ""
            raise SampleError(
                f"{where}: {named} {what} but {used} places for them; write one place (an {kind} part"
                f"{f' or {marker}' if marker else ''}) for each{first}"
            )
        turns = first_shown(turns, [reader.place({}, kind, where) for _ in range(named)], where)
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
    names: Mapping[str, list[Any]]
    """The row's own `image`s and `video`s."""
    places: Places
    pictures: list[Picture] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)
    """How many of the row's own have found their place, of each kind."""

    def turn(self, item: Any, number: int) -> Turn:
        here = f"{self.where}: message {number}"
        if not isinstance(item, dict):
            raise SampleError(f"{here}: expected an object with role and content, found {str(item)[:60]!r}")
        name = item.get("role") or item.get("from")
        role: Role = "assistant" if name == "pretrain" else role_of(name, here)
        content = next((item[key] for key in ("content", "value") if item.get(key) is not None), None)
        calls = called(item, here)
        if isinstance(content, str):
            parts = (
                self.marked_text(content, here) if self.places.marked == "row" else [TextPart(text_of(content, here))]
            )
        elif content is not None:
            parts = self.listed(content, here)
        elif calls:
            parts = []
        else:
            raise SampleError(f"{here}: no content; the turn has {', '.join(map(str, item)) or 'no fields'}")
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
            kind = item.get("type") or next(
                (key for key in (*TEXT_TYPES, *PICTURE_TYPES, *VIDEO_TYPES) if item.get(key)), None
            )
            if kind in TEXT_TYPES:
                said = next(
                    (item[key] for key in ("text", "value", "content", kind) if item.get(key) is not None), None
                )
                parts.append(TextPart(text_of(said, place)))
            elif kind in PICTURE_TYPES:
                parts.append(self.place(item, "image", place))
            elif kind in VIDEO_TYPES:
                parts.append(self.place(item, "video", place))
            elif kind == "tool_use":
                parts.append(TextPart(call_of(text_of(item.get("name"), place), item.get("input"))))
            elif kind == "tool_result":
                parts += (
                    self.listed(item["content"], place)
                    if isinstance(item.get("content"), list)
                    else [TextPart(text_of(item.get("content") or "", place))]
                )
            else:
                raise SampleError(f"{place}: type {kind!r} is not read here; write text, image or video parts")
        return self.moved_to_markers(parts, here) if self.places.marked == "part" else parts

    def place(self, item: dict[str, Any], kind: str, place: str) -> Part:
        """The picture or video that a part holds, or the next of the row's when it only marks the place."""
        found = self.picture(item, place) if kind == "image" else self.clip(item, place)
        if found is None:
            names, used = self.names[kind], self.used[kind]
            if used >= len(names):
                what = "picture" if kind == "image" else kind
                raise SampleError(f"{place}: the place of {what} {used}, but the row has {len(names)} {kind}s")
            self.used[kind] += 1
            if kind == "image":
                found = self.album.picture(names[used], place)
            else:
                found = clip_of(self.album, names[used], place, self.places.filming)
        self.pictures.append(found)
        number = len(self.pictures) - 1
        return ImagePart(number) if kind == "image" else VideoPart((number,), (0.0,))

    def picture(self, item: dict[str, Any], place: str) -> Picture | None:
        found = next((item[k] for k in ("image_url", "image", "url", "path", "value", "img") if item.get(k)), None)
        if isinstance(found, dict) and "url" in found:
            found = found["url"]
        if item.get("base64"):
            found = from_base64(text_of(item["base64"], place), place)
        source = item.get("source")
        if isinstance(source, dict):
            found = from_base64(text_of(source["data"], place), place) if source.get("data") else source.get("url")
        return None if found is None else self.album.picture(found, place)

    def clip(self, item: dict[str, Any], place: str) -> Picture | None:
        found = next((item[k] for k in ("video_url", "video", "url", "path", "value") if item.get(k)), None)
        if found is None:
            return None
        told = {**item, **found} if isinstance(found, dict) else item
        for key in ("video_start", "video_end"):
            if told.get(key) is not None:
                raise SampleError(
                    f"{place}: shows a stretch of a video ({key}), which is not read; cut the file itself"
                )
        return clip_of(self.album, found, place, self.places.filming, rate=told.get("processed_fps"))

    def marked_text(self, text: str, here: str) -> list[Part]:
        """A text in which markers are the places of the row's own; words like any other when it has none."""
        text = text_of(text, here)
        kinds = {self.places.marker: "image", self.places.video_marker: "video"}
        kinds = {marker: kind for marker, kind in kinds.items() if marker and self.names[kind] and marker in text}
        parts: list[Part] = []
        for piece in _split(text, kinds):
            parts.append(self.place({}, kinds[piece], here) if piece in kinds else TextPart(piece))
        return parts

    def moved_to_markers(self, parts: list[Part], here: str) -> list[Part]:
        """The message's pictures and videos moved to its markers, in order."""
        shown = {
            self.places.marker: [part for part in parts if isinstance(part, ImagePart)],
            self.places.video_marker: [part for part in parts if isinstance(part, VideoPart)],
        }
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        for marker, found in shown.items():
            count = sum(text.count(marker) for text in texts) if marker else 0
            if count != len(found):
                what = "pictures" if marker == self.places.marker else "videos"
                raise SampleError(f"{here}: {len(found)} {what} but {count} {marker} markers; write one for each")
        waiting = {marker: iter(found) for marker, found in shown.items()}
        pieces = (piece for text in texts for piece in _split(text, shown))
        return [next(waiting[piece]) if piece in waiting else TextPart(piece) for piece in pieces]


def _split(text: str, markers: Iterable[str | None]) -> list[str]:
    """The text cut at the markers, which stay as pieces of their own."""
    known = "|".join(re.escape(marker) for marker in markers if marker)
    return [piece for piece in re.split(f"({known})", text) if piece] if known else [text] if text else []
