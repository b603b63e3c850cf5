"""Super-NaturalInstructions: a task file {Definition, Instances: [{id, input, output: [texts]}], ...}, or a folder of
them. One sample an instance; which of several outputs is learned is drawn by the seed and the instance."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from data_tools.rows import Rejected, Row, each, fields, json_document, row_at, text_field
from data_tools.turns import said, sample_of, text_of
from mmit.config import ConfigError
from mmit.data.sample import Sample, SampleError


def samples(
    path: Path, images: Path | None = None, *, strip: bool = True, seed: int = 0, examples: int = 0
) -> Iterator[Sample | Rejected]:
    """`examples`: how many of the task's positive examples are told before the input."""
    del images

    def rows() -> Iterator[Row]:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"{path}: the folder holds no task file (.json)")
        for file in files:
            task = json_document(file)
            if not isinstance(task, dict) or not isinstance(task.get("Instances"), list) or "Definition" not in task:
                raise SampleError(f"{file}: no task of Super-NaturalInstructions; it needs Definition and Instances")
            for number, instance in enumerate(task["Instances"]):
                record = instance | {"task": task} if isinstance(instance, dict) else instance
                yield row_at(file, number, record, lines=False)

    def sample(row: Row) -> Sample:
        record = fields(row)
        task = record["task"]
        definition = task["Definition"]
        text = "\n".join(definition) if isinstance(definition, list) else str(definition)
        for shown in task.get("Positive Examples", [])[:examples]:
            text += f"\n\nInput: {shown['input']}\nOutput: {shown['output']}"
        if examples:
            text += "\n\nInput: "
        outputs = record.get("output")
        if isinstance(outputs, list) and outputs:
            outputs = random.Random(f"{seed} {row.where}").choice(outputs)
        asked = text + ("" if examples else "\n\n") + text_field(row, "input") + ("\nOutput:" if examples else "")
        return sample_of(
            [said("user", asked), said("assistant", text_of(outputs, row.where))],
            meta={"task": Path(row.file).stem} | ({"id": record["id"]} if isinstance(record.get("id"), str) else {}),
            where=row.where,
            strip=strip,
        )

    return each(rows(), sample)
