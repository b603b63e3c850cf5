"""Texts that are nearly the same, among millions, in memory that does not grow with their lengths.

MinHash (Broder 1997) through rensa: similar texts probably agree in a band of their signatures. The bands lie in a file
and are compared one at a time, with some 50 bytes of memory for each text. Whoever agrees in a band is read again and
compared in truth, so nothing is called a duplicate by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np

from data_tools.quality.words import jaccard, shingles
from mmit.config import ConfigError
from mmit.data.files import named

PERMUTATIONS = 128
SEED = 1
FOUND = 0.98
"""Share of the pairs just at the threshold that some band brings together."""
MOST_COMPARED = 32
"""In a band that many texts share, such as a template, each is compared with this many that came before it."""
CHUNK = 2000
WORDS = 3
"""Words of a shingle. Of 25 words with one changed, 3 of 23 shingles change; 5 words would make it 5 of 21, and
instructions are short."""


def check_threshold(threshold: float) -> float:
    if not 0.3 <= threshold <= 1:
        raise ConfigError(f"--near {threshold}: the share of common word triples, 0.3 to 1; 0.7 is a good start")
    try:
        import rensa  # noqa: F401
    except ImportError:
        raise ConfigError("--near needs rensa; pip install 'mmit[quality]'") from None
    return threshold


def rows_of_band(threshold: float) -> int:
    """The most rows of a band with which a pair of this similarity is still found: the fewest false candidates."""
    fitting = [r for r in range(1, 17) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= FOUND]
    return max(fitting, default=1)


class NearTexts:
    """Takes every text once, in order, then tells which are nearly the same as an earlier one."""

    def __init__(self, path: Path, samples: int, threshold: float) -> None:
        check_threshold(threshold)
        from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue] it carries no types

        self.sketch = RMinHash.digest_matrix_from_token_sets
        self.threshold, self.samples = threshold, samples
        self.rows = rows_of_band(threshold)
        self.bands = PERMUTATIONS // self.rows
        self.path = path
        self.file = path.open("w+b")
        self.taken = 0
        self.waiting: list[list[str]] = []
        self.salts: list[int] = []

    def __enter__(self) -> NearTexts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # on a full disk closing fails too
            self.file.close()
        self.path.unlink(missing_ok=True)

    def add(self, text: str, salt: int) -> None:
        """The next text; only texts of the same salt can be duplicates."""
        self.waiting.append(shingles(text, WORDS))
        self.salts.append(salt)
        if len(self.waiting) == CHUNK:
            self._write()

    def _write(self) -> None:
        if not self.waiting:
            return
        rows = self.sketch(self.waiting, num_perm=PERMUTATIONS, seed=SEED).to_rows()
        signatures = np.array(rows, dtype=np.uint64)[:, : self.bands * self.rows]
        signatures = signatures.reshape(len(rows), self.bands, self.rows)
        keys = np.repeat(np.array(self.salts, dtype=np.uint64)[:, None], self.bands, axis=1)
        for row in range(self.rows):
            keys = _mixed(keys ^ signatures[:, :, row])
        with named(self.path):
            for band in range(self.bands):
                self.file.seek((band * self.samples + self.taken) * 8)
                self.file.write(keys[:, band].tobytes())
            self.file.flush()
        self.taken += len(rows)
        self.waiting, self.salts = [], []

    def duplicates(
        self, read: Callable[[int], str], of: np.ndarray, progress: Callable[[int, int], None]
    ) -> dict[int, float]:
        """Sets `of` (int64, -1 for what stays) of every near duplicate to an earlier text; gives their similarities.

        What is already marked in `of` is left alone. The text that a duplicate names may be one itself.
        """
        self._write()
        assert self.taken == self.samples, "every sample has a text"

        @lru_cache(maxsize=512)
        def shingles_of(number: int) -> list[str]:
            return shingles(read(number), WORDS)

        similarity: dict[int, float] = {}
        for band in range(self.bands):
            progress(band, self.bands)
            self.file.seek(band * self.samples * 8)
            keys = np.frombuffer(self.file.read(self.samples * 8), dtype=np.uint64)
            for members in _sharing(keys, of < 0):
                originals = [members[0]]
                for number in members[1:]:
                    for original in originals:
                        value = jaccard(shingles_of(number), shingles_of(original))
                        if value >= self.threshold:
                            of[number], similarity[number] = original, round(value, 4)
                            break
                    else:
                        if len(originals) < MOST_COMPARED:
                            originals.append(number)
        progress(self.bands, self.bands)
        return similarity


def _sharing(keys: np.ndarray, among: np.ndarray) -> list[list[int]]:
    """Lists of numbers with equal keys, each ascending."""
    numbers = np.flatnonzero(among)
    values = keys[numbers]
    order = np.argsort(values, kind="stable")
    values = values[order]
    begins = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if len(values) else np.empty(0, int)
    ends = np.append(begins[1:], len(values))
    large = ends - begins > 1
    return [numbers[order[a:b]].tolist() for a, b in zip(begins[large], ends[large], strict=True)]


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64 spread over all bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
