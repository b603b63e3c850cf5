"""What an epoch over several weighted shard sets would hold, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmit.config import ConfigError
from mmit.data.shards import ShardSet


@dataclass(frozen=True)
class Share:
    name: str
    samples: int
    repeat: float
    taken: int
    """Samples of this set in one epoch."""
    pictures: int
    characters: int


def mix(sources: Sequence[str]) -> list[Share]:
    """One share for each `FOLDER` or `FOLDER=REPEAT`."""
    shares = []
    for source in sources:
        folder, repeat = weighted(source)
        samples = ShardSet(folder)
        pictures = len(samples.pictures()[0])
        characters = sum(samples.characters(number) for number in range(len(samples)))
        taken = in_epoch(len(samples), repeat)
        scale = taken / len(samples) if len(samples) else 0
        shares.append(
            Share(folder.name, len(samples), repeat, taken, round(pictures * scale), round(characters * scale))
        )
    return shares


def weighted(source: str | Path) -> tuple[Path, float]:
    """The folder and the repeat of `FOLDER` or `FOLDER=REPEAT`; a folder may have a = in its name."""
    folder, equals, text = str(source).rpartition("=")
    if not equals or Path(source).is_dir():
        return Path(source), 1.0
    try:
        repeat = float(text)
    except ValueError:
        repeat = 0.0
    if not 0 < repeat < float("inf"):
        raise ConfigError(f"{source}: write FOLDER or FOLDER=REPEAT with a number above 0, such as {folder}=0.5")
    return Path(folder), repeat


def in_epoch(samples: int, repeat: float) -> int:
    """Samples of a source that its first epoch takes."""
    return math.floor(samples * repeat + 0.5)


def table(shares: Sequence[Share]) -> list[str]:
    taken = sum(share.taken for share in shares) or 1
    pictures = sum(share.pictures for share in shares) or 1
    characters = sum(share.characters for share in shares) or 1
    lines = [f"{'source':<24} {'samples':>10} {'repeat':>7} {'an epoch':>10} {'share':>7} {'pictures':>9} {'text':>7}"]
    for share in shares:
        lines.append(
            f"{share.name:<24} {share.samples:>10,} {share.repeat:>7g} {share.taken:>10,} "
            f"{share.taken / taken:>7.1%} {share.pictures / pictures:>9.1%} "
            f"{share.characters / characters:>7.1%}"
        )
    lines.append(f"{'together':<24} {'':>10} {'':>7} {taken:>10,}")
    return lines
