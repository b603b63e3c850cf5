"""A LoRA of ours as a peft adapter beside the exported base model."""

from __future__ import annotations

import re
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from mmit.export.llava import ExportError
from mmit.model.build import Assembly


def check_adapter(assembly: Assembly) -> None:
    """ExportError for a LoRA on the vocabulary: beside an exported base, peft does not find its tables again."""
    language = assembly.vlm.language
    tables = {"embeddings": language.get_input_embeddings(), "head": language.get_output_embeddings()}
    adapted = [name for name, table in tables.items() if isinstance(table, BaseTunerLayer)]
    if adapted:
        raise ExportError(f"--adapter: the LoRA adapts the {' and '.join(adapted)} too; leave it out, to merge them")


def write_adapter(assembly: Assembly, folder: Path, *, base: str) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained` reads them."""
    assert assembly.lora is not None
    language = assembly.vlm.language
    inside = assembly.vlm.vision is not None
    tensors, adapted = {}, set()
    for name, value in language.named_parameters():
        module, lora, rest = name.partition(".lora_")
        if not lora:
            continue
        adapted.add(module.rpartition(".")[2])
        path = _in_llava(module, language.base_model_prefix) if inside else module
        tensors[f"base_model.model.{path}.lora_{rest.replace('.default.', '.')}"] = value.detach().contiguous()
    # The names of the language model's linears alone: towers have a q_proj too.
    leaves = "|".join(sorted(re.escape(leaf) for leaf in adapted))
    where = r"model\.language_model\." if inside else ""
    settings = LoraConfig(
        r=assembly.lora.rank,
        lora_alpha=assembly.lora.alpha,  # pyright: ignore[reportArgumentType] - peft takes floats
        lora_dropout=assembly.lora.dropout,
        target_modules=rf"{where}.*\.({leaves})",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir()
    settings.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _in_llava(module: str, prefix: str) -> str:
    return f"model.language_model.{module.removeprefix(prefix + '.')}"
