"""DICOM pictures named in a table (CSV or JSONL with image, question, answer), or a folder of x.dcm with x.txt beside.

Pixels go through the file's own modality rescale and window (or `levels`), MONOCHROME1 is turned, and only the pixels
are kept: nothing of the header, where names and dates of patients stand, reaches a shard. Needs pip install pydicom.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.album import open_below, png_of, unread
from data_tools.holders import Holder
from data_tools.rows import Rejected, Row, each, fields, files_below, records, text_beside, text_field
from data_tools.turns import asked_about, text_of
from mmit.config import ConfigError
from mmit.data.sample import Picture, Sample, SampleError


def samples(
    path: Path,
    images: Path | None = None,
    *,
    levels: list[float] | None = None,
    frame: int | None = None,
    prompt: str = "Describe the image.",
    strip: bool = True,
) -> Iterator[Sample | Rejected]:
    """`levels`: [black, white] after the rescale (for CT in Hounsfield units), instead of each file's own. `frame`:
    which one of a file with several is shown; without it, such files are rejected."""
    if levels is not None and (len(levels) != 2 or not levels[0] < levels[1]):
        raise ConfigError(f"dicom: levels {levels} are not [black, white]; write --set 'levels=[-1000, 400]'")
    try:
        import pydicom  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("format dicom needs pydicom: pip install 'mmit[dicom]'") from None
    root = (images or (path if path.is_dir() else path.parent)).resolve()

    def rows() -> Iterator[Row | Rejected]:
        if not path.is_dir():
            yield from records(path)
            return
        files = [file for file in files_below(path) if file.suffix.lower() == ".dcm"]
        for number, file in enumerate(files):
            name = str(file.relative_to(path))
            yield Row(
                path.name, number, f"{path.name}/{name}", {"image": name, "text beside": file.with_suffix(".txt")}
            )

    def sample(row: Row) -> Sample:
        name = text_field(row, "image", "path", "file_name")
        if not (root / name).resolve().is_relative_to(root):
            raise SampleError(
                f"{row.where}: {name} would be read from outside of {root}; write its path below that folder"
            )
        picture = Slice(0, 0, "", "", name=name, root=str(root), where=row.where, levels=levels, frame=frame)
        beside = fields(row).get("text beside")
        if beside:
            answer = text_beside(beside, path.resolve(), row.where)
        else:
            answer = text_field(row, "answer", "caption", "text", "report")
        question = fields(row).get("question")
        pairs = [(text_of(question, row.where) if question else prompt, answer)]
        return asked_about([picture], pairs, where=row.where, strip=strip)

    return each(rows(), sample)


@dataclass(frozen=True)
class Slice(Holder):
    """One frame of a DICOM file."""

    levels: list[float] | None = None
    frame: int | None = None

    def pictures(self) -> list[tuple[Picture, float]]:
        return [(picture_of(self), 0.0)]


def picture_of(held: Slice) -> Picture:
    """One frame as an 8-bit PNG."""
    import pydicom  # pyright: ignore[reportMissingImports]
    from pydicom.errors import InvalidDicomError  # pyright: ignore[reportMissingImports]
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut  # pyright: ignore[reportMissingImports]
    from pydicom.pixels.utils import pixel_array  # pyright: ignore[reportMissingImports]

    where, name, levels, frame = held.where, held.name, held.levels, held.frame
    try:
        with os.fdopen(open_below(held), "rb") as file:
            header: Any = pydicom.dcmread(file)
        count = int(header.get("NumberOfFrames") or 1)
        if count > 1 and (frame is None or not 0 <= frame < count):
            raise SampleError(f"{where}: {name} holds {count} frames; --set frame=N, from 0, says which to show")
        pixels: Any = pixel_array(header, index=frame if count > 1 else 0)  # YBR comes as RGB
        kind = str(header.PhotometricInterpretation)
        if kind == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, header)
        if pixels.ndim == 3:
            deep = 0 if pixels.dtype.itemsize == 1 else 8 if kind == "PALETTE COLOR" else int(header.BitsStored) - 8
            return unread(png_of(np.ascontiguousarray((pixels[..., :3] >> deep).astype(np.uint8)), where), where)
        values = np.asarray(apply_modality_lut(pixels, header), dtype=np.float64)
        values, low, high = _shown(values, header) if levels is None else (values, *levels)
    except SampleError:
        raise
    except OSError as error:
        raise SampleError(f"{where}: cannot read {name} ({error.strerror})") from None
    except (InvalidDicomError, AttributeError, NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        raise SampleError(f"{where}: {name} cannot be read as DICOM ({type(error).__name__})") from None
    if not low < high:
        raise SampleError(f"{where}: {name} is one flat value ({low:g}); name levels")
    shades = np.clip(np.rint((values - low) * (255 / (high - low))), 0, 255).astype(np.uint8)
    shades = 255 - shades if kind == "MONOCHROME1" else shades
    return unread(png_of(np.repeat(shades[..., None], 3, axis=2), where), where)


def _shown(values: np.ndarray, header: Any) -> tuple[np.ndarray, float, float]:
    """The values through the file's own window or table, and what is then black and white; else their own range."""
    from pydicom.pixels.processing import apply_voi_lut, apply_windowing  # pyright: ignore[reportMissingImports]

    if header.get("VOILUTSequence"):
        return (
            apply_voi_lut(values.astype(np.int64), header),
            0,
            2 ** int(header.VOILUTSequence[0].LUTDescriptor[2]) - 1,
        )
    if header.get("WindowCenter") is not None:
        with np.errstate(over="ignore"):
            low, high = apply_windowing(np.array([-1e12, 1e12]), header)
            return apply_windowing(values, header), float(low), float(high)
    return values, float(values.min()), float(values.max())
