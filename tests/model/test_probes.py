"""Laws of the start-up probes: they pass what is right and stop what would be wrong without a word."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from mmit.config import ConfigError, Model, RandomLanguage
from mmit.model.build import assemble
from mmit.model.probes import probe_embeddings, probe_head, probe_isolation
from mmit.model.vlm import VLM
from tests.training.tiny import GEMMA3, GPT2, LANGUAGE, QWEN2

CPU = torch.device("cpu")
PHI = LANGUAGE | {"model_type": "phi"}
GEMMA2 = QWEN2 | {"model_type": "gemma2", "head_dim": 8}
BLOOM = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}
MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
LFM2 = QWEN2 | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
GEMMA3N = GEMMA3 | {
    "model_type": "gemma3n_text",
    "intermediate_size": [48, 48],
    "vocab_size_per_layer_input": 260,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0],
}
QWEN3_NEXT = QWEN2 | {
    "model_type": "qwen3_next",
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


def kind(sizes: Any) -> str:
    return sizes["model_type"] if isinstance(sizes, dict) else str(sizes)


def made(sizes: dict[str, Any], attention: Any = "auto") -> VLM:
    return assemble(Model(language=RandomLanguage(random=sizes), attention=attention), seed=0).vlm


def change_arguments(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Gives the language model other arguments than `VLM` would."""
    kept = VLM._arguments

    def changed(self: VLM, row: Any, embeds: torch.Tensor) -> dict[str, Any]:
        named = {name: value(row) if callable(value) else value for name, value in changes.items()}
        return kept(self, row, embeds) | named

    monkeypatch.setattr(VLM, "_arguments", changed)


# Isolation ----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("sizes", [LANGUAGE, QWEN2, GEMMA3, PHI, GPT2], ids=kind)
def test_models_that_isolate_pass(sizes: dict[str, Any], attention: str) -> None:
    probe_isolation(made(sizes, attention), CPU)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "broken",
    [
        {"attention_mask": lambda row: torch.ones_like(row.ids)},
        {"use_cache": True},
        {"position_ids": lambda row: torch.arange(row.ids.shape[1])[None]},
        {"position_ids": None},
    ],
    ids=["a mask of ones", "a cache", "positions that go on", "no positions"],
)
def test_broken_isolation_is_an_error_of_the_config(
    broken: dict[str, Any], attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_arguments(monkeypatch, **broken)
    with pytest.raises(ConfigError, match=r"model\.language: packed conversations see each other in LlamaForCausalLM"):
        probe_isolation(made(LANGUAGE, attention), CPU)


@pytest.mark.parametrize("sizes", [BLOOM, LFM2, MAMBA], ids=kind)
@pytest.mark.filterwarnings("ignore")  # of kernels that are not installed
def test_models_that_carry_state_past_a_restart_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="see each other"):
        probe_isolation(made(sizes), CPU)


QWEN2_MOE = QWEN2 | {
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


def shaken(vlm: VLM) -> VLM:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vlm


def test_experts_that_round_by_their_company_are_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of a conversation differ by 2e-7 with its neighbours, through the sizes of the experts' products."""
    probe_isolation(shaken(made(QWEN2_MOE)), CPU)
    change_arguments(monkeypatch, position_ids=lambda row: torch.arange(row.ids.shape[1])[None])
    with pytest.raises(ConfigError, match="see each other in Qwen2MoeForCausalLM"):
        probe_isolation(shaken(made(QWEN2_MOE)), CPU)


def test_a_model_that_itself_refuses_packed_rows_is_an_error_of_the_config() -> None:
    with pytest.raises(ConfigError, match="Qwen3NextForCausalLM refuses a row of several conversations"):
        probe_isolation(made(QWEN3_NEXT), CPU)


def test_probes_leave_the_modes_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = made(GPT2)
    vlm.eval()
    vlm.language.transformer.h[1].train()
    modes = [module.training for module in vlm.modules()]
    probe_isolation(vlm, CPU)
    probe_head(vlm, CPU)
    assert [module.training for module in vlm.modules()] == modes
    change_arguments(monkeypatch, use_cache=True)
    with pytest.raises(ConfigError):
        probe_isolation(vlm, CPU)
    assert [module.training for module in vlm.modules()] == modes


def test_probes_do_not_touch_the_global_random_state() -> None:
    vlm = made(GPT2)
    vlm.train()
    state = torch.get_rng_state()
    probe_isolation(vlm, CPU)
    probe_head(vlm, CPU)
    assert torch.equal(torch.get_rng_state(), state)


# Embeddings ----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [LANGUAGE, GEMMA2, GEMMA3, GPT2, PHI], ids=kind)
def test_models_that_only_look_ids_up_pass(sizes: dict[str, Any]) -> None:
    probe_embeddings(made(sizes))


def test_a_model_with_a_table_for_each_layer_is_refused() -> None:
    vlm = shaken(made(GEMMA3N))  # at its start the model scales those tables by zero
    with pytest.raises(ConfigError, match="Gemma3nForCausalLM computes other hidden states from embeddings"):
        probe_embeddings(vlm)


def test_a_model_that_must_have_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = made(LANGUAGE)
    kept = vlm.language.model.forward

    def with_ids_alone(*, input_ids: torch.Tensor | None = None, **more: Any) -> Any:
        if input_ids is None:
            raise RuntimeError("make sure you provide exact inputs_embeds")
        return kept(input_ids=input_ids, **more)

    monkeypatch.setattr(vlm.language.model, "forward", with_ids_alone)
    with pytest.raises(ConfigError, match="cannot be given embeddings in place of ids"):
        probe_embeddings(vlm)


# The head ----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [LANGUAGE, LANGUAGE | {"tie_word_embeddings": True}, QWEN2, GEMMA3, PHI], ids=kind)
def test_a_bare_head_is_found_equal(sizes: dict[str, Any]) -> None:
    assert probe_head(made(sizes), CPU)


@pytest.mark.parametrize(
    "sizes",
    [
        GEMMA2 | {"final_logit_softcapping": 5.0},
        GEMMA2,  # caps at 30, which the small logits of a model without training never come near
        LANGUAGE | {"model_type": "cohere"},
        LANGUAGE | {"model_type": "granite", "logits_scaling": 4.0},
    ],
    ids=kind,
)
def test_a_head_that_caps_or_scales_is_found_different(sizes: dict[str, Any]) -> None:
    assert not probe_head(made(sizes), CPU)


def in_bf16(sizes: dict[str, Any]) -> VLM:
    """As on a GPU, whose kernels add in another order, and so round otherwise, for other numbers of rows."""
    vlm = made(sizes).to(torch.bfloat16)
    head = cast(torch.nn.Linear, vlm.language.get_output_embeddings())

    def by_rows(states: torch.Tensor) -> torch.Tensor:
        return (
            torch.nn.functional.linear(states.float(), head.weight.float()) * (1 + 1e-4 * states.shape[-2])
        ).bfloat16()

    head.forward = by_rows
    return vlm


@pytest.mark.parametrize("sizes", [LANGUAGE, QWEN2, GEMMA3], ids=kind)
def test_a_bare_head_is_found_equal_in_spite_of_bf16(sizes: dict[str, Any]) -> None:
    assert probe_head(in_bf16(sizes), CPU)


@pytest.mark.parametrize(
    "sizes",
    [
        GEMMA2,
        GEMMA2 | {"final_logit_softcapping": 200.0},
        LANGUAGE | {"model_type": "cohere"},
        LANGUAGE | {"model_type": "granite", "logits_scaling": 1.1},
    ],
    ids=kind,
)
def test_a_head_that_caps_or_scales_is_found_different_in_bf16(sizes: dict[str, Any]) -> None:
    assert not probe_head(in_bf16(sizes), CPU)


def test_the_head_probe_leaves_no_hook_and_no_chunk_behind() -> None:
    vlm = made(LANGUAGE)
    vlm.chunk = 5
    probe_head(vlm, CPU)
    assert vlm.chunk == 5
    head = vlm.language.get_output_embeddings()
    states = torch.randn(3, 32)
    assert torch.equal(head(states), torch.nn.functional.linear(states, head.weight))


@pytest.mark.parametrize("sizes", [GEMMA2, GPT2], ids=kind)
def test_auto_attention_takes_what_the_model_has(sizes: dict[str, Any]) -> None:
    """Gemma 2 has no sdpa in transformers: auto must not refuse it."""
    expected = "eager" if sizes is GEMMA2 else "sdpa"
    assert made(sizes).language.config._attn_implementation == expected
