"""Which samples make up a step: a pure function of the sources, the seed and the step, and of nothing else.

No length, rank, worker or past run enters, so a loader's whole state is the number of its step. Permutations come from
sorting hashes (splitmix64, Steele et al. 2014, doi:10.1145/2714064.2660195), not from a library whose stream
may change between releases.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Occurrence:
    """One appearance of a sample: `index` in its source, for the `turn`-th time since the start of training."""

    source: int
    index: int
    turn: int


@dataclass(frozen=True, eq=False)
class Origin:
    """What the order knows of a source: a fixed name for its samples, which of them it may use, how often."""

    fingerprint: str
    indices: Integers
    """Samples in use (held-out ones taken out), ascending."""
    repeat: float = 1.0
    shards: Integers | None = None
    """Shard of each sample in use, for the windowed order."""
    groups: Integers | None = None
    """Group of each sample in use, for an order that keeps groups together."""


@dataclass(frozen=True, eq=False)
class Order:
    """All steps of a stage. The last step of an epoch is smaller; no step straddles two epochs."""

    origins: tuple[Origin, ...]
    seed: int
    batch_size: int
    window: int | None = None
    """Shards of a window: samples are permuted inside it, shards among themselves. None: one full permutation."""

    def samples(self, epoch: int) -> int:
        """How many samples epoch `epoch` holds."""
        return sum(_bounds(origin, epoch)[1] - _bounds(origin, epoch)[0] for origin in self.origins)

    def steps(self, epoch: int) -> int:
        return math.ceil(self.samples(epoch) / self.batch_size)

    def total_steps(self, epochs: float) -> int:
        """Steps of `epochs` epochs, the last one in part if it is not whole."""
        whole, part = divmod(Fraction(str(epochs)), 1)  # 1.1 - 1 is more than a tenth in floating point
        return sum(self.steps(epoch) for epoch in range(whole)) + math.ceil(part * self.steps(whole))

    def place(self, step: int) -> tuple[int, int]:
        """Epoch of step `step` (from 0, over the whole stage), and its number within that epoch."""
        if not any(len(origin.indices) for origin in self.origins):
            raise IndexError(f"step {step} of an order with no sample")
        epoch = 0
        while step >= self.steps(epoch):
            step -= self.steps(epoch)
            epoch += 1
        return epoch, step

    def step(self, step: int) -> list[Occurrence]:
        """The samples of step `step`, in order."""
        epoch, number = self.place(step)
        rows = _epoch(self, epoch)[number * self.batch_size : (number + 1) * self.batch_size]
        return [Occurrence(int(source), int(index), int(turn)) for source, index, turn in rows]


def permutation(size: int, *key: int | str) -> Integers:
    """A permutation of `range(size)` that depends on `key` alone, on every machine and in every release."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    state = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(int.from_bytes(digest[:8], "little"))
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable").astype(np.int64)


def held_out(names: Sequence[str], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which groups to hold out, each by the hash of its name, about `fraction` of them.

    A name says what the group holds, so that a picture is on the same side in every source and every run.
    """
    limit = int(fraction * 2**64)
    digests = (hashlib.sha256(f"{seed}\0{name}".encode()).digest() for name in names)
    return np.asarray([int.from_bytes(digest[:8], "little") < limit for digest in digests], dtype=bool)


def _bounds(origin: Origin, epoch: int) -> tuple[int, int]:
    """The stretch of the source's endless run of permutations that an epoch takes."""
    taken = origin.repeat * len(origin.indices)
    return math.floor(epoch * taken + 0.5), math.floor((epoch + 1) * taken + 0.5)


@lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> Integers:
    """Rows (source, index, turn) of an epoch in their final order."""
    parts = []
    for number, origin in enumerate(order.origins):
        start, stop = _bounds(origin, epoch)
        size = len(origin.indices)
        turns = range(start // size, -(-stop // size)) if size else range(0)
        for turn in turns:
            taken = _source_order(order, origin, turn)[max(start - turn * size, 0) : stop - turn * size]
            parts.append(np.stack([np.full_like(taken, number), origin.indices[taken], np.full_like(taken, turn)], 1))
    rows = np.concatenate(parts) if parts else np.empty((0, 3), dtype=np.int64)
    if order.window is not None:
        return _interleave(rows, order, epoch)
    mix = permutation(len(rows), order.seed, "mix", epoch)
    if all(origin.groups is None for origin in order.origins):
        return rows[mix]
    return rows[_whole_groups(_groups(rows, order), mix)]


def _source_order(order: Order, origin: Origin, turn: int) -> Integers:
    """Positions into `origin.indices` in the order of turn `turn`."""
    size = len(origin.indices)
    key = (order.seed, origin.fingerprint, turn)
    if order.window is None or origin.shards is None:
        return permutation(size, *key)
    shards, place = np.unique(origin.shards, return_inverse=True)
    shuffled = permutation(len(shards), *key, "shards")
    window = np.argsort(shuffled)[place] // order.window
    by_window = np.argsort(window, kind="stable")
    ends = np.searchsorted(window[by_window], np.arange(1, len(shards) // order.window + 1))
    return np.concatenate(
        [
            inside[permutation(len(inside), *key, "window", number * order.window)]
            for number, inside in enumerate(np.split(by_window, ends))
        ]
    )


def _interleave(rows: Integers, order: Order, epoch: int) -> Integers:
    """Mixes sources evenly while each keeps its own order: the windowed order must not jump between shards."""
    place = np.empty(len(rows))
    for number in range(len(order.origins)):
        mine = np.flatnonzero(rows[:, 0] == number)
        place[mine] = (np.arange(len(mine)) + 0.5) / max(len(mine), 1)
    tie = permutation(len(order.origins), order.seed, "tie", epoch)[rows[:, 0]]
    return rows[np.lexsort((tie, place))]


def _groups(rows: Integers, order: Order) -> Integers:
    """The group of each row, numbered over all sources; a row of a source without groups is its own."""
    label = np.empty(len(rows), dtype=np.int64)
    free = 0
    for number, origin in enumerate(order.origins):
        mine = np.flatnonzero(rows[:, 0] == number)
        if origin.groups is None:
            label[mine] = free + np.arange(len(mine))
            free += len(mine)
        else:
            # A group that comes round again within the epoch is a new group: its second turn need not join the first.
            turns = rows[mine, 2]
            span = int(origin.groups.max(initial=-1)) + 1
            label[mine] = free + turns * span + origin.groups[np.searchsorted(origin.indices, rows[mine, 1])]
            free += span * (int(turns.max(initial=0)) + 1)
    return label


def _whole_groups(label: Integers, mix: Integers) -> Integers:
    """`mix`, an order of the rows, with every group whole at the place of one member.

    That member is chosen before mixing, so that all groups are equally likely everywhere: at the place of whichever
    member comes first, large groups would come early and an epoch end in lone samples.
    """
    place = np.argsort(mix)
    _, chosen, group = np.unique(label, return_index=True, return_inverse=True)
    return np.lexsort((place, place[chosen][group]))
