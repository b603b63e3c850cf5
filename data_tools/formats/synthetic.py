"""Samples made in code: one coloured shape on a plain ground, and questions about it. For trials, tests and tiny.yaml.

INPUT is `shapes` (questions with short answers) or `captions` (one sentence). Sample i depends on the seed and i alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_tools.album import unread
from mmit.config import ConfigError
from mmit.data.sample import ImagePart, Sample, message

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 220), "yellow": (235, 210, 40)}
GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle")


def samples(
    path: Path, images: Path | None = None, *, count: int = 256, seed: int = 0, side: int = 32, questions: int = 2
) -> Iterator[Sample]:
    """`count` pictures of `side` x `side` pixels; `questions` per picture, asked in one conversation."""
    del images
    if str(path) not in ("shapes", "captions"):
        raise ConfigError(f"synthetic: {str(path)!r} is unknown; write shapes or captions")
    if count < 1 or side < 8 or not 1 <= questions <= 4:
        raise ConfigError("synthetic: count must be at least 1, side at least 8 and questions 1 to 4")
    return _make(str(path), count, seed, side, questions)


def _make(kind: str, count: int, seed: int, side: int, questions: int) -> Iterator[Sample]:
    for number in range(count):
        random = np.random.default_rng([seed, number])
        shape = str(random.choice(SHAPES))
        colour, ground = str(random.choice(list(COLOURS))), str(random.choice(list(GROUNDS)))
        picture = unread(_draw(shape, COLOURS[colour], GROUNDS[ground], side, random), f"synthetic {kind} {number}")
        meta = {"shape": shape, "colour": colour, "ground": ground}
        if kind == "captions":
            pairs = [("Describe the picture.", f"A {colour} {shape} on a {ground} ground.")]
        else:
            other = str(random.choice([name for name in SHAPES if name != shape]))
            asked = shape if random.random() < 0.5 else other
            pairs = [
                ("Which shape is shown?", shape),
                ("What colour is the shape?", colour),
                ("What colour is the ground?", ground),
                (f"Is there a {asked}?", "yes" if asked == shape else "no"),
            ]
            pairs = [pairs[index] for index in random.permutation(4)[:questions]]
        messages = []
        for turn, (question, answer) in enumerate(pairs):
            shown = (ImagePart(0), f"\n{question}") if turn == 0 else (question,)
            messages += [message("user", *shown), message("assistant", answer)]
        yield Sample("", "", tuple(messages), (picture,), meta)


def _draw(
    shape: str, colour: tuple[int, int, int], ground: tuple[int, int, int], side: int, random: np.random.Generator
) -> bytes:
    page = Image.new("RGB", (side, side), ground)
    size = int(random.integers(side // 3, side * 2 // 3 + 1))
    left, top = (int(random.integers(1, side - size)) for _ in range(2))
    right, bottom = left + size - 1, top + size - 1
    pen = ImageDraw.Draw(page)
    match shape:
        case "circle":
            pen.ellipse((left, top, right, bottom), fill=colour)
        case "square":
            pen.rectangle((left, top, right, bottom), fill=colour)
        case "triangle":
            pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)
    stream = io.BytesIO()
    page.save(stream, format="PNG")
    return stream.getvalue()
