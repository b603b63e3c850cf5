"""What will load the result of a run, said before its first step."""

from __future__ import annotations

from typing import Any

from open_clip.transformer import VisionTransformer
from transformers import CLIPVisionModel, SiglipVisionModel

from mmit.export.llava import llava_obstacle
from mmit.model.build import Assembly

LLAMA_CPP = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""`model_type` of the language models that `mmit export --format gguf` writes -> architecture of GGUF."""

ROPES = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "yarn": {"rope_theta", "factor", "original_max_position_embeddings"},
    "llama3": {
        *("rope_theta", "factor", "original_max_position_embeddings"),
        *("low_freq_factor", "high_freq_factor"),
    },
}
"""Types of rope whose angles a GGUF can give -> the settings that these hang on there."""

CLIP_DEFECT = (
    "since May 2025 it moves the patches of CLIP towers by one and shows the LLM the cls token "
    "(github.com/ggml-org/llama.cpp/issues/25814); llama-cpp-python 0.3.8 is the last release that does not"
)


def targets(assembly: Assembly) -> list[str]:
    """Programs, with the class they will use, and for those that will not: why."""
    language, tower = assembly.vlm.language, assembly.vlm.vision
    if tower is None:
        return [f"transformers ({type(language).__name__})", "vLLM", _llama_cpp(language.config)]
    if (reason := llava_obstacle(assembly)) is not None:
        return [f"mmit only ({reason})"]
    found = ["transformers (LlavaForConditionalGeneration)"]
    clip = isinstance(tower.encoder, CLIPVisionModel | VisionTransformer)
    siglip = isinstance(tower.encoder, SiglipVisionModel)
    if clip or siglip:
        found.append("vLLM")
    else:
        found.append("not vLLM (its Llava takes CLIP and SigLIP towers)")
    if not (clip or siglip) or tower.select != "patch":
        return [*found, "not llama.cpp (the mmproj is written for CLIP and SigLIP towers with select: patch)"]
    answer = _llama_cpp(language.config)
    return [*found, f"llama.cpp, but {CLIP_DEFECT}" if clip and answer == "llama.cpp" else answer]


def _llama_cpp(config: Any) -> str:
    kind = config.model_type
    if kind not in LLAMA_CPP:
        return f"not llama.cpp ({kind} is not among {', '.join(LLAMA_CPP)})"
    if config.to_dict().get("sliding_window") is not None:
        return f"not llama.cpp (its {LLAMA_CPP[kind]} has no sliding window)"
    reason = _rope_obstacle(config)
    return f"not llama.cpp ({reason})" if reason is not None else "llama.cpp"


def _rope_obstacle(config: Any) -> str | None:
    """Why llama.cpp would turn queries and keys by other angles."""
    settings = {key: value for key, value in config.rope_parameters.items() if value is not None}
    kind = settings["rope_type"]
    if kind not in ROPES:
        return f"rope_type {kind} is not among {', '.join(ROPES)}"
    if kind == "llama3" and LLAMA_CPP[config.model_type] != "llama":
        return f"its {LLAMA_CPP[config.model_type]} does not read rope_type llama3"
    other, lost = settings.keys() - ROPES[kind] - {"rope_type", "type"}, ROPES[kind] - settings.keys()
    found = [f"{word} {', '.join(sorted(keys))}" for word, keys in (("with", other), ("without", lost)) if keys]
    return f"rope_type {kind} {' and '.join(found)}" if found else None
