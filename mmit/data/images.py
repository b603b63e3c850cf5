"""One decoder of pictures for everyone.

Converter, trainer, evaluation, chat and server all come through `decode`, so a picture is the same pixels everywhere.
Pictures are data of strangers: the formats are a short list, sizes are checked in the header before a pixel is
decoded, and the text of every error is ours.

Pillow and numpy do all of it: importing torch took each process of a conversion 4 seconds of CPU.
"""

from __future__ import annotations

import ctypes
import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, TiffImagePlugin

from mmit.data.sample import SampleError

MAX_PIXELS = 50_000_000
MAX_BYTES = 20 * 2**20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


@dataclass(frozen=True)
class Header:
    """What the header of a picture says, before a pixel is decoded."""

    ending: str
    """The file ending that the content calls for (`jpg`, `png`, ...), whatever the file was named."""
    width: int
    """As shown, after EXIF rotation; `height` too."""
    height: int
    orientation: int
    """What EXIF still asks for, 1 (nothing) to 8."""


def header(data: bytes, where: str) -> Header:
    """The header of a picture within the limits; `SampleError` for anything else."""
    if (plain := _plain_jpeg(data)) is not None:
        return plain
    with _without_warnings():
        picture = _open(data, where)
        orientation = _orientation(picture, data)
    width, height = picture.size if orientation < 5 else picture.size[::-1]
    return Header(ENDINGS[picture.format or ""], width, height, orientation)


def _plain_jpeg(data: bytes) -> Header | None:
    """The header of an ordinary JPEG without EXIF, in a ninth of Pillow's time; None for all else, which Pillow judges.

    Markers and frame header are those of ITU-T T.81, B.1.1.3 and B.2.2.
    """
    if data[:3] != b"\xff\xd8\xff" or len(data) > MAX_BYTES:
        return None
    position, size = 2, None
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, start = data[position + 1], position + 4
        position += 2 + (data[position + 2] << 8 | data[position + 3])
        if position > len(data):
            return None
        if marker == 0xDA:
            return Header("jpg", *size, 1) if size is not None else None
        if marker in (0xC0, 0xC1, 0xC2) and size is None and position >= start + 6:
            precision, height, width, channels = struct.unpack_from(">BHHB", data, start)
            if precision != 8 or channels not in (1, 3, 4) or not 0 < width * height <= MAX_PIXELS:
                return None
            size = (width, height)
        elif marker == 0xDB:
            while start < position:
                start += 65 if data[start] < 16 else 129
            if start != position:
                return None
        elif marker not in (0xE0, 0xE2, 0xC4, 0xDD, 0xED, 0xEE, 0xFE):
            return None
    return None


def size_of(data: bytes, where: str) -> tuple[int, int]:
    """Width and height of a picture as shown."""
    found = header(data, where)
    return found.width, found.height


def ending_of(data: bytes, where: str) -> str:
    """The file ending that the content of a picture calls for."""
    return header(data, where).ending


def decode(data: bytes, where: str, *, window: tuple[float, float] | None = None) -> np.ndarray:
    """The picture as uint8 (H, W, 3): rotated as its EXIF says, transparency on white, first frame of an animation.

    One channel of more than 8 bits is scaled by the range of its type (floats: 0 to 1), or from `window` = (values
    shown black and white) when that is given; a window says nothing about other pictures.
    """
    with _without_warnings():
        picture = _open(data, where)
        # Before loading: Pillow turns a TIFF itself, then.
        orientation = _orientation(picture, data)
        try:
            picture.load()
            deep = picture.mode in ("I", "F") or picture.mode.startswith("I;16")
            pixels = None if deep else _to_rgb(picture)
        except Exception as error:  # decoders raise whatever they run into; all of it means "not a good picture"
            raise SampleError(
                f"{where}: the {picture.format} picture cannot be decoded ({type(error).__name__}): it is cut or "
                f"damaged, or of a rare kind (mode {picture.mode}); fetch it again or save it as an ordinary 8-bit PNG "
                f"or JPEG"
            ) from None
    if pixels is None:
        pixels = _to_8_bit(picture, where, window)
    elif _bits(picture, data) > 8 and (spread := int(pixels.max()) - int(pixels.min())) < 64:
        raise SampleError(
            f"{where}: this 16-bit colour picture uses {spread + 1} of 256 levels, so it would be shown nearly flat; "
            f"stretch it to the whole range and save it with 8 bits a channel"
        )
    return np.ascontiguousarray(TURNS[orientation](pixels))


def reuse_memory() -> None:
    """Lets this process keep the memory of one decoded picture for the next.

    glibc hands blocks of over 128 KiB back to the system each time, which clears them page by page when they are asked
    for again: 3.7 instead of 1.4 ms of CPU for a JPEG of 640 x 480, measured in the benchmark of conversion.
    """
    with suppress(AttributeError):  # the call is glibc's own
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 128 * 2**20)


# What the EXIF orientation asks for: how stored rows and columns become shown ones (EXIF 2.32, tag 0x0112).
TURNS = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Pillow's warnings silenced, so that a picture is the same whatever filters the program has set.

    It warns of damage beside the pixels and of sizes; damage in the pixels is an error, and the size limits are ours.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _open(data: bytes, where: str) -> Image.Image:
    """The picture with its header read and checked, nothing decoded."""
    if len(data) > MAX_BYTES:
        raise SampleError(
            f"{where}: the picture has {len(data):,} bytes, the limit is {MAX_BYTES:,}; save it smaller or stronger "
            f"compressed"
        )
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise SampleError(
            f"{where}: the picture has far over {MAX_PIXELS:,} pixels, the limit; scale it down first"
        ) from None
    except Exception:  # the header parsers raise whatever they run into; _not_a_picture says what the bytes look like
        raise SampleError(f"{where}: {_not_a_picture(data)}") from None
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise SampleError(
            f"{where}: the picture has {width} x {height} pixels, the limit is {MAX_PIXELS:,} in all; "
            f"scale it down first"
        )
    if width < 1 or height < 1:
        raise SampleError(f"{where}: the picture has {width} x {height} pixels, so nothing to see; leave it out")
    return picture


def _not_a_picture(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if not data:
        return "the picture is an empty file (0 bytes); fetch it again or leave the sample out"
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "this is a web page, not a picture: the download failed; fetch the picture itself"
    if start.startswith((b"<?xml", b"<svg")):
        return "this is XML or SVG, not a picture of pixels; draw it into a PNG first"
    return (
        f"{len(data):,} bytes that are no readable picture in {', '.join(FORMATS)} (cut, damaged or another format); "
        f"fetch it again or save it as PNG or JPEG"
    )


def _orientation(picture: Image.Image, data: bytes) -> int:
    """EXIF orientation 1 to 8 that is still to be applied; 1 for none or an unreadable one, as every viewer does."""
    if picture.format == "TIFF":
        # Pillow reports the size of a TIFF as turned and turns it while loading.
        return 1
    # Pillow would decode all pixels to look for EXIF behind them; what it has found before them stays, also as a text,
    # which is how ImageMagick keeps that of a photograph.
    if picture.format == "PNG" and "exif" not in picture.info and (exif := _png_exif(data)) is not None:
        picture.info["exif"] = exif
    try:
        orientation = Image.Image.getexif(picture).get(0x0112, 1)
    except Exception:  # damaged EXIF is common in good pictures
        return 1
    return orientation if orientation in TURNS else 1


def _png_exif(data: bytes) -> bytes | None:
    """The eXIf chunk of a PNG, wherever it stands (PNG 3rd edition, 11.3.4.5)."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        if kind == b"eXIf":
            return b"Exif\0\0" + data[position + 8 : position + 8 + length]
        position += 12 + length
    return None


def _bits(picture: Image.Image, data: bytes) -> int:
    """Bits a channel as stored, where that can be over 8."""
    if picture.format == "PNG":
        return data[24]
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return int(picture.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0])
    return 8


def _to_rgb(picture: Image.Image) -> np.ndarray:
    if not picture.has_transparency_data:
        return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    alpha = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    page = Image.new("RGB", picture.size, (255, 255, 255))
    page.paste(alpha, mask=alpha.getchannel("A"))
    return np.array(page)


def _to_8_bit(picture: Image.Image, where: str, window: tuple[float, float] | None) -> np.ndarray:
    """uint8 (H, W, 3) from one deep channel."""
    values = np.asarray(picture)
    lowest, highest, inverted = 0.0, 65535.0, False
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        tags = picture.tag_v2
        bits = int(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0])
        signed = int(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0]) == 2
        # Pillow turns "white is zero" around for 8 bits only.
        inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        lowest, highest = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
        if bits == 32 and not signed and values.dtype == np.int32:
            values = values.view(np.uint32)
    if picture.mode == "F":
        lowest, highest = 0.0, 1.0
    least, most = float(values.min()), float(values.max())
    if not (np.isfinite(least) and np.isfinite(most)):
        raise SampleError(f"{where}: the picture holds values that are not numbers; replace them and save it again")
    if window is None:
        if least < lowest or most > highest or most - least < (highest - lowest) / 4:
            raise SampleError(
                f"{where}: the values of this {picture.mode} picture go from {least:g} to {most:g} of a range of "
                f"{lowest:g} to {highest:g}, so it would be shown nearly flat or cut off; name the values to show as "
                f"black and white, for this one `window: [{least:g}, {max(most, least + 1):g}]`"
            )
        window = (lowest, highest)
    low, high = window
    if not low < high:
        raise SampleError(f"{where}: window [{low:g}, {high:g}] is empty; write [black, white] with black < white")
    shades = np.empty(values.shape, dtype=np.uint8)
    for row in range(0, len(values), 256):  # strips, so that the floats of a large picture never stand all at once
        part = (values[row : row + 256].astype(np.float64) - low) * (255 / (high - low))
        shades[row : row + 256] = np.rint(np.clip(part, 0, 255))
    if inverted:
        shades = 255 - shades
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        shades[values == clear] = 255
    return np.repeat(shades[:, :, None], 3, axis=2)
