"""Pictures, and samples with pictures, made for tests."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from mmit.data.sample import ImagePart, Picture, Sample, message

ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3), smooth enough to be a picture and full of edges."""
    random = np.random.default_rng([seed, width, height])
    coarse = random.integers(0, 256, ((height + 3) // 4, (width + 3) // 4, 3), dtype=np.uint8)
    return coarse.repeat(4, 0).repeat(4, 1)[:height, :width] // 2 + random.integers(
        0, 128, (height, width, 3), dtype=np.uint8
    )


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", *, orientation: int | None = None) -> bytes:
    """The bytes of a picture file of this kind; WebP without loss."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    if kind == "WEBP":
        image.save(buffer, kind, lossless=True, exif=exif if orientation else b"")
    elif orientation is not None and kind in ("JPEG", "PNG", "TIFF"):
        image.save(buffer, kind, exif=exif)
    else:
        image.save(buffer, kind)
    return buffer.getvalue()


def reset_peak_memory() -> int:
    """KiB in use now, from where `peak_memory` counts on. (ru_maxrss would begin with the peak of the parent.)"""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """The most KiB of memory this process has held since `reset_peak_memory`. Linux."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def picture(width: int, height: int, *, kind: str = "PNG", seed: int = 0) -> Picture:
    """A picture as a sample holds it."""
    data = encode(noise(width, height, seed), kind)
    return Picture(width, height, hashlib.sha256(data).hexdigest(), ENDINGS[kind], data)


PICTURES = [picture(11 + n, 9, kind=("PNG", "JPEG", "WEBP")[n % 3], seed=n) for n in range(6)]


def sample(number: int, *pictures: Picture, text: str = "what is this?", **meta: str) -> Sample:
    shown = [ImagePart(n) for n in range(len(pictures))]
    messages = (message("user", *shown, text), message("assistant", f"number {number}"))
    return Sample(f"k{number:05d}", f"source{number % 2}", messages, pictures, meta)


def mixed(count: int = 23) -> list[Sample]:
    """Samples with none, one and two pictures and awkward texts."""
    made = []
    for n in range(count):
        pictures = [PICTURES[n % 6], PICTURES[(n + 1) % 6]][: n % 3]
        made.append(sample(n, *pictures, text="<image> é 漢 \x00 \n" * (n % 4), group=str(n % 5)))
    return made
