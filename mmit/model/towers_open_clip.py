"""Towers of open_clip: its own vision transformers and those it takes from timm."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from safetensors import safe_open
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from mmit.config import ConfigError, Vision
from mmit.model.tower_parts import (
    CLIP_MEAN,
    CLIP_STD,
    Layout,
    Pixels,
    TowerParts,
    blocks_below,
    channels,
    check_side,
)

log = logging.getLogger(__name__)


def open_clip_tower(spec: Vision) -> TowerParts:
    visual: Any
    visual, pixels = _random_open_clip(spec) if spec.random is not None else _load_open_clip(spec)
    match visual:
        case VisionTransformer():
            trunk, blocks, prefix, has_cls = visual, visual.transformer.resblocks, 1, True
            patch, dim = cast(Any, visual).patch_size[0], visual.conv1.out_channels
        case TimmModel(trunk=TimmVisionTransformer() | Eva() as trunk):
            blocks, prefix, has_cls = trunk.blocks, trunk.num_prefix_tokens, trunk.cls_token is not None
            patch, dim = cast(Any, trunk.patch_embed).patch_size[0], trunk.embed_dim
        case _:
            raise ConfigError(
                f"model.vision.name: {spec.name} of open_clip is no plain vision transformer "
                f"(found {type(visual).__name__}); name a ViT, such as ViT-L-14-336-quickgelu"
            )
    check_side(spec, patch)
    depth = len(blocks)
    below = blocks_below(spec.layer, depth)
    if below == 0:
        raise ConfigError(
            f"model.vision.layer: {spec.layer} is the embeddings, which open_clip does not give out; "
            f"write 1 to {depth}, or negative, -1 being the last block"
        )
    above = blocks[below] if below < depth else None
    trunk.prune_intermediate_layers([below - 1], prune_norm=False, prune_head=False)
    layout = Layout(patch=patch, dim=dim, prefix=prefix, has_cls=has_cls, blocks=below, depth=depth)
    return TowerParts(visual, _open_clip_state, pixels, layout, above)


def _open_clip_state(visual: Any, pixels: Tensor) -> Tensor:
    found = visual.forward_intermediates(
        pixels,
        indices=1,
        stop_early=True,
        normalize_intermediates=False,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    patches = found["image_intermediates"][0]
    prefix = found.get("image_intermediates_prefix")
    return patches if prefix is None else torch.cat([prefix[0], patches], dim=1)


def _random_open_clip(spec: Vision) -> tuple[nn.Module, Pixels]:
    """`random` holds fields of open_clip's vision_cfg, on top of those of `name` if it is given; and `quick_gelu`."""
    known: dict[str, Any] = _named_config(spec) if spec.name else {"vision_cfg": {}}
    sizes: dict[str, Any] = {**known["vision_cfg"], **(spec.random or {}), "patch_dropout": 0.0}
    quick_gelu = sizes.pop("quick_gelu", known.get("quick_gelu", False))
    if spec.side:
        sizes["image_size"] = spec.side
    text = open_clip.CLIPTextCfg(context_length=4, vocab_size=4, width=8, heads=1, layers=1)
    try:
        vision = open_clip.CLIPVisionCfg(**sizes)
    except TypeError as error:
        fields = ", ".join(open_clip.CLIPVisionCfg.__dataclass_fields__)
        raise ConfigError(f"model.vision.random: {error}; the fields are {fields}, quick_gelu") from error
    try:
        visual = open_clip.CLIP(known.get("embed_dim", vision.width), vision, text, quick_gelu=quick_gelu).visual
    except Exception as error:  # sizes that do not fit together, names that timm does not know
        raise ConfigError(f"model.vision.random: {error}") from error
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    if isinstance(visual, TimmModel):
        visual.set_input_size(side)
    return visual, Pixels(side, CLIP_MEAN, CLIP_STD, "bicubic")


def _load_open_clip(spec: Vision) -> tuple[nn.Module, Pixels]:
    repository = spec.name.startswith(("hf-hub:", "local-dir:"))
    preprocess: dict[str, Any] | None = None
    if not repository:
        config = _named_config(spec)
        if open_clip.is_pretrained_cfg(spec.name, cast(str, spec.pretrained)):
            _check_activation(spec, config)
        else:
            preprocess = _check_file(spec, config)
    try:
        model = open_clip.create_model(
            spec.name,
            pretrained=None if repository else spec.pretrained,
            force_image_size=spec.side,
            force_patch_dropout=0.0,
            force_preprocess_cfg=preprocess,
            pretrained_text=False,
            require_pretrained=True,
        )
    except Exception as error:  # open_clip raises whatever the file or the Hub leads it into
        weights = f", {spec.pretrained}" if spec.pretrained is not None else ""
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ConfigError(
            f"model.vision: open_clip cannot load {spec.name}{weights} ({type(error).__name__}: {reason}); name whole "
            f"weights, or a tag that this machine has cached or can reach"
        ) from error
    visual = cast(Any, model).visual
    record = visual.preprocess_cfg
    if record["interpolation"] not in ("bicubic", "bilinear"):
        raise ConfigError(f"model.vision.name: {spec.name} resizes {record['interpolation']!r}; only bicubic, bilinear")
    height, width = record["size"] if isinstance(record["size"], Sequence) else (record["size"],) * 2
    if height != width:
        raise ConfigError(f"model.vision.name: {spec.name} takes {width}x{height} pixels; name a tower of squares")
    pixels = Pixels(height, channels(record["mean"]), channels(record["std"]), record["interpolation"])
    return visual, pixels


def _named_config(spec: Vision) -> dict[str, Any]:
    config = open_clip.get_model_config(spec.name)
    if config is None:
        raise ConfigError(
            f"model.vision.name: open_clip has no {spec.name!r}; `python -c 'import open_clip; "
            f"print(open_clip.list_models())'` lists what it has"
        )
    return config


def _check_activation(spec: Vision, config: dict[str, Any]) -> None:
    """ConfigError if the weights of a tag were trained with the other GELU: open_clip loads them with a warning."""
    pretrained = cast(str, spec.pretrained)
    trained = open_clip.get_pretrained_cfg(spec.name, pretrained).get("quick_gelu", False)
    if trained == config.get("quick_gelu", False):
        return
    right = [
        name
        for name in open_clip.list_pretrained_models_by_tag(pretrained)
        if (other := open_clip.get_model_config(name))
        and other["vision_cfg"] == config["vision_cfg"]
        and other.get("quick_gelu", False) == trained
    ]
    names = " or ".join(right) or "local-dir:FOLDER with weights and an open_clip_config.json"
    gelu = {True: "QuickGELU", False: "GELU"}
    raise ConfigError(
        f"model.vision.name: {spec.name} computes {gelu[not trained]}, but the weights {pretrained!r} were trained "
        f"with {gelu[trained]}; write name: {names}"
    )


def _check_file(spec: Vision, config: dict[str, Any]) -> dict[str, Any]:
    """The preprocessing for weights in a file, which says nothing of it: that of this name's tags, if they agree."""
    path = Path(cast(str, spec.pretrained))
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    if not path.is_file():
        raise ConfigError(
            f"model.vision.pretrained: {spec.pretrained!r} is neither a tag of {spec.name} nor a file; "
            f"its tags are {', '.join(tags) or 'none'}"
        )
    keys = ("mean", "std", "interpolation")
    found = {tuple(open_clip.get_pretrained_cfg(spec.name, tag).get(key) for key in keys) for tag in tags}
    if len(found) > 1:
        raise ConfigError(
            f"model.vision.pretrained: {path} does not say how its pictures were normalised, and the tags of "
            f"{spec.name} differ; put it in a folder with an open_clip_config.json "
            f"(model_cfg, preprocess_cfg) and write name: local-dir:FOLDER"
        )
    if not spec.side:
        _check_positions(spec, config, path)
    return dict(zip(keys, found.pop(), strict=True)) if found else {}


def _check_positions(spec: Vision, config: dict[str, Any], path: Path) -> None:
    """ConfigError if the weights were trained at another side: open_clip would interpolate without a word."""
    name = "visual.positional_embedding"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                rows = file.get_slice(name).get_shape()[0] if name in file.keys() else None  # noqa: SIM118 - not a dict
        else:
            log.warning("%s is a pickle: read with weights_only=True; safetensors is safer and faster", path)
            tensors: Any = open_clip.factory.load_state_dict(str(path), weights_only=True)
            rows = len(tensors[name]) if name in tensors else None
    except Exception as error:  # readers raise whatever a damaged file leads them into
        raise ConfigError(
            f"model.vision.pretrained: {path} cannot be read as tensors ({type(error).__name__}); fetch it again"
        ) from error
    patch, side = config["vision_cfg"].get("patch_size", 16), config["vision_cfg"].get("image_size", 224)
    if rows is not None and rows != (side // patch) ** 2 + 1:
        trained = round((rows - 1) ** 0.5) * patch
        raise ConfigError(
            f"model.vision.pretrained: {path} was trained on {trained} pixels, but {spec.name} is for {side}; "
            f"write side: {trained}, or side: {side} to interpolate the position embeddings"
        )
