"""What a user asks, in the ways people write it, as messages and pictures of ours.

A conversation is a string (one user turn) or a list of messages: objects such as `{"role": "user", "content": "Hi"}`,
whose content may also be a list of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`, or our own
`Message`. Whitespace at the edges of a text or message is dropped, as converted data has it; our own `Message` stays as
it is. A picture is a path, the bytes of a file, a PIL image, a uint8 array (H, W, 3), or a number: an index into
`images`.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageOps

from mmit.data.images import MAX_BYTES, MAX_PIXELS, decode, ending_of, size_of
from mmit.data.sample import (
    ImagePart,
    Message,
    Part,
    Picture,
    Role,
    Sample,
    SampleError,
    TextPart,
    check,
    message,
    stripped,
)

ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


@dataclass(frozen=True)
class Shown:
    """A picture of a conversation: what `Sample` knows of it and, if it never was a file, its pixels."""

    picture: Picture
    pixels: np.ndarray | None = None

    def decoded(self, where: str) -> np.ndarray:
        """uint8 (H, W, 3)."""
        if self.pixels is not None:
            return self.pixels
        if self.picture.data is None:
            raise SampleError(f"{where}: a picture came without its bytes; read the sample with images=True")
        return decode(self.picture.data, where, window=self.picture.window)


@dataclass(frozen=True)
class Conversation:
    """Messages up to the one the model is to answer, and the pictures that their image parts number."""

    messages: tuple[Message, ...]
    pictures: tuple[Shown, ...] = ()
    where: str = "prompt"
    """For messages: where the conversation was read."""


Asked = str | Sequence[Mapping[str, Any] | Message] | Conversation


def conversation(
    asked: Asked,
    images: ImageLike | Sequence[ImageLike] = (),
    *,
    system: str | None = None,
    folder: Path | None = None,
    where: str = "prompt",
) -> Conversation:
    """What `asked` means; SampleError at `where` if it is no conversation that ends with a turn to answer.

    Before a bare string, all `images` (or the one picture) are shown in order and then a line break, as in converted
    data. `system` opens a conversation that has no system message; paths of pictures are relative to `folder`.
    """
    if isinstance(asked, Conversation):
        return asked
    if isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray):
        images = [images]
    pictures = [picture_of(image, where, folder=folder) for image in images]
    if isinstance(asked, str):
        texts = ["\n", asked.strip()] if pictures else [asked.strip()]
        messages = [message("user", *map(ImagePart, range(len(pictures))), *(texts if texts[-1] else []))]
    elif not isinstance(asked, Sequence) or not asked:
        raise SampleError(
            f"{where}: a conversation is a text or a list of messages with one at least, found {asked!r:.60}"
        )
    else:
        messages = [_message(item, pictures, folder, f"{where}: message {n}") for n, item in enumerate(asked)]
    if system is not None and not (messages and messages[0].role == "system"):
        messages.insert(0, message("system", system.strip()))
    if messages and messages[-1].role in ("assistant", "system"):
        raise SampleError(
            f"{where}: the conversation ends with a message of the {messages[-1].role}; end it with a user message, "
            f"the one to answer"
        )
    check(Sample("", "", tuple(messages), tuple(shown.picture for shown in pictures)), where)
    return Conversation(tuple(messages), tuple(pictures), where)


def picture_of(
    image: Any, where: str, *, folder: Path | None = None, window: tuple[float, float] | None = None
) -> Shown:
    """A picture however it is given; all that was encoded in a file goes through the one decoder of training."""
    match image:
        case str() | os.PathLike():
            path = Path(folder or "", image)
            return _from_bytes(_read(path, where), f"{where}: {path}", window)
        case bytes():
            return _from_bytes(image, where, window)
        case Image.Image():
            return _from_pixels(_pixels_of(image, where))
        case np.ndarray():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise SampleError(
                    f"{where}: an array of {image.dtype} {image.shape} is no picture; give uint8 (height, width, 3)"
                )
            return _from_pixels(image)
        case _:
            raise SampleError(
                f"{where}: a picture is given as {type(image).__name__}; give a path, the bytes of a file, "
                f"a PIL image or a uint8 array (height, width, 3)"
            )


def _message(item: Any, pictures: list[Shown], folder: Path | None, where: str) -> Message:
    """The message; pictures that it brings along are added to `pictures`."""
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str) or "content" not in item:
        raise SampleError(
            f'{where}: expected an object such as {{"role": "user", "content": "..."}}, found {str(item)[:60]!r}'
        )
    content = item["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise SampleError(f"{where}: content is a {type(content).__name__}; write a string or a list of parts")
    parts = [_part(part, pictures, folder, where) for part in content]
    return message(cast(Role, item["role"]), *stripped(parts))  # a wrong role is refused with the whole conversation


def _part(part: Any, pictures: list[Shown], folder: Path | None, where: str) -> Part:
    match part:
        case {"type": "text", "text": str(text)}:
            return TextPart(text)
        case {"type": "image", "image": int(number)}:
            return ImagePart(number)
        case {"type": "image", "image": image}:
            pictures.append(picture_of(image, where, folder=folder, window=_window(part.get("window"), where)))
            return ImagePart(len(pictures) - 1)
        case _:
            raise SampleError(
                f'{where}: the part {str(part)[:60]!r} is unknown; write {{"type": "text", "text": "..."}} '
                f'or {{"type": "image", "image": "file.jpg"}}'
            )


def _window(value: Any, where: str) -> tuple[float, float] | None:
    match value:
        case None:
            return None
        case [int() | float() as low, int() | float() as high]:
            return float(low), float(high)
        case _:
            raise SampleError(f"{where}: window is {str(value)[:60]}; write [black, white]")


def _read(path: Path, where: str) -> bytes:
    try:
        if not path.is_file():
            raise SampleError(f"{where}: the picture {path} is not there; correct its path")
        if path.stat().st_size > MAX_BYTES:
            raise SampleError(f"{where}: the picture {path} has over {MAX_BYTES:,} bytes, the limit; save it smaller")
        return path.read_bytes()
    except OSError as error:
        raise SampleError(f"{where}: the picture {path} cannot be read ({error.strerror})") from None


def _from_bytes(data: bytes, where: str, window: tuple[float, float] | None) -> Shown:
    width, height = size_of(data, where)
    return Shown(Picture(width, height, hashlib.sha256(data).hexdigest(), ending_of(data, where), data, window))


def _from_pixels(pixels: np.ndarray) -> Shown:
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(f"pixels {height} {width}".encode() + pixels.tobytes()).hexdigest()
    return Shown(Picture(width, height, digest, "raw"), pixels)


def _pixels_of(image: Image.Image, where: str) -> np.ndarray:
    """As `decode` would give them for the file; anything but plain RGB is written to memory and decoded, to be sure."""
    if image.width * image.height > MAX_PIXELS:
        raise SampleError(f"{where}: {image.width} x {image.height} pixels, the limit is {MAX_PIXELS:,}; scale it down")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == "RGB" and not image.has_transparency_data:
            return np.array(image)
        stream = io.BytesIO()
        image.save(stream, format="PNG" if image.mode in PNG_MODES else "TIFF")
    except (OSError, ValueError) as error:
        raise SampleError(f"{where}: the PIL image of mode {image.mode} cannot be read ({error})") from None
    return decode(stream.getvalue(), where)
