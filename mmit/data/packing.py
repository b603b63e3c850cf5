"""From the samples of a step to balanced, isolated rows: who computes what, and the tensors of one forward pass.

A row `(1, T)` holds whole samples one after another, each with positions from 0, so that attention which respects the
restarts lets none of them see another. Dealing changes no result: a step's loss is a sum over its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A sample as the model meets it. Letters: T tokens, S image spans."""

    ids: NDArray[np.int32]
    """`(T,)`."""
    labels: NDArray[np.int32]
    """`(T,)`: the id itself where it is learned, else -100. Not shifted."""
    spans: NDArray[np.int32]
    """`(S, 3)`: start, stop and picture of each image span, in reading order."""
    source: int
    where: str
    """`shard:key`, for messages."""
    pictures: tuple[bytes, ...] = ()
    """Identity of each picture of the sample: equal where the fitted pixels are."""

    @property
    def supervised(self) -> int:
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Load:
    """What a sample costs. `pictures` are identities: two samples with one in common need it encoded once."""

    tokens: int
    pictures: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Costs:
    """Relative cost of a token through the linear layers (1), of attention between two, and of encoding a picture."""

    attention: float = 0.0
    picture: float = 0.0

    def of(self, row: Iterable[Load]) -> float:
        """What the samples of a row cost together: a picture that several show is encoded once."""
        loads = list(row)
        pictures = {picture for load in loads for picture in load.pictures}
        return sum(load.tokens + self.attention * load.tokens**2 for load in loads) + self.picture * len(pictures)


@dataclass(frozen=True)
class Row:
    """One forward pass. Letters: T tokens, S image spans, N pictures, K supervised tokens, D samples."""

    ids: Tensor
    """`(1, T)` int64."""
    positions: Tensor
    """`(1, T)` int64, from 0 in every sample."""
    boundaries: Tensor
    """`(D + 1,)` int32: where each sample starts, and the end (`cu_seq_lens`)."""
    longest: int
    """Tokens of the longest sample (`max_length`)."""
    predicts: Tensor
    """`(K,)` positions whose next token is learned."""
    targets: Tensor
    """`(K,)` those tokens."""
    sources: Tensor
    """`(K,)` the source that each belongs to."""
    is_image: Tensor
    """`(1, T)` bool: where image features go."""
    image_tokens: int
    """How many positions `is_image` marks, known without asking the device."""
    shown: Tensor
    """`(S,)` int64: the picture of each span, into `pixels`."""
    pixels: Tensor
    """`(N, 3, side, side)` uint8, each picture once; N may be 0."""
    keys: tuple[bytes, ...]
    """Identity of each picture."""
    samples: tuple[str, ...]
    """Where each sample comes from."""
    touch_vision: bool = False
    """Run the vision path though this row shows nothing: another rank's row does, and would wait."""

    def to(self, device: torch.device) -> Self:
        """The row with its tensors on `device`; `boundaries` too, as varlen attention kernels want them there."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """As torch's loader asks for it: the row where a GPU can fetch it while the step before is computed."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


def deal(
    loads: Sequence[Load], ranks: int, *, row_tokens: int, row_images: int | None = None, costs: Costs = Costs()
) -> list[list[list[int]]]:
    """Sample numbers by rank and row: `[rank][row][...]`, as many rows on every rank, each within its bounds.

    Samples that share pictures stay together where they fit. Longest first into the cheapest row with room, on as few
    rows as hold everything. A sample longer than `row_tokens` gets a row of its own.
    """
    clusters = _clusters(loads, row_tokens, row_images)
    clusters.sort(key=lambda cluster: (-costs.of(loads[i] for i in cluster), cluster))
    total = sum(load.tokens for load in loads)
    rows_each = max(1, -(-total // (row_tokens * ranks)))
    while True:
        rows = _fill(clusters, loads, rows_each * ranks, row_tokens, row_images, costs)
        if rows is not None:
            break
        rows_each += 1
    weight = [costs.of(loads[i] for i in row) for row in rows]
    heaviest_first = sorted(range(len(rows)), key=lambda r: (-weight[r], rows[r]))
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    for number, row in enumerate(heaviest_first):
        turn, place = divmod(number, ranks)
        dealt[place if turn % 2 == 0 else ranks - 1 - place].append(sorted(rows[row]))
    return dealt


def pack(examples: Sequence[Example], pixels: Sequence[Tensor], keys: Sequence[bytes], *, touch_vision: bool) -> Row:
    """The row of `examples`, in their order; `keys` name the pictures in `pixels` (each `(3, side, side)` uint8)."""
    if not examples:
        return blank(touch_vision=touch_vision)
    place = {key: number for number, key in enumerate(keys)}
    lengths = [len(example.ids) for example in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.concatenate([example.labels for example in examples])
    labels[starts[:-1]] = IGNORED  # nothing before a sample may predict its first token
    is_image = np.zeros(len(labels), dtype=bool)
    shown = []
    for start, example in zip(starts, examples, strict=False):
        for begin, end, picture in example.spans:
            is_image[start + begin : start + end] = True
            shown.append(place[example.pictures[picture]])
    learned = np.flatnonzero(labels != IGNORED)
    sources = np.repeat([example.source for example in examples], lengths)
    return Row(
        ids=torch.from_numpy(np.concatenate([example.ids for example in examples]).astype(np.int64))[None],
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        boundaries=torch.from_numpy(starts.astype(np.int32)),
        longest=max(lengths),
        predicts=torch.from_numpy(learned - 1),
        targets=torch.from_numpy(labels[learned].astype(np.int64)),
        sources=torch.from_numpy(sources[learned].astype(np.int64)),
        is_image=torch.from_numpy(is_image)[None],
        image_tokens=int(is_image.sum()),
        shown=torch.tensor(shown, dtype=torch.int64),
        pixels=torch.stack(list(pixels)) if pixels else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        keys=tuple(keys),
        samples=tuple(example.where for example in examples),
        touch_vision=touch_vision,
    )


def blank(*, touch_vision: bool = False) -> Row:
    """A row with one token and nothing to learn, for a rank that has no sample left while others do."""
    nothing = torch.empty(0, dtype=torch.int64)
    one = torch.zeros(1, 1, dtype=torch.int64)
    return Row(
        ids=one,
        positions=one,
        boundaries=torch.tensor([0, 1], dtype=torch.int32),
        longest=1,
        predicts=nothing,
        targets=nothing,
        sources=nothing,
        is_image=one.bool(),
        image_tokens=0,
        shown=nothing,
        pixels=torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        keys=(),
        samples=(),
        touch_vision=touch_vision,
    )


def _fits(row: list[int], loads: Sequence[Load], row_tokens: int, row_images: int | None) -> bool:
    tokens = sum(loads[i].tokens for i in row)
    pictures = {picture for i in row for picture in loads[i].pictures}
    return len(row) == 1 or (tokens <= row_tokens and (row_images is None or len(pictures) <= row_images))


def _clusters(loads: Sequence[Load], row_tokens: int, row_images: int | None) -> list[list[int]]:
    """Samples with a picture in common, joined as long as they fit one row; others alone."""
    clusters: list[list[int]] = []
    of_picture: dict[bytes, int] = {}
    for number, load in enumerate(loads):
        home = next((of_picture[p] for p in load.pictures if p in of_picture), None)
        if home is None or not _fits([*clusters[home], number], loads, row_tokens, row_images):
            home = len(clusters)
            clusters.append([])
        clusters[home].append(number)
        of_picture.update(dict.fromkeys(load.pictures, home))
    return clusters


def _fill(
    clusters: Sequence[Sequence[int]],
    loads: Sequence[Load],
    count: int,
    row_tokens: int,
    row_images: int | None,
    costs: Costs,
) -> list[list[int]] | None:
    """The clusters in `count` rows, each into the cheapest with room; None if one finds no room."""
    rows: list[list[int]] = [[] for _ in range(count)]
    weight, tokens = [0.0] * count, [0] * count
    pictures: list[set[bytes]] = [set() for _ in range(count)]
    for cluster in clusters:
        needed = sum(loads[i].tokens for i in cluster)
        shown = {picture for i in cluster for picture in loads[i].pictures}
        room = [
            r
            for r in range(count)
            if not rows[r]
            or (tokens[r] + needed <= row_tokens and (row_images is None or len(pictures[r] | shown) <= row_images))
        ]
        if not room:
            return None
        best = min(room, key=lambda r: (weight[r], r))
        rows[best].extend(cluster)
        weight[best] = costs.of(loads[i] for i in rows[best])
        tokens[best] += needed
        pictures[best] |= shown
    return rows
