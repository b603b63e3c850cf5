"""What is promised before the first step is what an export then does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmit.export.llava import ExportError
from mmit.export.targets import targets
from mmit.export.write import export
from tests.export.models import LLAMA, MODELS, TOWERS, run_of, saved_model

OTHERS: dict[str, dict[str, Any]] = {
    "linear projector": {"language": {"random": LLAMA}, "vision": TOWERS["clip"], "projector": {"kind": "linear"}},
    "cls": {"language": {"random": LLAMA}, "vision": TOWERS["clip"] | {"select": "cls"}},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_transformers_is_promised_to_load_is_exported(model: dict[str, Any]) -> None:
    assert targets(saved_model(model).assembly)[0].startswith("transformers (")


@pytest.mark.parametrize("model", OTHERS.values(), ids=OTHERS)
def test_what_only_mmit_will_load_is_refused_for_the_reason_given(model: dict[str, Any], tmp_path: Path) -> None:
    saved = saved_model(model)
    (only,) = targets(saved.assembly)
    assert only.startswith("mmit only (")
    with pytest.raises(ExportError) as caught:
        export(run_of(saved, tmp_path / "run"), tmp_path / "out")
    assert only.removeprefix("mmit only (")[:-1] in str(caught.value)


def test_towers_that_vllm_or_llama_cpp_lack_are_named() -> None:
    vllm, llama_cpp = targets(saved_model(MODELS["CLIP + llama"]).assembly)[1:]
    assert vllm == "vLLM"
    assert llama_cpp.startswith("llama.cpp, but since May 2025 it moves the patches of CLIP towers")
    assert targets(saved_model(MODELS["SigLIP + qwen2, tied"]).assembly)[1:] == ["vLLM", "llama.cpp"]
    assert targets(saved_model(MODELS["text only"]).assembly)[1:] == ["vLLM", "llama.cpp"]
    dinov2 = targets(saved_model(MODELS["DINOv2 + llama"]).assembly)
    assert dinov2[1].startswith("not vLLM")
    assert dinov2[2].startswith("not llama.cpp")
