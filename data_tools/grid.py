"""Pictures of a shard set on one page, each with its question and answer: a PNG to look at before training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.lettering import lettering, wrapped
from mmit.config import ConfigError
from mmit.data.files import whole
from mmit.data.images import decode
from mmit.data.sample import Sample
from mmit.data.shards import ShardSet


def grid(shards: Path | str, out: Path, *, count: int = 24, columns: int = 6, seed: int = 0) -> tuple[int, str]:
    """Writes the page; gives how many samples are on it, drawn by the seed from those with pictures, and a notice where
    letters could not be drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: the page is a PNG; write a name that ends in .png")
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
    chosen.sort()
    samples = samples.for_few(chosen)
    columns = min(columns, len(chosen))
    rows = -(-len(chosen) // columns)
    titles = [_title(samples.read(number, images=False), number) for number in chosen]
    font = lettering("".join(titles))
    figure = Figure(figsize=(2.6 * columns, 3.4 * rows), dpi=100)
    FigureCanvasAgg(figure)
    for place, (number, title) in enumerate(zip(chosen, titles, strict=True)):
        picture = samples.read(number).images[0]
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(decode(picture.data or b"", samples.where(number), window=picture.window))
        axes.set_axis_off()
        axes.set_title(font.drawn(title), fontsize=7, loc="left", parse_math=False, fontfamily=font.families)
    figure.tight_layout()
    with whole(out) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return len(chosen), font.notice


def _title(sample: Sample, number: int) -> str:
    more = f" (+{len(sample.images) - 1} pictures)" if len(sample.images) > 1 else ""
    asked = next((item.text for item in sample.messages if item.role == "user"), "").strip()
    said = next((item.text for item in sample.messages if item.train), "").strip()
    lines = [f"{number}{more}"]
    for mark, text in (("Q", asked), ("A", said)):
        lines += wrapped(f"{mark}: {text}", 40, most=2) if text else []
    return "\n".join(lines)
