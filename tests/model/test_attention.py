"""Flash attention, which exists on GPUs alone: where it is turned to, and that it is told where conversations end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from mmit.config import ConfigError
from mmit.data.packing import Example, Row, pack
from mmit.model import attention
from mmit.model.attention import use_flash_attention
from mmit.model.build import assemble
from tests.training.tiny import LANGUAGE, QWEN2, config, stage

GPU = torch.device("cuda")


def installed(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[int]]:
    """As on a machine with a GPU and flash-attn, whose kernel for rows of several texts is this one, in fp32 on the
    CPU; the boundaries that it was given."""
    given: list[Sequence[int]] = []

    def one_by_one(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        assert cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff().tolist()
        assert (max_seqlen_q, max_seqlen_k) == (max(lengths), max(lengths))
        given.append(cu_seqlens_q.tolist())
        parts = [[part.transpose(0, 1) for part in whole.split(lengths)] for whole in (q, k, v)]
        many = [
            scaled_dot_product_attention(*part, is_causal=causal, scale=softmax_scale, enable_gqa=True)
            for part in zip(*parts, strict=True)
        ]
        return torch.cat([part.transpose(0, 1) for part in many])

    def refused(*arguments: Any) -> Tensor:
        raise RuntimeError("flash attention without boundaries")

    module, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    module.__spec__ = ModuleSpec("flash_attn", None)
    vars(module).update(
        flash_attn_func=refused, flash_attn_varlen_func=one_by_one, flash_attn_with_kvcache=refused, __path__=[]
    )
    vars(padding).update(pad_input=refused, unpad_input=refused)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return given


def language(tmp_path: Path, sizes: dict[str, Any] = LANGUAGE, wanted: str = "auto") -> PreTrainedModel:
    only = stage("s", tmp_path, {"language": {"lr": 1e-3}})
    return assemble(
        config(tmp_path / "run", only, vision=None, language=sizes, attention=wanted).model, seed=0
    ).vlm.language


def row(*lengths: int) -> Row:
    generator = np.random.default_rng(0)
    samples = [generator.integers(0, 200, size=length).astype(np.int32) for length in lengths]
    none = np.empty((0, 3), dtype=np.int32)
    return pack([Example(ids, ids, none, 0, "here") for ids in samples], [], [], touch_vision=False)


@pytest.mark.parametrize("wanted", ["auto", "flash_attention_2"])
def test_a_model_is_built_with_attention_of_the_cpu_where_it_is_built_and_probed(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch)
    assert language(tmp_path, wanted=wanted).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("sizes", [LANGUAGE, QWEN2], ids=["llama", "qwen2"])
def test_flash_attention_keeps_the_conversations_of_a_row_apart(
    sizes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = installed(monkeypatch)
    only = stage("s", tmp_path, {"language": {"lr": 1e-3}})
    vlm = assemble(config(tmp_path / "run", only, vision=None, language=sizes).model, seed=0).vlm
    before = vlm(row(7, 12, 3))
    assert not given
    use_flash_attention(vlm.language, "auto", GPU, bf16=True)
    torch.testing.assert_close(vlm(row(7, 12, 3)), before, rtol=1e-5, atol=1e-5)
    assert given == [[0, 7, 19, 22]] * 2


@pytest.mark.parametrize(("device", "bf16"), [(torch.device("cpu"), True), (GPU, False)])
def test_flash_attention_is_left_alone_where_it_cannot_compute(
    device: torch.device, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch)
    model = language(tmp_path)
    use_flash_attention(model, "auto", device, bf16=bf16)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match=r"model\.attention: flash_attention_2 needs a GPU, bf16 .*; write auto"):
        use_flash_attention(model, "flash_attention_2", device, bf16=bf16)


def test_flash_attention_that_is_not_installed_is_refused_by_name(tmp_path: Path) -> None:
    model = language(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.attention: .*to be installed.*; write auto"):
        use_flash_attention(model, "flash_attention_2", GPU, bf16=True)


def test_a_model_without_flash_attention_keeps_its_own_under_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch)
    model = language(tmp_path)

    def lacks(*_: Any, **__: Any) -> bool:
        raise ValueError("LlamaForCausalLM does not support Flash Attention 2 yet")

    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lacks)
    use_flash_attention(model, "auto", GPU, bf16=True)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="does not support Flash Attention 2"):
        use_flash_attention(model, "flash_attention_2", GPU, bf16=True)
