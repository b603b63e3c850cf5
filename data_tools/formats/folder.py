"""A folder of pictures, each with a text of the same name beside it: x.jpg and x.txt.

A picture without a text, or a text without a picture, is rejected by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, files_below, text_beside
from data_tools.turns import Turn, asked_about, sample_of, text_of
from mmit.config import ConfigError
from mmit.data.sample import ImagePart, Sample, SampleError, TextPart

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def samples(
    path: Path,
    images: Path | None = None,
    *,
    prompt: str = "Describe the image.",
    ending: str = ".txt",
    strip: bool = True,
) -> Iterator[Sample | Rejected]:
    if not path.is_dir():
        raise ConfigError(f"{path}: not a folder; this format reads a folder of pictures and texts")
    root = (images or path).resolve()
    album = Album(root)

    def rows() -> Iterator[Row]:
        stems: dict[str, dict[str, Path]] = {}
        for file in files_below(root):
            kind = (
                "picture"
                if file.suffix.lower() in PICTURES
                else "text"
                if file.suffix.lower() == ending.lower()
                else ""
            )
            if kind and (file.is_file() or file.is_symlink()):
                stem = str(file.relative_to(root).with_suffix(""))
                stems.setdefault(stem, {})[kind if kind not in stems.get(stem, {}) else "second"] = file
        for number, (stem, found) in enumerate(sorted(stems.items())):
            yield Row(path.name, number, f"{path.name}/{stem}", {"id": stem, **found})

    def sample(row: Row) -> Sample:
        found = row.record
        if "second" in found:
            raise SampleError(f"{row.where}: two pictures share this name; give each its own text")
        for kind in ("picture", "text"):
            if kind not in found:
                other = found["text" if kind == "picture" else "picture"].name
                raise SampleError(f"{row.where}: {other} has no {kind} of the same name beside it")
        text = text_beside(found["text"], root, row.where)
        picture = album.picture(str(found["picture"].relative_to(root)), row.where)
        text = text_of(text, row.where)
        if not text.strip():
            raise SampleError(f"{row.where}: {found['text'].name} is empty")
        if not prompt:
            alone = Turn("assistant", [ImagePart(0), TextPart(text)])
            return sample_of([alone], images=[picture], where=row.where, strip=strip)
        meta = {"id": found["id"]}
        return asked_about([picture], [(prompt, text)], where=row.where, strip=strip, meta=meta)

    return each(rows(), sample)
