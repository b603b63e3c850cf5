"""OpenAssistant: trees ({prompt: {text, role, replies: [...]}}, one a line) or flat messages with parent_id.

One sample a tree: from the first prompt always to the best reply (lowest `rank`, then the file's order) until no reply
is left. Deleted and rejected messages and, with `lang`, those of other languages are not gone through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.rows import Rejected, Row, each, fields, records
from data_tools.turns import role_of, said, sample_of, text_of
from mmit.data.sample import Sample, SampleError


def samples(
    path: Path, images: Path | None = None, *, strip: bool = True, lang: str = ""
) -> Iterator[Sample | Rejected]:
    del images

    def sample(row: Row) -> Sample:
        record = fields(row)
        message = record.get("prompt")
        if not isinstance(message, dict):
            raise SampleError(f"{row.where}: no prompt with replies; the row has {', '.join(record)}")
        turns = []
        while message is not None:
            turns.append(said(role_of(message.get("role"), row.where), text_of(message.get("text"), row.where)))
            message = _best(message.get("replies") or [], lang)
        while turns and turns[-1].role == "user":
            turns.pop()
        meta = {"id": record["message_tree_id"]} if isinstance(record.get("message_tree_id"), str) else {}
        return sample_of(turns, meta=meta, where=row.where, strip=strip)

    return each(_trees(records(path)), sample)


def _best(replies: list[Mapping[str, Any]], lang: str) -> Mapping[str, Any] | None:
    usable = [
        reply
        for reply in replies
        if not reply.get("deleted") and reply.get("review_result") is not False and lang in ("", reply.get("lang"))
    ]
    return min(usable, key=lambda reply: reply["rank"] if reply.get("rank") is not None else 10**6, default=None)


def _trees(rows: Iterator[Row | Rejected]) -> Iterator[Row | Rejected]:
    """Rows that are trees as they are; flat messages gathered into trees, in the order of their first messages."""
    messages: dict[str, dict[str, Any]] = {}
    roots: list[Row] = []
    for row in rows:
        if isinstance(row, Rejected) or not isinstance(row.record, dict) or "parent_id" not in row.record:
            yield row
            continue
        record = row.record | {"replies": []}
        messages[str(record.get("message_id"))] = record
        if record["parent_id"] is None:
            tree = {"prompt": record, "message_tree_id": record.get("message_tree_id")}
            roots.append(Row(row.file, row.number, row.where, tree))
    for record in messages.values():
        parent = messages.get(str(record["parent_id"]))
        if parent is not None:
            parent["replies"].append(record)
    yield from roots
