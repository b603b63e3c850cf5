"""Small shard sets for the tests of quality tools."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmit.data.images import ending_of, size_of
from mmit.data.sample import ImagePart, Picture, Sample, message
from mmit.data.shards import ShardSet, write_shards


def picture(data: bytes) -> Picture:
    width, height = size_of(data, "made")
    return Picture(width, height, hashlib.sha256(data).hexdigest(), ending_of(data, "made"), data)


def chat(number: int, user: str, assistant: str, pictures: Iterable[bytes] = (), *, prefix: str = "s") -> Sample:
    images = tuple(picture(data) for data in pictures)
    shown = [ImagePart(place) for place in range(len(images))]
    return Sample(
        f"{prefix}{number:06d}", "made", (message("user", *shown, user), message("assistant", assistant)), images
    )


def chats(folder: Path, rows: Iterable[tuple[Any, ...]], *, samples_per_shard: int = 7, prefix: str = "s") -> ShardSet:
    """A set of (user, assistant) or (user, assistant, pictures) rows, keyed s000000, s000001, ..."""
    samples = (chat(number, *row, prefix=prefix) for number, row in enumerate(rows))
    return write_shards(samples, folder, samples_per_shard=samples_per_shard)


def numbers(shards: ShardSet) -> list[int]:
    """Which of the rows are there."""
    return [int(key[1:]) for key in shards.keys()]  # noqa: SIM118 a method of the set, in order


def removed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".arrow"}
