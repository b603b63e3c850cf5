"""Tiny random models of every kind that is exported, as finished runs on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from mmit import config as schema
from mmit.export.write import write_run
from mmit.model.build import Assembly, add_lora, assemble
from mmit.model.saved import Saved

LLAMA = {
    **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024},
}
QWEN2 = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {
        "library": "transformers",
        "random": {"model_type": "clip_vision_model", "intermediate_size": 48, "projection_dim": 16, **SIZES},
    },
    "siglip": {
        "library": "transformers",
        "random": {"model_type": "siglip_vision_model", "intermediate_size": 48, **SIZES},
    },
    "dinov2": {"library": "transformers", "random": {"model_type": "dinov2", "mlp_ratio": 2, **SIZES}},
    "open_clip": {
        "library": "open_clip",
        "random": {"layers": 3, "width": 32, "head_width": 16, "patch_size": 7, "image_size": 28, "quick_gelu": True},
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "CLIP + llama": {"language": {"random": LLAMA}, "vision": TOWERS["clip"]},
    "SigLIP + qwen2, tied": {"language": {"random": QWEN2}, "vision": TOWERS["siglip"]},
    "open_clip ViT + llama, tied": {
        "language": {"random": LLAMA | {"tie_word_embeddings": True}},
        "vision": TOWERS["open_clip"] | {"layer": -1},
    },
    "DINOv2 + llama": {"language": {"random": LLAMA}, "vision": TOWERS["dinov2"] | {"select": "cls_patch"}},
    "text only": {"language": {"random": LLAMA}},
}


def saved_model(
    model: dict[str, Any],
    *,
    pictures: Literal["crop", "pad", "squash"] = "pad",
    lora: schema.Lora | None = None,
    chat: str = "auto",
    seed: int = 0,
) -> Saved:
    """A model as a run would leave it; an adapter gets weights that do something."""
    spec = schema.Model.model_validate(model)
    assembly = assemble(spec, seed=seed)
    if lora is not None:
        add_lora(assembly, lora, seed=seed)
    _enliven(assembly)
    assembly.vlm.eval()
    vision = assembly.vlm.vision
    bound = assembly.chat(chat)
    record = {
        "format": 1,
        "model": spec.model_dump(mode="json"),
        "seed": seed,
        "stage": "sft",
        "sources": assembly.sources,
        "lora": lora.model_dump() if lora is not None else None,
        "chat": {**vars(bound.format)},
        "placeholder": assembly.placeholder,
        "pictures": pictures,
        "image_tokens": vision.tokens if vision is not None else 0,
        "max_tokens": 512,
    }
    fit = vision.fit_for(pictures) if vision is not None else None
    return Saved(assembly, bound, fit, record["image_tokens"], record)


def run_of(saved: Saved, folder: Path) -> Path:
    """A run directory with this model in its final/."""
    final = folder / "final"
    final.mkdir(parents=True)
    write_run(saved, final)
    return folder


@torch.no_grad()
def _enliven(assembly: Assembly) -> None:
    """Random models start with biases and adapters of zero, and norms of one, which would hide what is mixed up."""
    generator = torch.Generator().manual_seed(7)
    for parameter in assembly.vlm.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
