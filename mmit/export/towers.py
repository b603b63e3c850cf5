"""A vision tower as transformers' Llava holds it: its configuration and its tensors, those of open_clip renamed.

Every exported tower has one block above those that run, and Llava reads hidden state -2, as the LLaVA models published
on the Hub do. Reading -1 of a tower cut to its last running block would say the same to transformers, but vLLM puts
CLIP's and SigLIP's final norm on top where the last block is read, silently.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from open_clip.transformer import LayerNorm, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, Dinov2Model, Dinov2WithRegistersModel, PreTrainedConfig, PreTrainedModel

from mmit.model.vision import VisionTower

FEATURE_LAYER = -2
TRANSFORMERS_TOWERS = "CLIP, SigLIP and DINOv2 (without registers) of transformers, CLIP ViTs of open_clip"

# open_clip's names of a vision transformer -> those of transformers' CLIPVisionModel.
CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
LAST_LINEARS = {
    *("attn.out_proj", "mlp.c_proj"),  # open_clip
    *("self_attn.out_proj", "mlp.fc2", "attention.o_proj", "mlp.weights_out"),  # CLIP, SigLIP, DINOv2
}
"""What ends a block's two branches: with zeros there, the block adds nothing to its input."""


def tower_obstacle(tower: VisionTower) -> str | None:
    """Why Llava cannot hold this tower, or None if it can."""
    if tower.select == "cls":
        return "select: cls keeps one token, Llava keeps the patches, with or without cls"
    match tower.encoder:
        case Dinov2WithRegistersModel() if tower.select == "patch":
            return "Llava's `default` drops the cls token alone, and would keep DINOv2's registers"
        case Dinov2WithRegistersModel():
            return "Llava's `full` keeps DINOv2's registers too"
        case PreTrainedModel():
            return None
        case VisionTransformer() as visual:
            return _open_clip_obstacle(visual)
        case encoder:
            return f"a {type(encoder).__name__} of open_clip has no class of the same computation"


def select_strategy(tower: VisionTower) -> str:
    """`vision_feature_select_strategy`: `default` drops the first token, which must then be cls."""
    return "default" if tower.select == "patch" and tower.layout.has_cls else "full"


def tower_config(tower: VisionTower) -> PreTrainedConfig:
    """`vision_config` of a tower with one block above those that run."""
    blocks = tower.blocks + 1
    if isinstance(tower.encoder, VisionTransformer):
        return _clip_config(tower.encoder, blocks, tower.above[0])
    config = cast(PreTrainedConfig, cast(PreTrainedModel, tower.encoder).config)
    if isinstance(tower.encoder, Dinov2Model):
        plain = config.to_dict()
        for derived in ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices"):
            plain.pop(derived, None)
        return type(config).from_dict(plain | {"num_hidden_layers": blocks})
    config = copy.deepcopy(config)
    cast(Any, config).num_hidden_layers = blocks
    return config


def tower_tensors(tower: VisionTower) -> dict[str, Tensor]:
    """Tensors under the names of the class that `tower_config` builds."""
    above = tower.above[0] if tower.above[0] is not None else _resting(_blocks(tower)[-1])
    if isinstance(tower.encoder, VisionTransformer):
        return clip_tensors(tower.encoder, above)
    tensors = dict(tower.encoder.state_dict())
    holder = "encoder.layer" if isinstance(tower.encoder, Dinov2Model) else "encoder.layers"
    return tensors | {f"{holder}.{tower.blocks}.{name}": value for name, value in above.state_dict().items()}


def clip_tensors(visual: VisionTransformer, above: nn.Module) -> dict[str, Tensor]:
    """open_clip's tensors and those of one block above, as `CLIPVisionModel` names them, without the output head."""
    tensors: dict[str, Tensor] = {}
    for name, value in visual.state_dict().items():
        first, _, rest = name.partition(".")
        if name in CLIP_NAMES:
            tensors[CLIP_NAMES[name]] = value
        elif first in CLIP_NAMES:
            tensors[f"{CLIP_NAMES[first]}.{rest}"] = value
    for number, block in enumerate([*visual.transformer.resblocks, above]):
        for name, value in block.state_dict().items():
            if name.startswith("attn.in_proj_"):
                kind = name.removeprefix("attn.in_proj_")
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    tensors[f"encoder.layers.{number}.self_attn.{letter}_proj.{kind}"] = part.clone()
                continue
            module, _, kind = name.rpartition(".")
            tensors[f"encoder.layers.{number}.{BLOCK_NAMES[module]}.{kind}"] = value
    return tensors


def _blocks(tower: VisionTower) -> list[nn.Module]:
    match tower.encoder:
        case VisionTransformer() as visual:
            return list(visual.transformer.resblocks)
        case Dinov2Model() as model:
            return list(model.encoder.layer)
        case encoder:
            return list(cast(Any, encoder).encoder.layers)


@torch.no_grad()
def _resting(block: nn.Module) -> nn.Module:
    """A block that passes its input on: the tower has none above the last, and the export needs one there."""
    resting = copy.deepcopy(block)
    for name, module in resting.named_modules():
        if name in LAST_LINEARS:
            for parameter in module.parameters():
                parameter.zero_()
    return resting


def _open_clip_obstacle(visual: VisionTransformer) -> str | None:
    blocks = list(visual.transformer.resblocks)
    for block in blocks:
        if not isinstance(block, ResidualAttentionBlock) or not isinstance(block.ls_1, nn.Identity):
            return f"CLIPVisionModel has no block like open_clip's {type(block).__name__} with layer scale"
        if set(dict(block.mlp.named_children())) != {"c_fc", "gelu", "c_proj"} or not isinstance(block.ln_1, LayerNorm):
            return "CLIPVisionModel has no block with a norm inside its MLP"
    if not isinstance(visual.ln_pre, LayerNorm):
        return "CLIPVisionModel has a norm after its embeddings, this tower has none"
    return None


def _clip_config(visual: VisionTransformer, blocks: int, above: nn.Module | None) -> CLIPVisionConfig:
    block = cast(Any, next(iter([*visual.transformer.resblocks, above])))
    act = {QuickGELU: "quick_gelu", nn.GELU: "gelu"}[type(block.mlp.gelu)]
    return CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=blocks,
        num_attention_heads=block.attn.num_heads,
        image_size=cast(tuple[int, int], visual.image_size)[0],
        patch_size=cast(tuple[int, int], visual.patch_size)[0],
        hidden_act=act,
        layer_norm_eps=block.ln_1.eps,
    )
