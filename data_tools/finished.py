"""What a tool of several steps keeps of each finished shard, so that whoever is interrupted goes on from there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmit.config import ConfigError
from mmit.data.files import whole
from mmit.data.shard_index import UNFINISHED, SampleRow, ShardEntry, WrittenShard

WORK, PLAN = ".unfinished", "plan.json"
"""The folder of these records inside the set, and what the set is to become."""


def refuse_other_files(out: Path, tool: str | None = None) -> None:
    """Nothing is written into a folder that holds what no `tool` of this name has begun; conversion has none."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out}: this is a file; --out names a folder")
    plan = read_record(out / WORK / PLAN)
    if plan is not None:
        if plan.get("tool") != tool:
            raise ConfigError(f"{out}: holds an unfinished set of another command; finish it with that, or remove it")
    elif any(path.name not in (UNFINISHED, WORK) for path in out.iterdir()):
        raise ConfigError(f"{out}: the folder holds other files; --out names a new or empty folder")


def record_of(shard: WrittenShard) -> dict[str, Any]:
    """The entry and the rows of a shard as plain JSON values."""
    # asdict would copy each row deeply, a sixth of the time of converting it.
    rows = [vars(row) | {"sha256": [value.hex() for value in row.sha256]} for row in shard.rows]
    return {"entry": asdict(shard.entry), "rows": rows}


def read_record(path: Path) -> dict[str, Any] | None:
    """What was kept in a file; None if it is not there or a power cut emptied it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def shard_in(folder: Path, record: dict[str, Any]) -> WrittenShard | None:
    """The shard that a record tells of; None if its tar is gone or has another size than it was written with."""
    entry = ShardEntry(**record["entry"])
    tar = folder / entry.name
    if not tar.exists() or tar.stat().st_size != entry.bytes:
        return None
    return WrittenShard(entry, tuple(_row(row) for row in record["rows"]))


def _row(record: dict[str, Any]) -> SampleRow:
    lists: dict[str, Any] = {name: tuple(record[name]) for name in ("widths", "heights")}
    lists["sha256"] = tuple(bytes.fromhex(value) for value in record["sha256"])
    return SampleRow(**record | lists)


def write_whole(path: Path, text: str) -> None:
    """The file with this text, or what was there before."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
