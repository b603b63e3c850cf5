"""Alpaca: instruction, input, output, and where present system and history [[question, answer], ...].

Instruction and input become one user text with a line break between. The same reader serves Dolly (context, response),
Magicoder (problem, solution) and Evol code (instruction, output) by their field names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.rows import Rejected, Row, each, fields, records, text_field
from data_tools.turns import Turn, refuse_media, refuse_unwanted, said, sample_of, text_of
from mmit.data.sample import Sample, SampleError

QUESTION = ("instruction", "problem", "prompt", "query")
CONTEXT = ("input", "context")
ANSWER = ("output", "response", "solution", "answer")


def samples(
    path: Path, images: Path | None = None, *, strip: bool = True, join: str = "\n"
) -> Iterator[Sample | Rejected]:
    del images  # text only

    def sample(row: Row) -> Sample:
        record = fields(row)
        refuse_media(record, row.where, "image", "video", "audio")
        refuse_unwanted(record, row.where, "label", "kto_tag")
        messages: list[Turn] = []
        if record.get("system"):
            messages.append(said("system", text_of(record["system"], row.where)))
        history = record.get("history") or []
        if not isinstance(history, list):
            raise SampleError(f"{row.where}: history is a {type(history).__name__}; write [[question, answer], ...]")
        for number, pair in enumerate(history):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise SampleError(f"{row.where}: history {number} is not a [question, answer] pair: {str(pair)[:60]!r}")
            question, answer = (text_of(text, f"{row.where}: history {number}") for text in pair)
            messages += [said("user", question), said("assistant", answer)]
        question = text_of(text_field(row, *QUESTION), row.where)
        context = next((text_of(record[name], row.where) for name in CONTEXT if record.get(name)), "")
        answer = text_of(text_field(row, *ANSWER), row.where)
        messages.append(said("user", join.join(text for text in (question, context) if text)))
        messages.append(said("assistant", answer))
        meta = {name: record[name] for name in ("id", "category", "lang") if record.get(name) is not None}
        return sample_of(messages, meta=meta, where=row.where, strip=strip)

    return each(records(path), sample)
