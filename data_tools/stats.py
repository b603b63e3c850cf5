"""What is in a shard set, as numbers and as one HTML page that needs nothing else: no script, no fetch."""

from __future__ import annotations

import base64
import html
import io
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.convert import conversion
from data_tools.lettering import lettering
from data_tools.mix import in_epoch, weighted
from data_tools.show import chat_of, plain_box
from mmit.config import ConfigError
from mmit.data.chat import Chat, cut
from mmit.data.sample import SampleError
from mmit.data.shards import ShardSet


@dataclass
class Stats:
    """What was counted of one set. Lists have an entry for each sample that was looked at, but for `sizes`."""

    folder: Path
    repeat: float
    samples: int
    looked_at: int = 0
    """Samples read for turns and tokens: all, or a draw by the seed."""
    sources: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    """Samples by how many answers are trained."""
    images: Counter[int] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    """Tokens within the limit, trailing turns left out; 0 where the first turn does not fit."""
    trained: list[int] = field(default_factory=list)
    """Of those kept."""
    unreadable: int = 0
    """Samples that the chat format cannot express."""

    @property
    def taken(self) -> int:
        """Samples of an epoch."""
        return in_epoch(self.samples, self.repeat)

    def of_epoch(self, counted: int) -> int:
        """What was counted over the samples looked at, over those of an epoch."""
        return round(counted * self.taken / self.looked_at) if self.looked_at else 0


def measure(
    sources: Sequence[str | Path],
    *,
    language: str | None,
    chat: str,
    image_tokens: int,
    max_tokens: int = 2048,
    most: int = 20_000,
    seed: int = 0,
) -> list[Stats]:
    """Counts each `FOLDER` or `FOLDER=REPEAT`; of large sets, `most` samples."""
    binding = chat_of(language, chat) if language is not None else None
    found = []
    for source in sources:
        folder, repeat = weighted(source)
        found.append(_measured(ShardSet(folder), repeat, binding, image_tokens, max_tokens, most, seed))
    return found


def _measured(
    samples: ShardSet, repeat: float, binding: Chat | None, image_tokens: int, max_tokens: int, most: int, seed: int
) -> Stats:
    if not len(samples):
        raise ConfigError(f"{samples.folder}: the set is empty")
    chosen = np.arange(len(samples))
    if len(samples) > most:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(samples))[:most])
    stats = Stats(samples.folder, repeat, len(samples), len(chosen))
    for number in map(int, chosen):
        sample = samples.read(number, images=False)
        stats.sources[sample.source] += 1
        stats.turns[sum(item.train for item in sample.messages)] += 1
        stats.images[len(sample.images)] += 1
        stats.sizes.extend((picture.width, picture.height) for picture in sample.images)
        stats.characters.append(samples.characters(number))
        if binding is None:
            continue
        try:
            rendered = binding.render(sample, [image_tokens] * len(sample.images), boxes=plain_box)
        except SampleError:
            stats.unreadable += 1
            continue
        whole = cut(rendered, max_tokens, "cut")
        stats.tokens.append(len(rendered))
        stats.kept.append(len(whole) if whole is not None else 0)
        stats.trained.append(int((whole.labels != -100).sum()) if whole is not None else 0)
    return stats


def summary(stats: Stats, *, max_tokens: int) -> list[tuple[str, str]]:
    """Names and figures of one set."""
    pictures = len(stats.sizes)
    drawn = f" ({stats.looked_at:,} looked at)" if stats.looked_at < stats.samples else ""
    lines = [
        ("samples", f"{stats.samples:,}{drawn}"),
        ("sources", ", ".join(f"{name} {count:,}" for name, count in stats.sources.most_common(30))),
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
        lost = sum(length == 0 for length in stats.kept)
        rows = packed_rows(stats.kept, max_tokens)
        lines += [
            ("tokens", _spread(stats.tokens)),
            ("trained tokens", f"{_spread(stats.trained)}; {sum(stats.trained) / (sum(stats.kept) or 1):.1%} of all"),
            (
                f"longer than {max_tokens}",
                f"{over:,} of {len(stats.tokens):,}: {over - lost:,} lose trailing turns, {lost:,} are left out",
            ),
            (
                f"packed rows of {max_tokens}",
                f"{len(rows):,}, {sum(rows) / (len(rows) * max_tokens):.1%} full" if rows else "none",
            ),
        ]
    if stats.unreadable:
        lines.append(("not expressible in this chat format", f"{stats.unreadable:,}"))
    return lines


def epoch(found: Sequence[Stats]) -> list[list[str]]:
    """A table of what an epoch over these sets sees, first its heads, last its sums; drawn sets are projected."""
    heads = ["set", "repeat", "samples", "pictures", "tokens", "trained tokens", "share of trained"]
    counted = [
        [stats.taken, *(stats.of_epoch(n) for n in (len(stats.sizes), sum(stats.kept), sum(stats.trained)))]
        for stats in found
    ]
    sums = [sum(column) for column in zip(*counted, strict=True)]
    table = [
        [
            stats.folder.name,
            f"{stats.repeat:g}",
            *(f"{n:,}" for n in row),
            f"{row[-1] / sums[-1]:.1%}" if sums[-1] else "",
        ]
        for stats, row in zip(found, counted, strict=True)
    ]
    told = [heads, *table, ["together", "", *(f"{n:,}" for n in sums), ""]]
    columns = len(heads) if sums[-1] else 4  # without a tokenizer no tokens are counted
    return [row[:columns] for row in told]


def packed_rows(lengths: Sequence[int], capacity: int) -> list[int]:
    """How full the rows are into which these fit, none longer than a row: longest first, each into the fullest row."""
    free: list[int] = []
    for length in sorted((length for length in lengths if length), reverse=True):
        place = bisect_left(free, length)
        insort(free, (free.pop(place) if place < len(free) else capacity) - length)
    return [capacity - room for room in free]


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "none"
    low, middle, high = np.percentile(values, [0, 50, 100])
    return f"{low:,.0f} to {high:,.0f}, half below {middle:,.0f}, mean {np.mean(values):,.1f}"


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"><title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}}
th{{text-align:left;padding-right:2em;font-weight:600;vertical-align:top}} td{{padding-right:2em}}
.figures td,.figures th{{text-align:right}} .figures :first-child{{text-align:left}}
.figures tr:last-child td{{border-top:1px solid #999}}
img{{width:31%;min-width:280px;margin:.5%}} h2{{margin-top:1.6em}}</style></head><body>
<h1>{title}</h1><h2>An epoch</h2>{epoch}{body}</body></html>
"""


def report(found: Sequence[Stats], *, max_tokens: int) -> str:
    """The HTML page."""
    parts = [_pictures(_mixture(found))] if len(found) > 1 else []
    for stats in found:
        parts.append(f"<h2>{html.escape(stats.folder.name)}</h2>")
        rows = [
            f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>"
            for n, v in summary(stats, max_tokens=max_tokens)
        ]
        parts.append(f"<table>{''.join(rows)}</table>")
        made = conversion(stats.folder) or {}
        if made.get("rejected"):
            parts.append(f"<p>{made['rejected']:,} of {made['rows']:,} rows were rejected.</p>")
        parts.append(_pictures(_charts(stats, max_tokens)))
    heads, *rows = epoch(found)
    table = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    for row in rows if len(found) > 1 else rows[:1]:
        table += "</tr><tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
    title = html.escape(", ".join(stats.folder.name for stats in found))
    return PAGE.format(title=title, epoch=f'<table class="figures"><tr>{table}</tr></table>', body="".join(parts))


def _pictures(pngs: Sequence[str]) -> str:
    return "".join(f'<img alt="" src="data:image/png;base64,{png}">' for png in pngs)


def _mixture(found: Sequence[Stats]) -> list[str]:
    measures = {"samples": [stats.taken for stats in found]}
    measures["pictures"] = [stats.of_epoch(len(stats.sizes)) for stats in found]
    measures["trained tokens"] = [stats.of_epoch(sum(stats.trained)) for stats in found]
    names = [stats.folder.name for stats in found]
    return [_shares(f"an epoch: {name}", names, values) for name, values in measures.items() if sum(values)]


def _charts(stats: Stats, max_tokens: int) -> list[str]:
    charts = [
        _counted("answers a sample", stats.turns),
        _counted("pictures a sample", stats.images),
        _histogram("characters a sample", stats.characters),
    ]
    if stats.tokens:
        charts.append(_histogram(f"tokens a sample (line: {max_tokens}, the limit)", stats.tokens, line=max_tokens))
        charts.append(_histogram("trained tokens a sample", stats.trained))
        charts.append(
            _histogram(
                f"tokens in packed rows of {max_tokens}",
                packed_rows(stats.kept, max_tokens),
                of="rows",
                most=max_tokens,
            )
        )
    if stats.sizes:
        charts.append(_scatter(stats.sizes))
    if len(stats.sources) > 1:
        names, counts = zip(*stats.sources.most_common(), strict=True)
        charts.append(_shares("samples by source", names, counts))
    return charts


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.2, 2.8), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(labelsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any, axes: Any, title: str) -> str:
    axes.set_title(title, fontsize=10, loc="left")
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return base64.b64encode(stream.getvalue()).decode()


def _shares(title: str, names: Sequence[str], values: Sequence[int]) -> str:
    """A bar for each name with its share; the many small ones of a long list together."""
    shown = [*zip(names, values, strict=True)]
    if len(shown) > 20:
        shown = [*shown[:19], (f"{len(shown) - 19} others", sum(value for _, value in shown[19:]))]
    figure, axes = _figure()
    # Folders may have the same name, so bars are told apart by their place.
    bars = axes.barh(range(len(shown)), [value for _, value in shown], color="#4477aa")
    font = lettering("".join(name for name, _ in shown))
    told = [font.drawn(name[:24]) for name, _ in shown]
    axes.set_yticks(range(len(shown)), told, fontsize=8, parse_math=False, fontfamily=font.families)
    axes.bar_label(bars, [f" {value / (sum(values) or 1):.1%}" for _, value in shown], fontsize=8)
    axes.margins(x=0.18)
    axes.invert_yaxis()
    return _png(figure, axes, font.drawn(title))


def _counted(title: str, counts: Mapping[int, int]) -> str:
    """How many samples have each number."""
    if max(counts) > 40:
        return _histogram(title, [number for number, count in counts.items() for _ in range(count)])
    figure, axes = _figure()
    axes.bar(list(counts), list(counts.values()), color="#4477aa")
    axes.set_xlim(-0.6, max(1, *counts) + 0.6)
    axes.set_ylabel("samples", fontsize=8)
    return _png(figure, axes, title)


def _histogram(
    title: str, values: Sequence[int], *, of: str = "samples", line: int | None = None, most: int | None = None
) -> str:
    figure, axes = _figure()
    axes.set_ylabel(of, fontsize=8)
    axes.hist(values, bins=min(50, max(1, len(set(values)))), range=(0, most) if most else None, color="#4477aa")
    if line is not None:
        axes.axvline(line, color="#cc3311")
    return _png(figure, axes, title)


def _scatter(sizes: Sequence[tuple[int, int]]) -> str:
    """At most 5,000 points, taken evenly."""
    figure, axes = _figure()
    axes.scatter(*zip(*sizes[:: -(-len(sizes) // 5000)], strict=True), s=6, alpha=0.4, color="#4477aa")
    axes.set_xlim(0, 1.05 * max(width for width, _ in sizes))
    axes.set_ylim(0, 1.05 * max(height for _, height in sizes))
    axes.set_xlabel("width", fontsize=8)
    axes.set_ylabel("height", fontsize=8)
    return _png(figure, axes, "picture sizes in pixels")
