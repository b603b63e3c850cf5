"""Files that hold pictures rather than being one: videos, DICOM files, tars, tables.

A format names such a file as one picture of its sample, a video as a part of one frame. The worker that develops the
pictures opens it first, so the process that reads the rows decodes nothing and holds no picture.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from data_tools.album import Unread
from mmit.data.sample import BoxPart, ImagePart, Part, Picture, Sample, TextPart, VideoPart


@dataclass(frozen=True)
class Holder(Unread):
    """A file from which pictures are taken."""

    def pictures(self) -> list[tuple[Picture, float]]:
        """What it holds, still unread or as bytes, each with the second at which it was taken."""
        raise NotImplementedError

    def told(self, seconds: tuple[float, ...]) -> str:
        """A text to stand before the frames of a video, or nothing."""
        del seconds
        return ""


def opened(sample: Sample) -> Sample:
    """The sample with the pictures of all files that hold some; a file that is missing stays, to be found missing."""
    if not any(isinstance(picture, Holder) for picture in sample.images):
        return sample
    held = [
        picture.pictures() if isinstance(picture, Holder) and os.path.exists(picture.path) else [(picture, 0.0)]
        for picture in sample.images
    ]
    starts = [0, *accumulate(len(taken) for taken in held)]

    def placed(part: Part) -> Iterator[Part]:
        match part:
            case ImagePart(image) | BoxPart(image):
                yield replace(part, image=starts[image])
            case VideoPart((number,), _) if isinstance(clip := sample.images[number], Holder):
                seconds = tuple(second for _, second in held[number])
                if told := clip.told(seconds):
                    yield TextPart(told)
                yield VideoPart(tuple(range(starts[number], starts[number + 1])), seconds)
            case VideoPart(frames):
                yield replace(part, frames=tuple(starts[frame] for frame in frames))
            case _:
                yield part

    messages = tuple(
        replace(item, parts=tuple(new for part in item.parts for new in placed(part))) for item in sample.messages
    )
    return replace(sample, messages=messages, images=tuple(picture for taken in held for picture, _ in taken))
