"""Pictures of a run: its losses, and pictures with questions and answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmit.data.images import decode
from mmit.data.sample import Sample
from mmit.evaluation.answers import Answered


def loss_plot(run: Path, out: Path) -> Path:
    """The loss of every step, stage after stage, and the held-out loss of each source, as a PNG."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    start = 0
    for number, stage in enumerate(dict.fromkeys(record["stage"] for record in records)):
        mine = [record for record in records if record["stage"] == stage]
        losses = {record["step"]: record["loss"] for record in mine if "loss" in record}
        axes.plot([start + step for step in losses], list(losses.values()), color=f"C{number}", alpha=0.35, lw=1)
        axes.plot(*_smooth(losses, start), color=f"C{number}", lw=2, label=f"{stage}: training")
        held_out = [record for record in mine if "held_out" in record]
        for line, title in enumerate(dict.fromkeys(title for record in held_out for title in record["held_out"])):
            points = {record["step"]: record["held_out"][title] for record in held_out if title in record["held_out"]}
            label = f"{stage}: held out, {title}"
            axes.plot(
                [start + s for s in points],
                list(points.values()),
                "o",
                color=f"C{number}",
                ms=5 + line,
                label=label,
                clip_on=False,
            )
        start += max(losses, default=0)
        axes.axvline(start, color="0.8", lw=1, zorder=0)
    axes.set(xlabel="step", ylabel="loss per learned token", title="Loss", xlim=(0, max(start, 1)), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _write(figure, out)


def answer_grid(samples: Sequence[Sample], answered: Sequence[Answered], out: Path, *, columns: int = 4) -> Path:
    """Each sample's first picture above its questions and the answers given: green if right, red if not."""
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(3.2 * columns, 4.2 * rows))
    figure.subplots_adjust(left=0.02, right=0.98, top=0.99, bottom=0.28 / rows, wspace=0.1, hspace=0.4)
    by_sample: dict[str, list[Answered]] = {}
    for item in answered:
        by_sample.setdefault(item.where, []).append(item)
    for place, sample in enumerate(samples):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_axis_off()
        where = f"{sample.source}:{sample.key}"
        picture: Any = sample.images[0]
        axes.imshow(decode(picture.data, where, window=picture.window), interpolation="nearest")
        for line, item in enumerate(by_sample.get(where, ())):
            text = f"{item.question[:42]}\n{item.answer[:30]}" + ("" if item.correct else f"  (not {item.expected})")
            color = "tab:green" if item.correct else "tab:red"
            axes.text(0.5, -0.04 - 0.17 * line, text, transform=axes.transAxes, ha="center", va="top", color=color)
    return _write(figure, out)


def _smooth(losses: dict[int, float], start: int) -> tuple[list[int], list[float]]:
    """A running mean over a tenth of the steps."""
    steps, values = list(losses), list(losses.values())
    width = max(1, len(values) // 10)
    means = [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]
    return [start + step for step in steps], means


def _write(figure: Figure, out: Path) -> Path:
    FigureCanvasAgg(figure).print_png(str(out))
    return out
