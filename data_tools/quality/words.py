"""Texts as words: what two texts are compared by."""

from __future__ import annotations

import re
import unicodedata

from mmit.data.sample import Sample

# Scripts written without spaces: Thai, Lao, Burmese, Khmer, kana, Han, each character a word of its own.
ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+")


def normalised(text: str) -> str:
    """The text without differences of case, width, ligatures and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(text: str, size: int) -> list[str]:
    """Every `size` words that follow each other, once each and in order; of a shorter text, all of its words."""
    found = words(text)
    if len(found) <= size:
        return [" ".join(found)] if found else [normalised(text)]
    return list(dict.fromkeys(" ".join(found[i : i + size]) for i in range(len(found) - size + 1)))


def jaccard(one: list[str], other: list[str]) -> float:
    """Share of the shingles of both that stand in each."""
    a, b = set(one), set(other)
    return len(a & b) / len(a | b) if a or b else 1.0


def told(sample: Sample, *, prompt_only: bool) -> list[tuple[str, str]]:
    """Role and text of the messages to compare: all, or those that the model is given."""
    return [(item.role, item.text) for item in sample.messages if not (prompt_only and item.role == "assistant")]
