"""Deduplicating synthetic short texts with planted copies: seconds, memory, precision and recall.

Run by hand: `python -m tests.bench.bench_dedup [texts] [--shards]`; 1,000,000 texts by default. With `--shards` the
texts are first written as a shard set and the whole command is measured, reading and writing shards included.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.quality.dedup import dedup
from data_tools.quality.near import WORDS, NearTexts
from data_tools.quality.words import jaccard, shingles
from mmit.data.sample import Sample, message
from mmit.data.shards import write_shards

THRESHOLD = 0.7
VOCABULARY = [f"{a}{b}{c}{d}" for a in "bdfgklmnpr" for b in "aeiou" for c in "mnrst" for d in "aeiou"]
COPIED = 10
"""Every so many-th text is a copy of an earlier one with one to three words changed."""


def text(number: int) -> str:
    """The text of that number, made anew whenever it is asked for."""
    draw = random.Random(number)
    if number % COPIED == COPIED - 1:
        found = text(original(number)).split(" ")
        for _ in range(draw.randint(1, 3)):
            found[draw.randrange(len(found))] = draw.choice(VOCABULARY)
        return " ".join(found)
    return " ".join(draw.choices(VOCABULARY, k=draw.randint(15, 40)))


def original(number: int) -> int:
    """The text, itself no copy, that a copy was made of."""
    earlier = random.Random(-number).randrange(number)
    return earlier - (earlier % COPIED == COPIED - 1)


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def judged(removed: dict[int, int], count: int) -> str:
    """Precision: of the removed, those truly as similar to what they name. Recall: of the copies that truly are."""
    true = missed = 0
    for number in range(COPIED - 1, count, COPIED):
        if jaccard(shingles(text(number), WORDS), shingles(text(original(number)), WORDS)) >= THRESHOLD:
            true += 1
            missed += number not in removed
    wrong = sum(jaccard(shingles(text(a), WORDS), shingles(text(b), WORDS)) < THRESHOLD for a, b in removed.items())
    return (
        f"{true:,} planted copies reach {THRESHOLD}, {len(removed):,} found; "
        f"recall {1 - missed / true:.4f}, precision {1 - wrong / len(removed):.4f}"
    )


def engine(count: int, folder: Path) -> dict[int, int]:
    of = np.full(count, -1, dtype=np.int64)
    with NearTexts(folder / "bands.bin", count, THRESHOLD) as near:
        begun = time.perf_counter()
        for number in range(count):
            near.add(text(number), 0)
        read = time.perf_counter()
        near.duplicates(text, of, lambda done, total: None)
        ended = time.perf_counter()
        size = (folder / "bands.bin").stat().st_size / 2**20
    begun_texts = time.perf_counter()
    for number in range(0, count, 20):
        text(number)
    made = (time.perf_counter() - begun_texts) * 20
    print(
        f"{count:,} texts: {read - begun:.1f} s to sketch ({made:.1f} s of it to make the texts), {ended - read:.1f} s "
        f"to compare, {size:.0f} MB on disk"
    )
    return {int(number): int(of[number]) for number in np.flatnonzero(of >= 0)}


def whole(count: int, folder: Path) -> dict[int, int]:
    def samples() -> Iterator[Sample]:
        for number in range(count):
            yield Sample(f"s{number:08d}", "made", (message("user", text(number)), message("assistant", "Yes.")))

    begun = time.perf_counter()
    write_shards(samples(), folder / "in", samples_per_shard=10_000)
    written = time.perf_counter()
    derived = dedup(folder / "in", folder / "out", near=THRESHOLD)
    print(
        f"{count:,} samples in shards: {time.perf_counter() - written:.1f} s for the command "
        f"(writing the input took {written - begun:.1f} s), {derived.removed}"
    )
    return {}


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--shards"]
    count = int(arguments[0]) if arguments else 1_000_000
    before = megabytes()
    with tempfile.TemporaryDirectory() as folder:
        removed = (whole if "--shards" in sys.argv else engine)(count, Path(folder))
    print(f"peak memory {megabytes():.0f} MB, {before:.0f} MB of it before the first text")
    if removed:
        print(judged(removed, count))


if __name__ == "__main__":
    main()
