"""Checkpoints as strangers hand them over, made by transformers and torch alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mmit.data.byte_tokenizer import byte_tokenizer

TEXT: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 260},
    **{"num_attention_heads": 4, "max_position_embeddings": 1024},
}
TOWER: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 7, "projection_dim": 16},
}


def random_llava(folder: Path, *, tied: bool = False, layer: int = -2) -> LlavaForConditionalGeneration:
    """A Llava of random weights with its processor, saved in `folder`."""
    torch.manual_seed(3)
    tokenizer = byte_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT, tie_word_embeddings=tied),
        image_token_index=int(tokenizer.convert_tokens_to_ids("<image>")),  # pyright: ignore[reportArgumentType]
        vision_feature_layer=layer,
        image_seq_length=16,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    square = {"height": 28, "width": 28}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return model


def llava_repository(folder: Path, llava: LlavaForConditionalGeneration) -> None:
    """The same weights as the LLaVA repository lays them out: LLM and projector in pickles, the tower beside."""
    tensors = {}
    for name, value in llava.state_dict().items():
        if name.startswith("model.language_model."):
            tensors["model." + name.removeprefix("model.language_model.")] = value
        elif name.startswith("model.multi_modal_projector.linear_"):
            number, kind = name.removeprefix("model.multi_modal_projector.linear_").split(".")
            tensors[f"model.mm_projector.{2 * (int(number) - 1)}.{kind}"] = value
        elif name == "lm_head.weight":
            tensors[name] = value
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    text = llava.config.text_config.to_dict()
    keys = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "somewhere/clip-tower",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(text | keys))
    byte_tokenizer().save_pretrained(folder)
    llava.model.vision_tower.save_pretrained(folder / "clip-tower")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder / "clip-tower"
    )
