"""What an epoch over several weighted shard sets would hold, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
        folder, _, text = source.partition("=")
        try:
            repeat = float(text or 1)
        except ValueError:
            repeat = 0.0
        if not 0 < repeat < float("inf"):
            raise ConfigError(f"{source}: write FOLDER or FOLDER=REPEAT with a number above 0, such as {folder}=0.5")
        samples = ShardSet(Path(folder))
        pictures = sum(len(samples.image_sizes(number)) for number in range(len(samples)))
        characters = sum(samples.characters(number) for number in range(len(samples)))
        taken = int(np.floor(len(samples) * repeat + 0.5))
        scale = taken / len(samples) if len(samples) else 0
        shares.append(
            Share(Path(folder).name, len(samples), repeat, taken, round(pictures * scale), round(characters * scale))
        )
    return shares


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
