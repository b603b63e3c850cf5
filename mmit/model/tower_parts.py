"""What a tower file gives to `VisionTower`: the library's module, how to read it, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from mmit.config import ConfigError, Vision

Channels = tuple[float, float, float]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Pixels:
    """How a tower wants its pictures: side in pixels, normalisation and the filter they are resized with."""

    side: int
    mean: Channels
    std: Channels
    interpolation: Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class Layout:
    """What an encoder makes of a picture: `prefix` tokens (the first is cls if `has_cls`), then a square of patches."""

    patch: int
    dim: int
    prefix: int
    has_cls: bool
    blocks: int
    """Blocks that run, which is also the hidden state that is read."""
    depth: int
    """Blocks of the whole tower."""


@dataclass(frozen=True)
class TowerParts:
    """A tower as its library made it, cut to `layout.blocks`."""

    encoder: nn.Module
    hidden_state: Callable[[Any, Tensor], Tensor]
    """(encoder, normalised pixels (N, 3, S, S)) -> all tokens (N, prefix + patches, D) of the last block."""
    pixels: Pixels
    layout: Layout
    above: nn.Module | None
    """The first block that is not run, None if there is none above: an export writes it, see `mmit.export.towers`."""


def blocks_below(layer: int, depth: int) -> int:
    """How many of `depth` blocks hidden state `layer` needs; there are depth + 1 states, the first the embeddings."""
    if not -(depth + 1) <= layer <= depth:
        raise ConfigError(
            f"model.vision.layer: {layer}, but the tower has {depth} blocks; write 0 (embeddings) to {depth}, "
            f"or -{depth + 1} to -1"
        )
    return layer if layer >= 0 else depth + 1 + layer


def check_side(spec: Vision, patch: int) -> None:
    if spec.side and spec.side % patch:
        nearest = max(1, round(spec.side / patch)) * patch
        raise ConfigError(f"model.vision.side: {spec.side} is no multiple of the patch, {patch}; write side: {nearest}")


def channels(values: Sequence[float]) -> Channels:
    red, green, blue = values
    return (float(red), float(green), float(blue))
