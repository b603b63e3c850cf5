"""What is in a shard set, as numbers and as one HTML page that needs nothing else: no script, no fetch."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.convert import conversion
from data_tools.show import chat_of, plain_box
from mmit.config import ConfigError
from mmit.data.sample import SampleError
from mmit.data.shards import ShardSet


@dataclass(frozen=True)
class Stats:
    samples: int
    looked_at: int
    """Samples read for turns and tokens: all, or a draw by the seed."""
    sources: Counter[str]
    turns: Counter[int]
    """Samples by how many answers are trained."""
    images: Counter[int]
    sizes: list[tuple[int, int]]
    characters: list[int]
    tokens: list[int]
    trained: list[int]
    unreadable: int
    """Samples that the chat format cannot express."""


def measure(
    shards: Path, *, language: str | None, chat: str, image_tokens: int, most: int = 20_000, seed: int = 0
) -> Stats:
    samples = ShardSet(shards)
    if not len(samples):
        raise ConfigError(f"{shards}: the set is empty")
    chosen = np.arange(len(samples))
    if len(samples) > most:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(samples))[:most])
    binding = chat_of(language, chat) if language is not None else None
    stats = Stats(len(samples), len(chosen), Counter(), Counter(), Counter(), [], [], [], [], 0)
    unreadable = 0
    for number in map(int, chosen):
        sample = samples.read(number, images=False)
        stats.sources[sample.source] += 1
        stats.turns[sum(item.train for item in sample.messages)] += 1
        stats.images[len(sample.images)] += 1
        stats.sizes.extend((picture.width, picture.height) for picture in sample.images)
        stats.characters.append(samples.characters(number))
        if binding is not None:
            try:
                rendered = binding.render(sample, [image_tokens] * len(sample.images), boxes=plain_box)
            except SampleError:
                unreadable += 1
                continue
            stats.tokens.append(len(rendered))
            stats.trained.append(int((rendered.labels != -100).sum()))
    return Stats(**{**vars(stats), "unreadable": unreadable})


def summary(stats: Stats, *, max_tokens: int) -> list[tuple[str, str]]:
    pictures = len(stats.sizes)
    lines = [
        (
            "samples",
            f"{stats.samples:,}" + (f" ({stats.looked_at:,} looked at)" if stats.looked_at < stats.samples else ""),
        ),
        ("sources", ", ".join(f"{name} {count:,}" for name, count in stats.sources.most_common())),
        ("answers a sample", _spread(list(stats.turns.elements()))),
        ("pictures a sample", _spread(list(stats.images.elements()))),
        ("characters", _spread(stats.characters)),
    ]
    if pictures:
        long = sum(max(width, height) > 20 * min(width, height) for width, height in stats.sizes)
        lines.append(("picture width", _spread([width for width, _ in stats.sizes])))
        lines.append(("picture height", _spread([height for _, height in stats.sizes])))
        lines.append(("longer than 20:1", f"{long:,} of {pictures:,}"))
    if stats.tokens:
        over = sum(length > max_tokens for length in stats.tokens)
        rows = packed_rows(stats.tokens, max_tokens)
        share = sum(min(length, max_tokens) for length in stats.tokens) / (rows * max_tokens)
        lines += [
            ("tokens", _spread(stats.tokens)),
            ("trained tokens", f"{_spread(stats.trained)}; {sum(stats.trained) / sum(stats.tokens):.1%} of all"),
            (f"longer than {max_tokens}", f"{over:,} of {len(stats.tokens):,}"),
            (f"packed rows of {max_tokens}", f"{rows:,}, {share:.1%} full"),
        ]
    if stats.unreadable:
        lines.append(("not expressible in this chat format", f"{stats.unreadable:,}"))
    return lines


def packed_rows(lengths: Sequence[int], capacity: int) -> int:
    """Rows that first-fit decreasing needs; over-long samples count as cut to one whole row."""
    free: Counter[int] = Counter()
    rows = 0
    for length in sorted((min(length, capacity) for length in lengths), reverse=True):
        room = next((room for room in range(length, capacity + 1) if free[room]), None)
        if room is None:
            rows, room = rows + 1, capacity
        else:
            free[room] -= 1
        free[room - length] += 1
    return rows


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "none"
    low, middle, high = np.percentile(values, [0, 50, 100])
    return f"{low:,.0f} to {high:,.0f}, half below {middle:,.0f}, mean {np.mean(values):,.1f}"


def report(shards: Path, stats: Stats, *, max_tokens: int) -> str:
    """The HTML page."""
    pictures = [_bars("answers a sample", stats.turns), _bars("pictures a sample", stats.images)]
    pictures.append(_histogram("characters", stats.characters))
    if stats.tokens:
        pictures.append(_histogram("tokens (line: cut)", stats.tokens, line=max_tokens))
        pictures.append(_histogram("trained tokens", stats.trained))
    if stats.sizes:
        pictures.append(_scatter(stats.sizes))
    if len(stats.sources) > 1:
        pictures.append(_bars("samples by source", stats.sources))
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in summary(stats, max_tokens=max_tokens)
    )
    made = conversion(shards) or {}
    rejected = f"<p>{made['rejected']:,} of {made['rows']:,} rows were rejected.</p>" if made.get("rejected") else ""
    images = "".join(f'<img alt="" src="data:image/png;base64,{picture}">' for picture in pictures)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{html.escape(shards.name)}</title><style>body{{font:15px/1.5 system-ui,sans-serif;max-width:70em;"
        "margin:2em auto;padding:0 1em;color:#222}th{text-align:left;padding-right:2em;font-weight:600;vertical-align:"
        "top}img{width:31%;min-width:280px;margin:.5%}</style></head><body>"
        f"<h1>{html.escape(shards.name)}</h1><table>{rows}</table>{rejected}{images}</body></html>\n"
    )


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.8), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any, axes: Any, title: str) -> str:
    axes.set_title(title, fontsize=10, loc="left")
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return base64.b64encode(stream.getvalue()).decode()


def _bars(title: str, counts: Counter[Any]) -> str:
    figure, axes = _figure()
    named = sorted(counts.items())[:30]
    axes.barh([str(name)[:30] for name, _ in named], [count for _, count in named], color="#4477aa")
    axes.invert_yaxis()
    return _png(figure, axes, title)


def _histogram(title: str, values: Sequence[int], *, line: int | None = None) -> str:
    figure, axes = _figure()
    axes.hist(values, bins=min(50, max(1, len(set(values)))), color="#4477aa")
    if line is not None:
        axes.axvline(line, color="#cc3311")
    return _png(figure, axes, title)


def _scatter(sizes: Sequence[tuple[int, int]]) -> str:
    figure, axes = _figure()
    axes.scatter(*zip(*sizes[:5000], strict=True), s=4, alpha=0.3, color="#4477aa")
    axes.set_xlabel("width", fontsize=8)
    axes.set_ylabel("height", fontsize=8)
    return _png(figure, axes, "picture sizes")
