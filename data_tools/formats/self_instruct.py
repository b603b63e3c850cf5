"""Self-Instruct and Unnatural Instructions: {instruction, instances: [{input, output, constraints?}]}; one sample an
instance, its constraints after the input unless they are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.rows import Rejected, Row, each, fields, records, text_field
from data_tools.turns import said, sample_of, text_of
from mmit.data.sample import Sample, SampleError


def samples(
    path: Path, images: Path | None = None, *, strip: bool = True, join: str = "\n"
) -> Iterator[Sample | Rejected]:
    del images

    def rows() -> Iterator[Row | Rejected]:
        for row in records(path):
            instances = row.record.get("instances") if isinstance(row, Row) and isinstance(row.record, dict) else None
            if isinstance(row, Rejected) or not isinstance(instances, list) or not instances:
                yield row
                continue
            for number, instance in enumerate(instances):
                told = {key: row.record[key] for key in ("id", "instruction", "name") if key in row.record}
                yield Row(row.file, row.number, f"{row.where} instance {number}", {"instance": instance, **told})

    def sample(row: Row) -> Sample:
        record = fields(row)
        instance = record.get("instance")
        if not isinstance(instance, dict):
            raise SampleError(f"{row.where}: no instances of input and output; the row has {', '.join(record)}")
        constraints = instance.get("constraints")
        if constraints and text_of(constraints, row.where).strip().lower().rstrip(".") == "none":
            constraints = None
        asked = [text_field(row, "instruction"), instance.get("input"), constraints]
        question = join.join(text_of(text, row.where) for text in asked if text)
        meta = {key: record[key] for key in ("id", "name") if isinstance(record.get(key), str | int)}
        answer = text_of(instance.get("output"), row.where)
        return sample_of([said("user", question), said("assistant", answer)], meta=meta, where=row.where, strip=strip)

    return each(rows(), sample)
