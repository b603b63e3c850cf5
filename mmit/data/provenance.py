"""What lies beside a shard set about where it came from: `conversion.json` of convert and merge, `provenance.json` of
the tools that make a set from another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmit.data.sample import SampleError

CONVERSION = "conversion.json"
PROVENANCE = "provenance.json"
REJECTED = "rejected.jsonl"
"""Rows or members that became no sample, a line each with the reason."""


def beside(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of that name, None where there is none."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SampleError(f"{path}: damaged ({error}); copy it again from where the set came") from None


def licenses(folder: Path) -> list[str]:
    """The licences stated for the data of a shard set by `convert --license`, also through merging and filtering."""
    derived = beside(folder, PROVENANCE)
    if derived is not None:
        return derived["licenses"]
    converted = beside(folder, CONVERSION)
    if converted is None:
        return []
    if "licenses" in converted:
        return converted["licenses"]
    license = converted["plan"].get("settings", {}).get("license")  # a set merged by an early mmit has no settings
    return [license] if license else []


def taken(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the stages of a run's config were trained on, a row a source, without the places where it lies."""
    rows = []
    for stage in stages:
        for source in stage["data"]:
            place, kind = source.get("shards") or source.get("path") or "", source.get("format")
            stated = (source.get("options") or {}).get("license") or ", ".join(licenses(Path(place)))
            row = {
                "stage": stage["name"],
                "source": source.get("name") or (f"{kind}: " if kind else "") + Path(place).name,
                "licence": stated or "not stated",
                "taken": f"x {source['repeat']:g}" + (f", at most {source['limit']}" if source.get("limit") else ""),
            }
            rows.append(row | ({"dataset": str(place)} if kind == "hub" else {}))
    return rows
