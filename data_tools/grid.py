"""Pictures of a shard set on one page, each with its question and answer: a PNG to look at before training."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmit.config import ConfigError
from mmit.data.images import decode
from mmit.data.sample import Sample
from mmit.data.shards import ShardSet


def grid(shards: Path | str, out: Path, *, count: int = 24, columns: int = 6, seed: int = 0) -> int:
    """Writes the page and says how many samples are on it; they are drawn by the seed from those with pictures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samples = ShardSet(shards)
    order = np.random.default_rng(seed).permutation(len(samples))
    chosen: list[int] = []
    for number in order:
        if samples.image_sizes(int(number)):
            chosen.append(int(number))
        if len(chosen) == count:
            break
    if not chosen:
        raise ConfigError(f"{shards}: no sample has a picture, so there is nothing to lay out")
    rows, font = -(-len(chosen) // columns), _font()
    figure = Figure(figsize=(2.6 * columns, 3.4 * rows), dpi=100)
    FigureCanvasAgg(figure)
    for place, number in enumerate(sorted(chosen)):
        sample = samples.read(number)
        picture = sample.images[0]
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(decode(picture.data or b"", samples.where(number), window=picture.window))
        axes.set_axis_off()
        title = "".join(
            letter if ord(letter) in font.letters or letter == "\n" else "?" for letter in _title(sample, number)
        )
        axes.set_title(title, fontsize=7, loc="left", parse_math=False, fontfamily=font.families)
    figure.tight_layout()
    figure.savefig(out, metadata={"Software": None})
    return len(chosen)


def _title(sample: Sample, number: int) -> str:
    more = f" (+{len(sample.images) - 1} pictures)" if len(sample.images) > 1 else ""
    asked = next((item.text for item in sample.messages if item.role == "user"), "").strip()
    said = next((item.text for item in sample.messages if item.train), "").strip()
    lines = [f"{number}{more}"]
    for mark, text in (("Q", asked), ("A", said)):
        width = 40 if text.isascii() else 26  # Chinese letters are twice as wide
        lines += textwrap.wrap(f"{mark}: {text}", width, max_lines=2, placeholder=" ...") if text else []
    return "\n".join(lines)


@dataclass(frozen=True)
class _Font:
    families: list[str]
    letters: set[int]
    """All that can be drawn with them."""


FAMILIES = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Source Han Sans SC"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB"),
    "Arial Unicode MS",
)
"""Fonts for most scripts; matplotlib brings the first itself, the others are used where they are installed."""


def _font() -> _Font:
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    paths = {entry.name: entry.fname for entry in reversed(fontManager.ttflist) if entry.name in FAMILIES}
    families = [name for name in FAMILIES if name in paths]
    return _Font(families, {letter for name in families for letter in FT2Font(paths[name]).get_charmap()})
