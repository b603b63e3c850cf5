"""What will load the result of a run, said before its first step."""

from __future__ import annotations

from open_clip.transformer import VisionTransformer
from transformers import CLIPVisionModel, SiglipVisionModel

from mmit.export.llava import llava_obstacle
from mmit.model.build import Assembly

LLAMA_CPP = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""`model_type` of the language models that `mmit export --format gguf` writes -> architecture of GGUF."""

CLIP_DEFECT = (
    "since May 2025 it moves the patches of CLIP towers by one and shows the LLM the cls token "
    "(github.com/ggml-org/llama.cpp/issues/25814); llama-cpp-python 0.3.8 is the last release that does not"
)


def targets(assembly: Assembly) -> list[str]:
    """Programs, with the class they will use, and for those that will not: why."""
    language, tower = assembly.vlm.language, assembly.vlm.vision
    kind = language.config.model_type
    if tower is None:
        return [f"transformers ({type(language).__name__})", "vLLM", _llama_cpp(kind)]
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
    answer = _llama_cpp(kind)
    return [*found, f"llama.cpp, but {CLIP_DEFECT}" if clip and answer == "llama.cpp" else answer]


def _llama_cpp(model_type: str) -> str:
    if model_type in LLAMA_CPP:
        return "llama.cpp"
    return f"not llama.cpp ({model_type} is not among {', '.join(LLAMA_CPP)})"
