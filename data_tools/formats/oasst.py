"""OpenAssistant: trees ({prompt: {text, role, replies: [...]}}, one a line) or flat messages with parent_id.

One sample a tree: from the first prompt always to the best reply (lowest `rank`, then the file's order) until no reply
is left; a question at the end that nobody answered goes. Deleted and rejected messages and, with `lang`, those of other
languages are not gone through. A flat message whose parent is not in the file is rejected with what hangs on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.rows import Rejected, Row, each, fields, records
from data_tools.turns import refuse_media, role_of, said, sample_of, text_of
from mmit.data.sample import Sample, SampleError


def samples(
    path: Path, images: Path | None = None, *, strip: bool = True, lang: str = ""
) -> Iterator[Sample | Rejected]:
    del images

    def sample(row: Row) -> Sample:
        record = fields(row)
        refuse_media(record, row.where, "image", "video", "audio")
        message = record.get("prompt")
        if not isinstance(message, dict):
            raise SampleError(f"{row.where}: no prompt with replies; the row has {', '.join(record)}")
        if not _usable(message, lang):
            asked = f" or not in {lang}" if lang else ""
            raise SampleError(f"{row.where}: its first prompt is deleted, rejected by reviewers{asked}")
        turns = []
        while message is not None:
            turns.append(said(role_of(message.get("role"), row.where), text_of(message.get("text"), row.where)))
            message = _best(message.get("replies") or [], lang)
        while turns and turns[-1].role == "user":
            turns.pop()
        meta = {"id": record["message_tree_id"]} if isinstance(record.get("message_tree_id"), str) else {}
        return sample_of(turns, meta=meta, where=row.where, strip=strip)

    return each(_trees(records(path)), sample)


def _usable(message: Mapping[str, Any], lang: str) -> bool:
    return (
        not message.get("deleted") and message.get("review_result") is not False and lang in ("", message.get("lang"))
    )


def _best(replies: list[Mapping[str, Any]], lang: str) -> Mapping[str, Any] | None:
    usable = [reply for reply in replies if _usable(reply, lang)]
    return min(usable, key=lambda reply: reply["rank"] if reply.get("rank") is not None else 10**6, default=None)


def _trees(rows: Iterator[Row | Rejected]) -> Iterator[Row | Rejected]:
    """Rows that are trees as they are; flat messages gathered into trees, in the order of their first messages."""
    messages: dict[Any, Row] = {}
    for row in rows:
        if isinstance(row, Rejected) or not isinstance(row.record, dict) or "parent_id" not in row.record:
            yield row
            continue
        name = row.record.get("message_id")
        if not isinstance(name, str) or name in messages:
            yield Rejected(
                row.file, row.number, row.name, f"{row.where}: its message_id {name!r} is no name of its own"
            )
            continue
        messages[name] = Row(row.file, row.number, row.where, row.record | {"replies": []})
    roots: list[Row] = []
    for row in messages.values():
        parent = row.record["parent_id"]
        if parent is None:
            roots.append(row)
        elif isinstance(parent, str) and parent in messages:
            messages[parent].record["replies"].append(row.record)
        else:
            yield Rejected(row.file, row.number, row.name, f"{row.where}: its parent {parent!r} is not in the file")
    for row in roots:
        tree = {"prompt": row.record, "message_tree_id": row.record.get("message_tree_id")}
        yield Row(row.file, row.number, row.where, tree)
