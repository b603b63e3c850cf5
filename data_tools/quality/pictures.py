"""Pictures that look alike: the prints of a set, compared without comparing all with all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_tools.looks import PRINT, need_imagehash, print_of, read_print
from data_tools.quality.subset import Progress
from mmit.config import ConfigError
from mmit.data.files import whole
from mmit.data.images import decode
from mmit.data.sample import Picture
from mmit.data.shards import ShardSet

BITS = 64
MOST_BITS = 16
COLOUR_DIFFERENCE = 12.0
"""Mean difference out of 255 up to which they are alike; encoding again as JPEG of quality 30 gives about 1."""


@dataclass(frozen=True)
class Prints:
    """What is compared, of every distinct picture of a set."""

    shown: np.ndarray
    """int64 (pictures,): the distinct picture that each picture is, in the order of `ShardSet.pictures`."""
    owners: np.ndarray
    """int64 (pictures,): the sample that shows it."""
    values: np.ndarray
    """PRINT (distinct,)."""


def check_bits(most: int) -> int:
    if not 0 <= most <= MOST_BITS:
        raise ConfigError(
            f"--alike {most}: at most so many of {BITS} bits may differ; write 0 to {MOST_BITS}, 4 is a good start"
        )
    need_imagehash("--alike")
    return most


def prints_of(shards: ShardSet, work: Path, progress: Progress) -> Prints:
    """The prints of all pictures: those that conversion kept, else each distinct one decoded once; those of a finished
    shard are kept in `work`."""
    owners, hashes = shards.pictures()
    _, first, shown = np.unique(hashes, return_index=True, return_inverse=True)
    values = np.zeros(len(first), dtype=PRINT)
    begins = np.searchsorted(owners, np.arange(len(shards) + 1))  # of each sample, its first picture
    sample = 0
    for shard, size in enumerate(shards.shard_sizes):
        stop = sample + size
        new = np.array([p for p in range(begins[sample], begins[stop]) if first[shown[p]] == p], dtype=np.int64)
        path = work / f"pictures-{shard:06d}.bin"
        if path.exists() and path.stat().st_size == len(new) * PRINT.itemsize:
            values[shown[new]] = np.fromfile(path, dtype=PRINT)
        else:
            for owner in np.unique(owners[new]):
                mine = new[owners[new] == owner]
                kept = shards.read(int(owner), images=False).images
                told = all(kept[picture - begins[owner]].print for picture in mine.tolist())
                pictures = kept if told else shards.read(int(owner)).images
                for picture in mine:
                    number = int(picture - begins[owner])
                    where = f"{shards.where(int(owner))}: picture {number}"
                    values[shown[picture]] = _print(pictures[number], where)[0]
                if owner % 50 == 0:
                    progress("look at pictures", int(owner), len(shards))
            with whole(path) as temporary:
                temporary.write_bytes(values[shown[new]].tobytes())
        sample = stop
        progress("look at pictures", stop, len(shards))
    return Prints(shown, owners, values)


def _print(picture: Picture, where: str) -> np.ndarray:
    if picture.print is not None:
        return read_print(picture.print, where)
    assert picture.data is not None
    return print_of(decode(picture.data, where, window=picture.window))


def alike(queries: np.ndarray, prints: np.ndarray, most: int) -> Iterator[tuple[int, np.ndarray]]:
    """Of every query its number and the numbers of prints that differ in at most `most` bits and little in colour.

    Two hashes that differ in d bits agree in at least one of d + 1 blocks, so only those that share a block are
    compared; a query may be given several times, by several blocks.
    """
    edges = np.linspace(0, BITS, most + 2).astype(int)
    for low, high in pairwise(edges.tolist()):
        mask = np.uint64((1 << (high - low)) - 1)
        block = (prints["hash"] >> np.uint64(low)) & mask
        order = np.argsort(block, kind="stable")
        wanted = (queries["hash"] >> np.uint64(low)) & mask
        starts = np.searchsorted(block[order], wanted, side="left")
        stops = np.searchsorted(block[order], wanted, side="right")
        for number in np.flatnonzero(stops > starts).tolist():
            near = order[starts[number] : stops[number]]
            near = near[np.bitwise_count(prints["hash"][near] ^ queries["hash"][number]) <= most]
            away = prints["colours"][near].astype(np.int16) - queries["colours"][number].astype(np.int16)
            near = near[np.abs(away).mean(axis=1) <= COLOUR_DIFFERENCE]
            if len(near):
                yield number, near


def groups(prints: np.ndarray, most: int) -> np.ndarray:
    """int64 (distinct,): pictures that look alike, directly or through others, have the number of the first of them."""
    parent = np.arange(len(prints), dtype=np.int64)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for number, near in alike(prints, prints, most):
        for other in near[near < number].tolist():
            a, b = root(number), root(other)
            parent[max(a, b)] = min(a, b)
    while not np.array_equal(parent, parent[parent]):
        parent = parent[parent]
    return parent
