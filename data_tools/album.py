"""The pictures that rows name: found only below one folder, read late, cleaned of metadata without touching a pixel.

A format yields samples whose pictures are still `Unread`; the workers of a conversion `develop` them. So a format reads
as fast as its text, and a missing file is known before the first picture is decoded.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import io
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.turns import text_of
from mmit.config import ConfigError
from mmit.data.images import MAX_BYTES, decode, header
from mmit.data.sample import Picture, Sample, SampleError

LONGEST = 4096
"""Characters of a path, of which Linux allows no more."""


class MissingPicture(SampleError):
    """A picture file that a row names and that is not there."""


@dataclass(frozen=True)
class Unread(Picture):
    """A picture known by its file or its bytes alone; size, hash and ending are found when it is developed."""

    name: str = ""
    """Path below `root`; empty when the picture came as bytes."""
    root: str = ""
    where: str = ""

    @property
    def path(self) -> str:
        return os.path.join(self.root, self.name)


class Album:
    """The folder below which all pictures of an input lie."""

    def __init__(self, root: Path | None, *, prefix: str = ""):
        """`prefix`: a beginning of the names in the file that the folder does not have (`coco/train2017/`)."""
        if root is not None and not root.is_dir():
            raise ConfigError(f"{root}: no such folder; --images names the folder below which the pictures lie")
        self.root = root.resolve() if root is not None else None
        self.given = str(root.absolute()) if root is not None else ""
        lies_below.cache_clear()  # what an earlier input saw may have become a link since
        self.prefix = prefix

    def picture(self, name: Any, where: str, *, window: tuple[float, float] | None = None) -> Unread:
        """The picture a row calls `name`: a path below the folder, a `data:` URL, bytes, or {bytes, path} as `datasets`
        stores it."""
        if isinstance(name, Unread):
            return name
        if isinstance(name, bytes):
            return unread(name, where, window=window)
        if isinstance(name, dict):
            if isinstance(name.get("bytes"), bytes | Unread):
                return self.picture(name["bytes"], where, window=window)
            name = name.get("path") or name.get("url")
        if not isinstance(name, str) or not name:
            raise SampleError(f"{where}: a picture is named by {name!r}; write its path below the images folder")
        if name.startswith("data:"):
            return unread(from_data_url(name, where), where, window=window)
        if "://" in name and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", name):
            raise SampleError(
                f"{where}: the picture is a URL ({name[:120]}), and nothing is fetched here; download the pictures "
                f"first (img2dataset does it well) and name the files"
            )
        text_of(name, where)
        if len(name) > LONGEST:
            raise SampleError(
                f"{where}: the picture is named by a text of {len(name):,} characters ({name[:40]!r}...), which is no "
                f"path; bytes as base64 are written data:image/jpeg;base64,..."
            )
        if self.root is None:
            raise SampleError(f"{where}: the row names the picture {name!r}; say with --images which folder holds it")
        inside = name.removeprefix(self.prefix)
        for root in {str(self.root), self.given}:
            if inside.startswith(below := os.path.join(root, "")):
                raise SampleError(
                    f"{where}: the picture {name!r} is named by a whole path; write it below the images folder, or "
                    f"take the beginning away with --set image_prefix={self.prefix}{below} (in a config: options: "
                    f"{{image_prefix: {self.prefix}{below}}})"
                )
        if os.path.isabs(inside) or ".." in inside.split("/") or "\0" in inside or not inside:
            raise SampleError(
                f"{where}: the picture {name!r} would be read from outside the images folder; write its path below "
                f"that folder (--set image_prefix=... takes away a common beginning)"
            )
        return Unread(0, 0, "", "", window=window, name=inside, root=str(self.root), where=where)


def unread(data: bytes, where: str, *, window: tuple[float, float] | None = None) -> Unread:
    """A picture that came as bytes."""
    if not isinstance(data, bytes):
        raise SampleError(f"{where}: expected the bytes of a picture, found {type(data).__name__}")
    return Unread(0, 0, "", "", data=data, window=window, where=where)


def from_data_url(url: str, where: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise SampleError(f"{where}: a data URL without base64 ({head[:60]!r}); write data:image/png;base64,...")
    return from_base64(body, where)


def from_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SampleError(f"{where}: the picture is not valid base64; encode the file again") from None


def missing(sample: Sample) -> list[str]:
    """The names below the images folder of the sample's pictures that are not there."""
    return [p.name for p in sample.images if isinstance(p, Unread) and p.name and not os.path.exists(p.path)]


def remedy_for(missing: str, root: Path, prefix: str | None) -> str:
    """What to write so that a missing picture is found, if that is to be seen; `prefix` is what is taken off names
    already, None where the format has no such option."""
    folders = [place for place, letter in enumerate(missing, start=1) if letter == "/"]
    cut = next((place for place in folders if os.path.isfile(root / missing[place:])), 0)
    if cut and prefix is not None:
        found = prefix + missing[:cut]
        told = f"--set image_prefix={found} (in a config: options: {{image_prefix: {found}}})"
        return f"Write {told}: {missing} is then found"
    if os.path.isfile(root / (turned := missing.replace("\\", "/"))):
        return f"Write / for \\ in the names: {turned} is there"
    folder, name = os.path.split(missing)
    beside = islice(os.listdir(root / folder), 100_000) if os.path.isdir(root / folder) else ()
    if alike := next((other for other in beside if other.lower() == name.lower()), None):
        return f"Write the names as the files have them: {alike} is there, {name} is not"
    below = (item for item in sorted(root.iterdir())[:1000] if item.is_dir() and os.path.isfile(item / missing))
    deeper = next(below, None)
    return f"Write --images {deeper} (in a config: images: {deeper}): {missing} is there" if deeper is not None else ""


def read(picture: Unread) -> bytes:
    """The bytes of the picture; refuses whatever a link leads to outside the folder."""
    if picture.data is not None:
        return picture.data
    if not picture.name:
        raise SampleError(f"{picture.where}: a picture with neither file nor bytes; the format that made it has a bug")
    try:
        descriptor = open_below(picture)
    except FileNotFoundError:
        raise MissingPicture(
            f"{picture.where}: the file {picture.name} is missing below {picture.root}; "
            f"check --images, or choose with --on-missing"
        ) from None
    except OSError as error:
        raise SampleError(f"{picture.where}: cannot read {picture.name} ({error.strerror})") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SampleError(f"{picture.where}: {picture.name} is not an ordinary file; name a picture")
        if status.st_size > MAX_BYTES:
            raise SampleError(
                f"{picture.where}: {picture.name} has {status.st_size:,} bytes, the limit is {MAX_BYTES:,}; "
                f"save it smaller"
            )
        data = os.read(descriptor, status.st_size)
        if len(data) < status.st_size:
            raise SampleError(f"{picture.where}: {picture.name} was cut while it was read; convert again")
        return data
    except OSError as error:
        raise SampleError(f"{picture.where}: cannot read {picture.name} ({error.strerror})") from None
    finally:
        os.close(descriptor)


def open_below(picture: Unread) -> int:
    """The file opened, its real place being below the root. Without waiting, so that a pipe cannot hang us."""
    path = picture.path
    if lies_below(os.path.dirname(path), picture.root):
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
    real = os.path.realpath(path)
    if not real.startswith(os.path.join(picture.root, "")):
        raise SampleError(
            f"{picture.where}: {picture.name} is a link that leads out of the images folder; "
            f"copy the file into the folder, or give the folder it lies in as --images"
        )
    return os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


@lru_cache(maxsize=4096)
def lies_below(folder: str, root: str) -> bool:
    """Looked up once a folder, not once a picture: sets hold thousands of pictures in each."""
    return os.path.join(os.path.realpath(folder), "").startswith(os.path.join(root, ""))


def develop(
    picture: Picture,
    where: str,
    *,
    decode_pixels: bool = True,
    keep_metadata: bool = False,
    window: tuple[float, float] | None = None,
    look: Callable[[np.ndarray], str] | None = None,
    boxed: bool = False,
) -> Picture:
    """The picture read, cleaned of metadata, checked with the trainer's decoder, measured and hashed.

    `look` makes its print of the decoded pixels (H, W, 3) uint8. `boxed`: boxes lie on it, and of one that its EXIF
    turns nobody knows whether they were drawn before or after.
    """
    if isinstance(picture, Unread):
        data, where = read(picture), _named(picture, where)
    elif picture.data is not None:
        data = picture.data
    else:
        raise SampleError(f"{where}: a picture without bytes; the format that made it must read them or use an Album")
    window = picture.window or window
    shown = header(data, where)  # the limits are checked here, before anything is decoded
    if boxed and shown.orientation != 1:
        raise SampleError(
            f"{where}: the picture has boxes and is turned by its EXIF, so they may be of the pixels before or after; "
            f"save it turned and without EXIF, with its boxes in those pixels"
        )
    ending = shown.ending
    cleaned = data if keep_metadata else without_metadata(data, ending=ending, orientation=shown.orientation)
    pixels = None
    if cleaned is None or decode_pixels or look is not None:
        pixels = decode(data if cleaned is None else cleaned, where, window=window)
    if cleaned is None:
        assert pixels is not None
        data, ending, window = png_of(pixels, where), "png", None
    else:
        data = cleaned
    seen = look(pixels) if look is not None and pixels is not None else None
    return Picture(shown.width, shown.height, hashlib.sha256(data).hexdigest(), ending, data, window, seen)


def _named(picture: Unread, where: str) -> str:
    return f"{picture.where or where}: {picture.name}" if picture.name else picture.where or where


def without_metadata(data: bytes, *, ending: str, orientation: int) -> bytes | None:
    """The same pixels without EXIF, XMP, IPTC, comments and whatever trails the picture.

    Segments are left out and the rest is copied, so nothing is encoded again. None when that cannot be done: the EXIF
    turns the picture, or its kind (TIFF) or damage has no separable segments; then the decoder's pixels are saved.
    """
    clean = CLEANERS.get(ending)
    if clean is None or orientation != 1:
        return None
    try:
        return clean(data)
    except (IndexError, struct.error, ValueError):
        return None


def png_of(pixels: np.ndarray, where: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    if stream.tell() > MAX_BYTES:
        raise SampleError(
            f"{where}: turned as its EXIF says and saved without loss, the picture has {stream.tell():,} bytes, the "
            f"limit is {MAX_BYTES:,}; scale it down, or keep its bytes with --keep-metadata"
        )
    return stream.getvalue()


class _Spans:
    """Those bytes of a file that stay. Most files lose nothing, and are then not copied."""

    def __init__(self, data: bytes, end: int) -> None:
        self.data = data
        self.spans = [[0, end]]

    def keep(self, start: int, end: int) -> None:
        if self.spans[-1][1] == start:
            self.spans[-1][1] = end
        else:
            self.spans.append([start, end])

    def joined(self) -> bytes:
        if self.spans == [[0, len(self.data)]]:
            return self.data
        view = memoryview(self.data)
        return b"".join(view[start:end] for start, end in self.spans)


def _clean_jpeg(data: bytes) -> bytes:
    """ITU-T T.81 Annex B: markers, segments and scans up to the end of the first image."""
    kept, position = _Spans(data, 2), 2
    markers: Iterator[int] | None = None
    while position < len(data):
        if data[position] != 0xFF:
            raise ValueError("no marker where one must be")
        while data[position] == 0xFF:
            position += 1
        marker, start = data[position], position - 1
        if marker == 0xD9:
            kept.keep(start, start + 2)
            return kept.joined()
        (length,) = struct.unpack_from(">H", data, start + 2)
        position = min(start + 2 + length, len(data))
        named = JPEG_NAMED.get(marker)
        if data.startswith(named, start + 4) if named else not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.keep(start, position)
        if marker == 0xDA:
            if markers is None:
                markers = _markers(data, position)
            end = next(markers, len(data))
            while end < position:
                end = next(markers, len(data))
            kept.keep(position, end)
            position = end
    return kept.joined()


JPEG_NAMED = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}


def _markers(data: bytes, start: int) -> Iterator[int]:
    """Where markers stand from `start` on, but for restarts (D0 to D7) and stuffed or filling FF."""
    values = np.frombuffer(data, dtype=np.uint8)
    found = (values[start:-1] == 0xFF).view(np.uint8)
    np.minimum(found, values[start + 1 :], out=found)  # 1 where an FF is not stuffed, else 0
    ones = found.tobytes()  # of which the next is found in a third of the time of `flatnonzero`
    place = ones.find(1)
    while place >= 0:
        kind = data[start + place + 1]
        if kind != 0xFF and not 0xD0 <= kind <= 0xD7:
            yield start + place
        place = ones.find(1, place + 1)


def _clean_png(data: bytes) -> bytes:
    """PNG third edition, section 5: the chunks that decide pixels, and no text, time or private ones."""
    kept, position = _Spans(data, 8), 8
    while True:
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise ValueError("cut inside a chunk")
        if kind in PNG_CHUNKS:
            kept.keep(position, end)
        if kind == b"IEND":
            return kept.joined()
        position = end


PNG_CHUNKS = frozenset(
    b"IHDR PLTE IDAT IEND tRNS cHRM gAMA iCCP sBIT sRGB bKGD pHYs sPLT hIST cICP mDCV cLLI acTL fcTL fdAT".split()
)


def _clean_webp(data: bytes) -> bytes:
    """RFC 9649: the chunks that decide pixels; the header's flags for EXIF and XMP are cleared."""
    kept, position = [], 12
    (size,) = struct.unpack_from("<I", data, 4)
    if len(data) < size + 8:
        raise ValueError("cut")
    while position + 8 <= size + 8:
        kind, length = struct.unpack_from("<4sI", data, position)
        chunk = data[position : position + 8 + length + length % 2]
        if kind == b"VP8X":
            chunk = chunk[:8] + bytes((chunk[8] & ~0x0C,)) + chunk[9:]
        if kind in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP"):
            kept.append(chunk)
        position += 8 + length + length % 2
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _clean_gif(data: bytes) -> bytes:
    """GIF89a section 17 on: blocks up to the trailer, without comments and without applications except the loop."""

    def after_blocks(position: int) -> int:
        while data[position]:
            position += data[position] + 1
        return position + 1

    def after_table(position: int, flags: int) -> int:
        return position + (3 << (flags & 7) + 1 if flags & 0x80 else 0)

    position = after_table(13, data[10])
    kept = [data[:position]]
    while data[position] != 0x3B:
        if data[position] == 0x2C:
            end = after_blocks(after_table(position + 10, data[position + 9]) + 1)
            keep = True
        elif data[position] == 0x21:
            end = after_blocks(position + 2)
            keep = data[position + 1] == 0xF9 or data[position + 3 : position + 14] == b"NETSCAPE2.0"
        else:
            raise ValueError("no block where one must be")
        if keep:
            kept.append(data[position:end])
        position = end
    return b"".join([*kept, b";"])


CLEANERS: dict[str, Callable[[bytes], bytes]] = {
    "jpg": _clean_jpeg,
    "png": _clean_png,
    "webp": _clean_webp,
    "gif": _clean_gif,
    "bmp": bytes,
}
