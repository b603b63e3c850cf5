"""What lies beside a shard set about where it came from: `conversion.json` of convert and merge, `provenance.json` of
the tools that make a set from another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONVERSION = "conversion.json"
PROVENANCE = "provenance.json"
REJECTED = "rejected.jsonl"
"""Rows or members that became no sample, a line each with the reason."""


def beside(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of that name, None where there is none."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


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
