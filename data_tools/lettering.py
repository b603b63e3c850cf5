"""Fonts for texts of any script in pictures: those that are installed, and which letters none of them has."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

FAMILIES = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Source Han Sans SC"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB"),
    "Arial Unicode MS",
)
"""Those that are tried first; matplotlib brings the first itself."""


@dataclass(frozen=True)
class Lettering:
    """How texts are drawn."""

    families: list[str]
    missing: frozenset[str]
    """Letters that no font has."""

    def drawn(self, text: str) -> str:
        """The text with `?` for what would be an empty box."""
        return "".join("?" if letter in self.missing else letter for letter in text)

    @property
    def notice(self) -> str:
        """What to tell whoever misses letters, or nothing."""
        if not self.missing:
            return ""
        shown = "".join(sorted(self.missing)[:10])
        told = f"no font of this machine has {len(self.missing)} letters of the texts ({shown}), which stand as ?"
        return f"{told}; install one that does, such as Noto Sans CJK"


def lettering(text: str) -> Lettering:
    """The fonts that together have most letters of a text; others than the usual ones only where those fail."""
    from matplotlib.ft2font import FT2Font

    families: list[str] = []
    missing = set(text) - {"\n"}
    for name, file in _fonts():
        usual = name in FAMILIES
        if not missing and not usual:
            break
        try:
            letters = set(map(chr, FT2Font(file).get_charmap()))
        except (OSError, RuntimeError):  # a bitmap font, or one that has gone since matplotlib listed it
            continue
        if usual or letters & missing:
            families.append(name)
            missing -= letters
    return Lettering(families, frozenset(missing))


def _fonts() -> Iterator[tuple[str, str]]:
    """Each installed family once with its file, upright ones, the usual first."""
    from matplotlib.font_manager import fontManager

    # Last Resort, which matplotlib brings, has a box for every letter there is.
    found = {
        entry.name: entry.fname
        for entry in reversed(fontManager.ttflist)
        if entry.style == "normal" and not entry.name.startswith("Last Resort")
    }
    yield from ((name, found.pop(name)) for name in FAMILIES if name in found)
    yield from sorted(found.items())


def wrapped(text: str, columns: int, *, most: int) -> list[str]:
    """The text in at most so many lines of so many columns; Chinese letters are twice as wide and break anywhere."""
    lines, line, used = [], "", 0
    pieces = re.findall(r"[\u1100-\uffef]|[^\s\u1100-\uffef]+|\s+", text)
    cut = [piece[start : start + columns] for piece in pieces for start in range(0, len(piece), columns)]
    for piece in (" " if piece.isspace() else piece for piece in cut):
        wide = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in piece)
        if used + wide > columns and line:
            lines.append(line.rstrip())
            line, used = "", 0
        if line or piece != " ":
            line, used = line + piece, used + wide
    lines.append(line.rstrip())
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]} ..."]
