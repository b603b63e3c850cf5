"""What one sample is: a conversation of typed parts with its pictures, and the same as JSON.

A picture or a video is a typed part, never a marker inside a text, so no text can pose as one. `Sample` is what every
converter makes, every shard holds and every training step reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES = get_args(Role)
FORMAT = 1


class SampleError(ValueError):
    """A fault of the data, naming the sample, what was found and what to write instead."""


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    image: int
    """Index into `Sample.images`; several parts may show the same picture."""


@dataclass(frozen=True)
class VideoPart:
    """Frames of a video, each a picture of the sample, with the second at which each was taken."""

    frames: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class BoxPart:
    """A region of a picture in its own pixels; written out as text for the picture fit of the run."""

    image: int
    left: float
    top: float
    right: float
    bottom: float


Part = TextPart | ImagePart | VideoPart | BoxPart


@dataclass(frozen=True)
class Message:
    role: Role
    parts: tuple[Part, ...]
    train: bool
    """Whether the model learns to write this message. Only an assistant message can be trained."""

    @property
    def text(self) -> str:
        """The text parts joined, pictures left out."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True)
class Picture:
    """One encoded picture: its size as shown (after EXIF rotation), its hash and, once read, its bytes."""

    width: int
    height: int
    sha256: str
    ending: str
    """File ending without a dot, lower case: `jpg`, `png`, ..."""
    data: bytes | None = field(default=None, repr=False)
    window: tuple[float, float] | None = None
    """Values of a 16-bit picture shown as black and white; None: the whole range of the type."""
    print: str | None = None
    """What it looks like, if that was asked for: 64 bits of a perceptual hash and 4 x 4 pixels, as hexadecimal."""


@dataclass(frozen=True)
class Sample:
    key: str
    source: str
    messages: tuple[Message, ...]
    images: tuple[Picture, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


def message(role: Role, *parts: Part | str, train: bool | None = None) -> Message:
    """A message from parts, a bare string standing for a text; an assistant message trains unless told not to."""
    typed = tuple(TextPart(part) if isinstance(part, str) else part for part in parts)
    return Message(role, typed, train=role == "assistant" if train is None else train)


def stripped(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts without whitespace at the two outer edges; a text that was nothing else goes."""
    kept = list(parts)
    if kept and isinstance(first := kept[0], TextPart) and first.text[:1].isspace():
        kept[0] = TextPart(first.text.lstrip())
    if kept and isinstance(last := kept[-1], TextPart) and last.text[-1:].isspace():
        kept[-1] = TextPart(last.text.rstrip())
    return tuple([part for part in kept if not isinstance(part, TextPart) or part.text])


def image_indices(part: Part) -> tuple[int, ...]:
    """The pictures of which this part puts tokens into the sequence, in order."""
    if isinstance(part, ImagePart):
        return (part.image,)
    return part.frames if isinstance(part, VideoPart) else ()


def check(sample: Sample, where: str) -> Sample:
    """The sample itself, or `SampleError` at `where` if a role, an image index or a train flag cannot be right."""
    if not sample.messages:
        raise SampleError(f"{where}: the sample has no messages; give it at least one assistant message")
    for number, item in enumerate(sample.messages):
        here = f"{where}: message {number}"
        if item.role not in ROLES:
            raise SampleError(f"{here}: role {item.role!r} is unknown; write one of {', '.join(ROLES)}")
        if not isinstance(item.train, bool):
            raise SampleError(f"{here}: train is {item.train!r}; write true or false")
        if item.train and item.role != "assistant":
            raise SampleError(f"{here}: train is true for role {item.role!r}; only assistant messages can be trained")
        if item.role == "system" and number > 0:
            raise SampleError(f"{here}: a system message must come first, found at position {number}")
        for part in item.parts:
            if isinstance(part, TextPart):
                _check_text(part.text, here)
            else:
                _check_part(part, len(sample.images), here)
    shown = {i for item in sample.messages for part in item.parts for i in image_indices(part)}
    if unused := sorted(set(range(len(sample.images))) - shown):
        raise SampleError(
            f"{where}: images {unused} are shown by no message; add an image part where each belongs, or drop them"
        )
    return sample


def _check_text(text: str, here: str) -> None:
    if not isinstance(text, str):
        raise SampleError(f"{here}: a text part holds the text {text!r} ({type(text).__name__}); write a string")
    if not _is_whole(text):
        raise SampleError(f"{here}: holds half of a character (an escape \\ud800 to \\udfff); mend it")


def _check_part(part: Part, images: int, here: str) -> None:
    match part:
        case BoxPart(image, left, top, right, bottom):
            used, corners = (image,), (left, top, right, bottom)
            if not all(isinstance(corner, int | float) for corner in corners):
                raise SampleError(f"{here}: a box has the corners {corners}; write numbers: left, top, right, bottom")
        case VideoPart(frames, seconds) if len(frames) != len(seconds):
            raise SampleError(f"{here}: a video has {len(frames)} frames but {len(seconds)} seconds")
        case _:
            used = image_indices(part)
    for index in used:
        if not isinstance(index, int) or not 0 <= index < images:
            raise SampleError(
                f"{here}: names image {index!r}, but the sample holds {images}; "
                f"count from 0 and add the missing picture"
            )


def _is_whole(text: str) -> bool:
    r"""Whether each character is whole; JSON can escape half of one (`\ud83d`), which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


COMPACT = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
"""The same value, the same text; made once, since making it takes as long as a short sample."""


def to_json(sample: Sample) -> str:
    """The sample without picture bytes as one line of JSON with sorted keys: the same sample, the same bytes."""
    record = {
        "format": FORMAT,
        "key": sample.key,
        "source": sample.source,
        "messages": [
            {"role": item.role, "content": [_part_to_json(p) for p in item.parts]}
            | ({"train": item.train} if item.train != (item.role == "assistant") else {})
            for item in sample.messages
        ],
        "images": [
            {
                "name": f"{number}.{picture.ending}",
                "width": picture.width,
                "height": picture.height,
                "sha256": picture.sha256,
            }
            | ({"window": list(picture.window)} if picture.window else {})
            | ({"print": picture.print} if picture.print else {})
            for number, picture in enumerate(sample.images)
        ],
        "meta": dict(sample.meta),
    }
    return COMPACT.encode(record)


def from_json(text: str | bytes, where: str, *, data: Sequence[bytes] | None = None) -> Sample:
    """The sample that `to_json` wrote; `data` are the bytes of its pictures in order, when they have been read."""
    try:
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise SampleError(
                f"{where}: sample format {record['format']}, this mmit reads {FORMAT}; upgrade mmit or convert again"
            )
        if data is not None and len(data) != len(record["images"]):
            raise SampleError(
                f"{where}: the sample names {len(record['images'])} images but the shard holds {len(data)}"
            )
        images = tuple(
            Picture(
                width=image["width"],
                height=image["height"],
                sha256=image["sha256"],
                ending=image["name"].rsplit(".", 1)[1],
                data=data[number] if data is not None else None,
                window=tuple(image["window"]) if "window" in image else None,
                print=image.get("print"),
            )
            for number, image in enumerate(record["images"])
        )
        messages = tuple(
            Message(
                role=item["role"],
                parts=tuple(_part_from_json(part) for part in item["content"]),
                train=item.get("train", item["role"] == "assistant"),
            )
            for item in record["messages"]
        )
        sample = Sample(record["key"], record["source"], messages, images, record["meta"])
    except SampleError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError) as error:
        raise SampleError(
            f"{where}: not a sample of mmit ({type(error).__name__}: {error}); the schema is in data_tools/README.md"
        ) from error
    return check(sample, where)


def _part_to_json(part: Part) -> dict[str, Any]:
    match part:
        case TextPart(text):
            return {"type": "text", "text": text}
        case ImagePart(image):
            return {"type": "image", "image": image}
        case VideoPart(frames, seconds):
            return {"type": "video", "frames": list(frames), "seconds": list(seconds)}
        case BoxPart(image, left, top, right, bottom):
            return {"type": "box", "image": image, "box": [left, top, right, bottom]}


def _part_from_json(record: Mapping[str, Any]) -> Part:
    match record["type"]:
        case "text":
            return TextPart(cast(str, record["text"]))
        case "image":
            return ImagePart(record["image"])
        case "video":
            return VideoPart(tuple(record["frames"]), tuple(record["seconds"]))
        case "box":
            return BoxPart(record["image"], *record["box"])
        case kind:
            raise KeyError(f"part type {kind!r}")
