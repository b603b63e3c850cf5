"""Prompt and target as two fields: FLAN and xP3 dumps, P3, Orca, Dolly-like tables, seq2seq files.

Read under the names these sets use; `prompt` and `target` name others. A list of targets: the first is taken. P3 rows
whose `is_correct` is false are wrong answers and are rejected, and so are those of a false `label` or `kto_tag`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.rows import Rejected, Row, each, field, fields, records
from data_tools.turns import Turn, refuse_media, refuse_unwanted, said, sample_of, text_of
from mmit.data.sample import Sample

PROMPTS = ("inputs_pretokenized", "prompt", "inputs", "question", "input", "source", "src", "text_in")
TARGETS = ("targets_pretokenized", "completion", "targets", "response", "output", "target", "answer", "tgt", "seq_out")
SYSTEMS = ("system_prompt", "system")
META = ("task_source", "task_name", "template_type", "_task_source", "_task_name", "_template_type", "id", "language")


def samples(
    path: Path, images: Path | None = None, *, strip: bool = True, prompt: str = "", target: str = ""
) -> Iterator[Sample | Rejected]:
    del images

    def sample(row: Row) -> Sample:
        record = fields(row)
        refuse_media(record, row.where, "image", "video", "audio")
        refuse_unwanted(record, row.where, "is_correct", "label", "kto_tag")
        answer = field(row, *([target] if target else TARGETS))
        if isinstance(answer, list) and answer:
            answer = answer[0]
        turns: list[Turn] = []
        system = next((record[key] for key in SYSTEMS if record.get(key)), None)
        if system:
            turns.append(said("system", text_of(system, row.where)))
        turns.append(said("user", text_of(field(row, *([prompt] if prompt else PROMPTS)), row.where)))
        turns.append(said("assistant", text_of(answer, row.where)))
        meta = {key.lstrip("_"): record[key] for key in META if isinstance(record.get(key), str | int)}
        return sample_of(turns, meta=meta, where=row.where, strip=strip)

    return each(records(path), sample)
