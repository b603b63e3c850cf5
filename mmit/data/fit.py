"""How a picture is fitted into the square an encoder sees.

Shapes: (H, W, 3) uint8 as decoded; (3, S, S) uint8 as fitted, S being the side of the encoder's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from mmit.data.images import MAX_PIXELS
from mmit.data.sample import SampleError

Policy = Literal["crop", "pad", "squash"]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class PictureFit:
    """How a picture of any size becomes a square of `side` pixels.

    `crop` scales the shorter edge to `side` and cuts the middle out, as CLIPImageProcessor does; `pad` first makes the
    picture square with bars of the mean colour, as LlavaImageProcessor does with `do_pad`; `squash` ignores the aspect
    ratio, as SiglipImageProcessor does. All of it on uint8, so the result is theirs bit for bit.
    """

    policy: Policy
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"]

    def apply(self, pixels: np.ndarray, *, where: str = "a picture") -> Tensor:
        """uint8 (3, side, side) from uint8 (H, W, 3)."""
        height, width = pixels.shape[:2]
        self.check_size(width, height, where=where)
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        match self.policy:
            case "crop":
                new_width, new_height = self._cover(width, height)
                image = self._resize(image, new_width, new_height)
                left, top = (new_width - self.side) // 2, (new_height - self.side) // 2
                image = image[:, top : top + self.side, left : left + self.side].contiguous()
            case "pad":
                if width != height:
                    long = max(width, height)
                    left, top = (long - width) // 2, (long - height) // 2
                    square = torch.tensor([int(value * 255) for value in self.mean], dtype=torch.uint8)
                    square = square[:, None, None].repeat(1, long, long)
                    square[:, top : top + height, left : left + width] = image
                    image = square
                image = self._resize(image, self.side, self.side)
            case "squash":
                image = self._resize(image, self.side, self.side)
        return image

    def place(self, width: int, height: int, box: Box) -> Box:
        """Where a box given in pixels of a `width` x `height` picture lies in the fitted one, in fractions of its side.

        What the crop cuts away is clipped, so a box outside of it comes back without area.
        """
        match self.policy:
            case "crop":
                new_width, new_height = self._cover(width, height)
                left, top = (new_width - self.side) // 2, (new_height - self.side) // 2
                scale_x, scale_y = new_width / width / self.side, new_height / height / self.side
                shift_x, shift_y = -left / self.side, -top / self.side
            case "pad":
                long = max(width, height)
                scale_x = scale_y = 1 / long
                shift_x, shift_y = (long - width) // 2 / long, (long - height) // 2 / long
            case "squash":
                scale_x, scale_y, shift_x, shift_y = 1 / width, 1 / height, 0.0, 0.0
        left, top, right, bottom = box
        return (
            _clip(left * scale_x + shift_x),
            _clip(top * scale_y + shift_y),
            _clip(right * scale_x + shift_x),
            _clip(bottom * scale_y + shift_y),
        )

    def check_size(self, width: int, height: int, *, where: str) -> None:
        """Refuse a picture so long and thin that fitting it would need gigabytes on the way."""
        match self.policy:
            case "crop":
                new_width, new_height = self._cover(width, height)
                needed = new_width * new_height
            case "pad":
                needed = max(width, height) ** 2
            case "squash":
                needed = self.side**2
        if needed > 4 * MAX_PIXELS:
            raise SampleError(
                f"{where}: {width} x {height} pixels is too long and thin to {self.policy} (it would take "
                f"{needed:,} pixels on the way); cut it into pieces, or use `pictures: squash`"
            )

    def to_json(self) -> dict[str, Any]:
        """The fit as plain JSON values; `from_json` is the way back."""
        record = asdict(self)
        return record | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PictureFit:
        """The fit that `to_json` wrote."""
        return cls(
            policy=record["policy"],
            side=record["side"],
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
            interpolation=record["interpolation"],
        )

    def _cover(self, width: int, height: int) -> tuple[int, int]:
        """Width and height with the shorter one scaled to `side`, rounded down as transformers does."""
        if width <= height:
            return self.side, int(self.side * height / width)
        return int(self.side * width / height), self.side

    def _resize(self, image: Tensor, width: int, height: int) -> Tensor:
        interpolation = InterpolationMode.BICUBIC if self.interpolation == "bicubic" else InterpolationMode.BILINEAR
        # With the leading 1, as processors stack their batch: torchvision takes the same path, hence the same bits.
        return tv.resize(image[None], [height, width], interpolation=interpolation, antialias=True)[0]


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """float32 (N, 3, H, W) from uint8, on the device of `pixels`: scaling to 0..1 and (x - mean) / std in one pass."""
    # The factor is 1 / (1 / 255) and not 255, in the order transformers multiplies: the same bits.
    scale = 1.0 / (1 / 255)
    centre = (torch.tensor(mean, device=pixels.device) * scale).view(-1, 1, 1)
    spread = (torch.tensor(std, device=pixels.device) * scale).view(-1, 1, 1)
    return pixels.to(torch.float32).sub_(centre).div_(spread)


def _clip(fraction: float) -> float:
    return min(max(fraction, 0.0), 1.0)
