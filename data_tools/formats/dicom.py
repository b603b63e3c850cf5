"""DICOM pictures named in a table (CSV or JSONL with image, question, answer), or a folder of x.dcm with x.txt beside.

Pixels go through the file's own modality rescale and window (or `levels`), MONOCHROME1 is turned, and only the pixels
are kept: nothing of the header, where names and dates of patients stand, reaches a shard. Needs pip install pydicom.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.album import png_of, unread
from data_tools.rows import Rejected, Row, each, fields, records, text_field
from data_tools.turns import asked_about
from mmit.config import ConfigError
from mmit.data.sample import Picture, Sample, SampleError


def samples(
    path: Path,
    images: Path | None = None,
    *,
    levels: list[float] | None = None,
    prompt: str = "Describe the image.",
    strip: bool = True,
) -> Iterator[Sample | Rejected]:
    """`levels`: [black, white] after the rescale (for CT in Hounsfield units), instead of each file's own."""
    try:
        import pydicom  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("format dicom needs pydicom: pip install 'mmit[dicom]'") from None
    root = (images or (path if path.is_dir() else path.parent)).resolve()

    def rows() -> Iterator[Row | Rejected]:
        if not path.is_dir():
            yield from records(path)
            return
        for number, file in enumerate(sorted(path.rglob("*.dcm"))):
            text = file.with_suffix(".txt")
            record = {
                "image": str(file.relative_to(path)),
                "answer": text.read_text("utf-8") if text.exists() else None,
            }
            yield Row(path.name, number, f"{path.name}/{file.relative_to(path)}", record)

    def sample(row: Row) -> Sample:
        name = text_field(row, "image", "path", "file_name")
        file = (root / name).resolve()
        if not file.is_relative_to(root) or not file.is_file():
            raise SampleError(f"{row.where}: {name} is no file below {root}")
        question = fields(row).get("question") or prompt
        pairs = [(question, text_field(row, "answer", "caption", "text", "report"))]
        return asked_about([picture_of(file, row.where, levels)], pairs, where=row.where, strip=strip)

    return each(rows(), sample)


def picture_of(file: Path, where: str, levels: list[float] | None) -> Picture:
    """The first frame as an 8-bit PNG."""
    import pydicom  # pyright: ignore[reportMissingImports]
    from pydicom.errors import InvalidDicomError  # pyright: ignore[reportMissingImports]
    from pydicom.pixels.processing import (  # pyright: ignore[reportMissingImports]
        apply_modality_lut,
        apply_voi_lut,
        convert_color_space,
    )

    try:
        header: Any = pydicom.dcmread(file)
        pixels: Any = header.pixel_array
        kind = str(header.PhotometricInterpretation)
        if int(header.get("NumberOfFrames", 1)) > 1:
            pixels = pixels[0]
        if pixels.ndim == 3:
            pixels = convert_color_space(pixels, kind, "RGB") if kind.startswith("YBR") else pixels
            return unread(png_of(np.ascontiguousarray(pixels[..., :3]).astype(np.uint8), where), where)
        values = apply_modality_lut(pixels, header)
        values = np.asarray(apply_voi_lut(values, header) if levels is None else values, dtype=np.float64)
    except (InvalidDicomError, AttributeError, NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        raise SampleError(f"{where}: {file.name} cannot be read as DICOM ({type(error).__name__})") from None
    low, high = levels if levels is not None else (float(values.min()), float(values.max()))
    if not low < high:
        raise SampleError(f"{where}: {file.name} is one flat value ({low:g}); name levels")
    shades = np.clip(np.rint((values - low) * (255 / (high - low))), 0, 255).astype(np.uint8)
    shades = 255 - shades if kind == "MONOCHROME1" else shades
    return unread(png_of(np.repeat(shades[..., None], 3, axis=2), where), where)
