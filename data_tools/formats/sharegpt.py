"""ShareGPT: {conversations: [{from, value}], system?, tools?, images?}, or pairs {conversation: [{human, assistant}]}.

A `function_call` is written by the model and trains; an `observation` and the list of tools do not. The tool list
stands at the end of the system message. `<image>` in a value is a picture's place where the row has images.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, field, fields, records
from data_tools.turns import (
    Said,
    conversation_of,
    pictures_named,
    place_pictures,
    refuse_media,
    refuse_unanswered,
    refuse_unwanted,
    sample_of,
    text_of,
    told_first,
    valued_turns,
)
from mmit.data.sample import Sample


def samples(
    path: Path,
    images: Path | None = None,
    *,
    strip: bool = True,
    image_prefix: str = "",
    unmarked: Literal["error", "first"] = "error",
) -> Iterator[Sample | Rejected]:
    album = Album(images, prefix=image_prefix)

    def sample(row: Row) -> Sample:
        record = fields(row)
        refuse_media(record, row.where, "video", "audio")
        refuse_unwanted(record, row.where, "label", "kto_tag")
        listed = field(row, "conversations", "conversation", "messages", "items")
        turns = _pairs(listed, row.where) or valued_turns(listed, row.where)
        refuse_unanswered(record, turns, row.where)
        names = pictures_named(record, row.where)
        # Without pictures a marker is a word: chats of the web speak of HTML.
        placed = place_pictures(turns, len(names), row.where, unmarked=unmarked, markers="text")
        return sample_of(
            told_first(placed, row.where, system=record.get("system"), tools=record.get("tools")),
            images=[album.picture(name, row.where) for name in names],
            meta={"id": record["id"]} if isinstance(record.get("id"), str | int) else {},
            where=row.where,
            strip=strip,
        )

    return each(records(path), sample)


def _pairs(value: Any, where: str) -> list[Said]:
    """The turns of [{human, assistant}, ...], or none if this is not that variant."""
    turns: list[Said] = []
    for number, pair in enumerate(conversation_of(value, where)):
        if not isinstance(pair, dict) or "assistant" not in pair or ("human" not in pair and "user" not in pair):
            return []
        here = f"{where}: turn {number}"
        turns.append(Said("user", text_of(pair.get("human", pair.get("user")), here)))
        turns.append(Said("assistant", text_of(pair["assistant"], here)))
    return turns
