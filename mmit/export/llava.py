"""A model of ours as `LlavaForConditionalGeneration`, without copying a tensor: parts, configuration and names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mmit.config import ConfigError
from mmit.data.chat import Chat
from mmit.export.towers import (
    FEATURE_LAYER,
    TRANSFORMERS_TOWERS,
    select_strategy,
    tower_config,
    tower_obstacle,
    tower_tensors,
)
from mmit.model.build import Assembly, plain_name
from mmit.model.projector import MlpProjector

DINOV2_NAMES = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}
"""What transformers 5.20 calls the linears of DINOv2's attention -> what the files on the Hub do."""

EXPORTABLE = (
    f"What Llava holds: {TRANSFORMERS_TOWERS}, with select: patch or cls_patch; the projector {{kind: mlp, depth: 2}}; "
    f"causal LMs of transformers whose logits are a plain linear head without bias, caps or scales (Llama, Mistral, "
    f"Qwen, SmolLM, Phi-3, ...)"
)


class ExportError(ConfigError):
    """What cannot be exported, or came out different: what was found and what to do instead."""


def llava_obstacle(assembly: Assembly) -> str | None:
    """Why `LlavaForConditionalGeneration` cannot hold this model, or None if it can."""
    tower, projector = assembly.vlm.vision, assembly.vlm.projector
    if tower is not None and (reason := tower_obstacle(tower)):
        return f"the vision tower: {reason}"
    if not (isinstance(projector, MlpProjector) and len(projector.linears) == 2):
        depth = f" of depth {len(projector.linears)}" if isinstance(projector, MlpProjector) else ""
        return f"the projector: {type(projector).__name__}{depth} is not linear, GELU, linear"
    reason = language_obstacle(assembly.vlm.language)
    return f"the language model: {reason}" if reason else None


@torch.no_grad()
def language_obstacle(language: PreTrainedModel) -> str | None:
    """Why Llava would compute other logits: it puts a plain linear head on the base model of the same configuration."""
    kind = type(language).__name__
    head = language.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return f"{kind} has no linear head"
    if head.bias is not None:
        return f"the head of {kind} has a bias"
    with torch.device("meta"):
        built = AutoModel.from_config(language.config)
    if type(built) is not type(language.base_model):
        return f"{type(built).__name__}, which AutoModel builds from its configuration, is not the base of {kind}"
    ids = torch.arange(5, device=head.weight.device)[None]
    training = [module for module in language.modules() if module.training]
    language.eval()
    mixed = len({parameter.dtype for parameter in language.parameters()}) > 1  # as while a part of it trains
    # Caps do nothing to the small logits of a model that has hardly learned; amplified ones show them.
    amplified = head.register_forward_hook(lambda module, inputs, logits: 1e4 * cast(Tensor, logits))
    with amplified, torch.autocast(head.weight.device.type, torch.bfloat16, enabled=mixed):
        own = cast(Any, language)(input_ids=ids, use_cache=False).logits
        plain = head(cast(Any, language.base_model)(input_ids=ids, use_cache=False).last_hidden_state)
    for module in training:
        module.training = True
    if not torch.allclose(own, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max())):
        return f"{kind} caps or scales its logits, which Llava drops"
    return None


def llava_model(assembly: Assembly, *, image_tokens: int) -> LlavaForConditionalGeneration:
    """The twin, whose parameters are the tensors of the assembly themselves; an adapter is left out."""
    if (reason := llava_obstacle(assembly)) is not None:
        raise ExportError(
            f"{reason}. {EXPORTABLE}. Anything else: `--format mmit` writes a folder that mmit itself loads"
        )
    tower, language = assembly.vlm.vision, assembly.vlm.language
    assert tower is not None
    assert assembly.placeholder is not None
    config = LlavaConfig(
        vision_config=tower_config(tower),
        text_config=language.config,
        image_token_index=assembly.placeholder,
        image_seq_length=image_tokens,
        projector_hidden_act="gelu",
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy=cast(Any, select_strategy(tower)),
        multimodal_projector_bias=True,
        tie_word_embeddings=bool(language.config.tie_word_embeddings),
    )
    with torch.device("meta"):
        twin = LlavaForConditionalGeneration(config)
    twin.load_state_dict(llava_tensors(assembly), strict=True, assign=True)
    twin.tie_weights()
    return twin.eval()


def llava_tensors(assembly: Assembly) -> dict[str, Tensor]:
    """Every tensor of the model under the name that `LlavaForConditionalGeneration` gives it."""
    tower, projector = assembly.vlm.vision, cast(MlpProjector, assembly.vlm.projector)
    assert tower is not None
    tensors = {f"model.vision_tower.{name}": value for name, value in tower_tensors(tower).items()}
    for number, linear in enumerate(projector.linears, start=1):
        for name, value in linear.state_dict().items():
            tensors[f"model.multi_modal_projector.linear_{number}.{name}"] = value
    base = assembly.vlm.language.base_model_prefix
    for name, value in language_tensors(assembly.vlm.language).items():
        part, _, rest = name.partition(".")
        tensors[f"model.language_model.{rest}" if part == base else "lm_head.weight"] = value
    return tensors


def published_names(tensors: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Tensors under the names of the LLaVA files on the Hub, which every version of transformers and vLLM read.

    transformers 5 would write a tower without `vision_model.`, which vLLM and transformers 4 do not find; and its new
    names of DINOv2 are unknown to it before 5.20, which then draws those weights at random.
    """
    has_vision_model = any(name.endswith(".patch_embedding.weight") for name in tensors)
    tower = "vision_tower.vision_model." if has_vision_model else "vision_tower."
    renamed = {
        "model.vision_tower.": tower,
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    published = {}
    for name, value in tensors.items():
        prefix = next(prefix for prefix in renamed if name.startswith(prefix))
        if not (tied and prefix == "lm_head."):
            published[renamed[prefix] + _as_on_the_hub(name.removeprefix(prefix))] = value
    return published


def _as_on_the_hub(name: str) -> str:
    """The name within its part; only DINOv2 has an `encoder.layer` of which `attention` holds the linears itself."""
    found = re.fullmatch(r"(encoder\.layer\.\d+\.attention\.)(\w_proj)(\.\w+)", name)
    return f"{found[1]}{DINOV2_NAMES[found[2]]}{found[3]}" if found else name


def language_tensors(language: PreTrainedModel) -> dict[str, Tensor]:
    """The language model's own tensors: an adapter beside them is left out, and its renaming undone."""
    return {plain_name(name): value for name, value in language.state_dict().items() if ".lora_" not in name}


def generation_config(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> GenerationConfig:
    """Greedy by default; an answer ends at any of the chat's stop ids."""
    return GenerationConfig(
        eos_token_id=list(chat.stop_ids) or None,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
