"""Towers of transformers: CLIP, SigLIP, DINOv2 with and without registers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.image_processing_base import ImageProcessingMixin

from mmit.config import ConfigError, Vision
from mmit.model.files import located
from mmit.model.pretrained import from_hub, has_file, load_whole, random_config
from mmit.model.tower_parts import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Channels,
    Layout,
    Pixels,
    TowerParts,
    blocks_below,
    channels,
    check_side,
)

log = logging.getLogger(__name__)

FILTERS: dict[int, Literal["bicubic", "bilinear"]] = {3: "bicubic", 2: "bilinear"}
"""The numbers by which processor files name what they resize with."""


@dataclass(frozen=True)
class Family:
    """A kind of transformers tower; normalisation and filter are used only where no processor file says otherwise."""

    model: type[transformers.PreTrainedModel]
    hidden_state: Callable[[Any, Tensor], Tensor]
    mean: Channels
    std: Channels
    has_cls: bool
    any_side: bool = False
    """Made for sides other than the one of its position embeddings."""


def _clip_state(model: Any, pixels: Tensor) -> Tensor:
    return model.encoder(inputs_embeds=model.pre_layrnorm(model.embeddings(pixels))).last_hidden_state


def _siglip_state(model: Any, pixels: Tensor) -> Tensor:
    return model.encoder(inputs_embeds=model.embeddings(pixels)).last_hidden_state


def _dinov2_state(model: Any, pixels: Tensor) -> Tensor:
    return model.encoder(model.embeddings(pixels)).last_hidden_state


_CLIP = Family(transformers.CLIPVisionModel, _clip_state, CLIP_MEAN, CLIP_STD, has_cls=True)
_SIGLIP = Family(transformers.SiglipVisionModel, _siglip_state, HALF, HALF, has_cls=False)
_DINOV2 = Family(transformers.Dinov2Model, _dinov2_state, IMAGENET_MEAN, IMAGENET_STD, has_cls=True, any_side=True)
_DINOV2_REGISTERS = Family(
    transformers.Dinov2WithRegistersModel, _dinov2_state, IMAGENET_MEAN, IMAGENET_STD, has_cls=True, any_side=True
)

FAMILIES = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2_REGISTERS,
}


def transformers_tower(spec: Vision) -> TowerParts:
    model_type, config = _transformers_config(spec)
    family = family_of(model_type, spec.name or "random")
    pixels = _transformers_pixels(spec, family, config)
    if spec.side != config.image_size:  # its own side may leave a rest, as 384 / 14 of SigLIP does
        check_side(spec, config.patch_size)
    blocks_below(spec.layer, config.num_hidden_layers)
    model = _model(spec, family, config)
    _resize_positions(cast(Any, model), pixels.side)
    return cut_tower(model, family, pixels, spec.layer)


def family_of(model_type: str, name: str) -> Family:
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model.vision: {name} is of model_type {model_type!r}; "
            f"transformers towers are {', '.join(FAMILIES)} (SigLIP 2 of fixed resolution is siglip)"
        )
    return FAMILIES[model_type]


def cut_tower(model: Any, family: Family, pixels: Pixels, layer: int) -> TowerParts:
    """The tower that gives hidden state `layer` of `model`, whose blocks above are taken off."""
    config = model.config
    depth = config.num_hidden_layers
    blocks = blocks_below(layer, depth)
    config.num_hidden_layers = blocks
    match model:
        case transformers.Dinov2Model() | transformers.Dinov2WithRegistersModel():
            above = model.encoder.layer[blocks] if blocks < depth else None
            model.encoder.layer = model.encoder.layer[:blocks]
            # Without this, the saved configuration names a last stage that is gone, and cannot be loaded again.
            config.stage_names = config.stage_names[: blocks + 1]
            config.set_output_features_output_indices(out_features=None, out_indices=None)
        case _:
            above = model.encoder.layers[blocks] if blocks < depth else None
            model.encoder.layers = model.encoder.layers[:blocks]
    registers = config.num_register_tokens if family is _DINOV2_REGISTERS else 0
    layout = Layout(
        patch=config.patch_size,
        dim=config.hidden_size,
        prefix=int(family.has_cls) + registers,
        has_cls=family.has_cls,
        blocks=blocks,
        depth=depth,
    )
    return TowerParts(model, family.hidden_state, pixels, layout, above)


def _model(spec: Vision, family: Family, config: Any) -> Any:
    if spec.random is None:
        return load_whole(family.model, "model.vision.name", spec.name)
    try:
        return family.model(config)
    except Exception as error:  # sizes that do not fit together
        raise ConfigError(f"model.vision.random: {error}") from error


def _transformers_config(spec: Vision) -> tuple[str, Any]:
    """model_type and the configuration of the vision part."""
    if spec.random is not None:
        sizes = dict(spec.random)
        model_type = sizes.pop("model_type", None)
        if model_type not in FAMILIES or model_type in ("clip", "siglip"):
            known = ", ".join(name for name in FAMILIES if name not in ("clip", "siglip"))
            raise ConfigError(f"model.vision.random.model_type: found {model_type!r}; write one of {known}")
        return model_type, random_config(model_type, sizes, "model.vision.random")
    if spec.pretrained is not None:
        raise ConfigError(
            f"model.vision.pretrained: {spec.pretrained!r}; transformers loads the weights of `name`, leave it out"
        )
    load = partial(transformers.AutoConfig.from_pretrained, **located(spec.name), trust_remote_code=False)
    config = from_hub(load, "model.vision.name", spec.name)
    both = isinstance(config, transformers.CLIPConfig | transformers.SiglipConfig)
    return config.model_type, config.vision_config if both else config


def _transformers_pixels(spec: Vision, family: Family, config: Any) -> Pixels:
    """From the processor file beside the weights where there is one, else the family's own values."""
    record: dict[str, Any] = {}
    if spec.random is None:
        try:
            record, _ = ImageProcessingMixin.get_image_processor_dict(**located(spec.name))
        except OSError as error:
            if has_file(spec.name, "preprocessor_config.json"):  # so it is there, and damaged
                raise ConfigError(f"model.vision.name: {error}; fetch the file again") from error
            log.warning("%s has no image processor file; normalising as %s does", spec.name, family.model.__name__)
    where = f"model.vision.name: the image processor of {spec.name}"
    interpolation = processor_filter(record, where)
    side = spec.side or processor_side(record, where) or config.image_size
    if side != config.image_size and not (spec.side or family.any_side):
        raise ConfigError(
            f"{where} makes pictures of {side} pixels, but the weights are for {config.image_size}; "
            f"write side: {config.image_size}, or side: {side} to interpolate the position embeddings"
        )
    return Pixels(
        side=side,
        mean=channels(record.get("image_mean", family.mean)),
        std=channels(record.get("image_std", family.std)),
        interpolation=interpolation,
    )


def processor_filter(record: dict[str, Any], where: str) -> Literal["bicubic", "bilinear"]:
    """What a processor resizes with; ConfigError if it does not also normalise values of 0 to 1, as all towers do."""
    if not record.get("do_normalize", True) or not record.get("do_rescale", True):
        raise ConfigError(f"{where} does not rescale and normalise; only towers of normalised pictures are supported")
    if abs(record.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ConfigError(f"{where} rescales by {record['rescale_factor']}; only 1/255 is supported")
    resample = int(record.get("resample", 3))
    if resample not in FILTERS:
        raise ConfigError(f"{where} resizes with filter {resample}; only 3 (bicubic) and 2 (bilinear) are supported")
    return FILTERS[resample]


def processor_side(record: dict[str, Any], where: str) -> int | None:
    """The side of the pictures a processor makes: of its crop, or of a square resize."""
    size = record.get("size", {})
    if record.get("do_center_crop") and "crop_size" in record:
        size = record["crop_size"]
    if isinstance(size, int):
        return size
    sides = {size[name] for name in ("height", "width", "shortest_edge") if name in size}
    if len(sides) > 1:
        raise ConfigError(f"{where} makes pictures of {size['height']} x {size['width']}; only squares are supported")
    return sides.pop() if sides else None


@torch.no_grad()
def _resize_positions(model: Any, side: int) -> None:
    """Position embeddings for another side, by the model's own interpolation; stored, so an export needs no option."""
    if side == model.config.image_size:
        return
    embeddings = model.embeddings
    patches = (side // model.config.patch_size) ** 2
    match model:
        case transformers.Dinov2Model() | transformers.Dinov2WithRegistersModel():
            like = embeddings.position_embeddings.new_empty(1, patches + 1, model.config.hidden_size)
            resized = embeddings.interpolate_pos_encoding(like, side, side)
            embeddings.position_embeddings = nn.Parameter(resized.clone())
        case _:
            extra = int(isinstance(model, transformers.CLIPVisionModel))
            count = patches + extra
            like = embeddings.position_embedding.weight.new_empty(1, count, model.config.hidden_size)
            resized = embeddings.interpolate_pos_encoding(like, side, side)
            embeddings.position_embedding = nn.Embedding.from_pretrained(resized[0].clone(), freeze=False)
            embeddings.position_ids = torch.arange(count).expand((1, -1))
            embeddings.num_patches, embeddings.num_positions = patches, count
            embeddings.image_size = side
    model.config.image_size = side
