"""Leave out samples that say what an earlier one says: of each group of duplicates the first stays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from data_tools.quality.near import NearTexts, check_threshold
from data_tools.quality.pictures import check_bits, groups, prints_of
from data_tools.quality.subset import Derived, Progress, Removal, derive, open_set, silent, texts_of
from data_tools.quality.words import normalised, told
from mmit.config import ConfigError
from mmit.data.shards import ShardSet

By = Literal["conversation", "prompt", "pictures"]
"""What must be the same: all texts and the pictures, texts but the answers and the pictures, or the pictures alone."""


def dedup(
    shards: Path,
    out: Path,
    *,
    by: By = "conversation",
    near: float | None = None,
    alike: int | None = None,
    progress: Progress = silent,
) -> Derived:
    """Write the samples without duplicates.

    Texts are the same up to case, width and white space, or with `near` if at least this share of their word triples is
    common; pictures if their bytes are, or with `alike` if at most so many bits of their perceptual hashes differ.
    """
    if by not in get_args(By):
        raise ConfigError(f"--by {by}: write one of {', '.join(get_args(By))}")
    if near is not None and by == "pictures":
        raise ConfigError("--near compares texts, --by pictures does not look at them; leave one of them out")
    opened = open_set(shards)
    libraries = {}
    if near is not None:
        check_threshold(near)
        libraries["rensa"] = version("rensa")
    if alike is not None:
        check_bits(alike)
        libraries["imagehash"] = version("imagehash")

    def decide(work: Path) -> Iterator[Removal]:
        of, similarity = duplicates(opened, work, by=by, near=near, alike=alike, progress=progress)
        for number in np.flatnonzero(of >= 0).tolist():
            details = {"of": opened.key(int(of[number]))}
            if number in similarity:
                yield Removal(number, "near", details | {"similarity": similarity[number]})
            else:
                yield Removal(number, "same", details)

    return derive(
        opened,
        out,
        tool="dedup",
        options={"by": by, "near": near, "alike": alike},
        decide=decide,
        libraries=libraries,
        progress=progress,
    )


def duplicates(
    shards: ShardSet, work: Path, *, by: By, near: float | None, alike: int | None, progress: Progress
) -> tuple[np.ndarray, dict[int, float]]:
    """int64 (samples,): the earlier sample that each repeats, -1 if none; and the similarities of near ones."""
    seen = _pictures(shards, work, alike, progress)
    digests = np.zeros((len(shards), 2), dtype=np.uint64)

    def text(number: int) -> str:
        return "\n".join(part for _, part in told(shards.read(number, images=False), prompt_only=by == "prompt"))

    with ExitStack() as stack:
        texts = stack.enter_context(NearTexts(work / "bands.bin", len(shards), near)) if near is not None else None
        if by == "pictures":
            digests[:, 0] = seen
        else:
            for number, sample in texts_of(shards, progress, "compare"):
                parts = told(sample, prompt_only=by == "prompt")
                digests[number] = _digest([(role, normalised(part)) for role, part in parts], int(seen[number]))
                if texts is not None:
                    texts.add("\n".join(part for _, part in parts), int(seen[number]))
        of = first_alike(digests)
        if by == "pictures":
            of[seen == 0] = -1
        similarity = {}
        if texts is not None:
            similarity = texts.duplicates(text, of, lambda done, total: progress("compare nearly", done, total))
    return of, similarity


def first_alike(digests: np.ndarray) -> np.ndarray:
    """int64 (N,): for every row of (N, 2) the number of the first equal row, -1 if it is that itself."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal rows stay in their order
    ordered = digests[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = order[begins][np.cumsum(begins) - 1] if len(order) else order
    of = np.full(len(order), -1, dtype=np.int64)
    of[order[~begins]] = firsts[~begins]
    return of


def _digest(parts: list[tuple[str, str]], salt: int) -> np.ndarray:
    joined = hashlib.blake2b(salt.to_bytes(8, "little"), digest_size=16)
    for role, text in parts:
        encoded = text.encode("utf-8", "surrogatepass")
        joined.update(f"{role}{len(encoded)}:".encode() + encoded)
    return np.frombuffer(joined.digest(), dtype=np.uint64)


def _pictures(shards: ShardSet, work: Path, alike: int | None, progress: Progress) -> np.ndarray:
    """uint64 (samples,): one number for the pictures of a sample in their order, 0 without pictures."""
    if alike is None:
        owners, hashes = shards.pictures()
        names = np.unique(hashes, return_inverse=True)[1]
    else:
        prints = prints_of(shards, work, progress)
        owners, names = prints.owners, groups(prints.values, alike)[prints.shown]
    begins = np.searchsorted(owners, np.arange(len(shards) + 1))
    seen = np.zeros(len(shards), dtype=np.uint64)
    for number in np.flatnonzero(np.diff(begins)).tolist():
        joined = hashlib.blake2b(names[begins[number] : begins[number + 1]].astype("<i8").tobytes(), digest_size=8)
        seen[number] = int.from_bytes(joined.digest(), "little") or 1
    return seen
