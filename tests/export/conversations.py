"""Random conversations with histories, as many as asked for and always the same ones."""

from __future__ import annotations

import random

from mmit.data.sample import ImagePart, Part, TextPart, message
from mmit.export.verify import Conversation, picture

WORDS = [
    "What",
    "is",
    "this?",
    "Zoë",
    "two\nlines",
    "世界",
    "a  b",
    "3.14",
    "it's",
    "(x)",
    "-",
    "🙂",
    "USER",
    "user:",
    "end.",
]


def conversations(count: int) -> list[Conversation]:
    """One to four questions, answers between them, zero to three pictures anywhere in the questions."""
    draw = random.Random(0)
    made = []
    for _ in range(count):
        messages, sizes = [], []
        if draw.random() < 0.3:
            messages.append(message("system", _text(draw)))
        turns = draw.randint(1, 4)
        for turn in range(turns):
            parts: list[Part] = [TextPart(_text(draw))]
            if draw.random() < 0.5 and len(sizes) < 3:
                parts.insert(draw.randint(0, 1), ImagePart(len(sizes)))
                sizes.append((draw.randint(5, 90), draw.randint(5, 90)))
            messages.append(message("user", *parts))
            if turn < turns - 1:
                messages.append(message("assistant", _text(draw)))
        made.append(Conversation(tuple(messages), tuple(picture(*size) for size in sizes)))
    return made


def _text(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6))).strip()
