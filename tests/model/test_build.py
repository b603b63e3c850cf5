"""Laws of parts: every parameter has a source, adapters merge to the same numbers, a saved model is the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mmit.api import train
from mmit.config import Config, ConfigError, Model
from mmit.model.build import Assembly, add_lora, assemble, embedding_rms, merge_lora, restore
from mmit.model.saved import load_saved
from mmit.training import state
from mmit.training.run import RunDirectory
from tests.training.tiny import (
    GEMMA3,
    GPT2,
    LANGUAGE,
    QWEN2,
    alone,
    assembled,
    config,
    mixed,
    opened,
    shards,
    stage,
)

BOTH = {"projector": {"lr": 1e-2}, "language": {"lr": 1e-2}}
QWEN3_MOE = QWEN2 | {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LORA = {"rank": 4, "alpha": 8}
ADAPTED = {"projector": {"lr": 1e-2}, "language": {"lr": 1e-2, "lora": LORA}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.mktemp("data") / "mixed", mixed(10))


def with_folders(output: Path, *stages: dict[str, Any], **changes: Any) -> Config:
    """A config whose parts are pretrained folders, as a user's are."""
    random = assemble(config(output, *stages).model, seed=9)
    if not (output.parent / "language").exists():
        random.vlm.language.save_pretrained(output.parent / "language")
        random.tokenizer.save_pretrained(output.parent / "language")
        assert random.vlm.vision is not None
        random.vlm.vision.encoder.save_pretrained(output.parent / "tower")
    vision = {"library": "transformers", "name": str(output.parent / "tower"), "layer": -1}
    return config(output, *stages, language=str(output.parent / "language"), vision=vision, **changes)


def losses(assembly: Assembly, wanted: Config) -> torch.Tensor:
    assembly.vlm.eval()
    with torch.no_grad():
        return torch.cat([assembly.vlm(row) for row in alone(opened(wanted, assembly))])


def shaken(assembly: Assembly) -> Assembly:
    """With an adapter that does something: fresh ones add zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in assembly.vlm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return assembly


# Every parameter has a source ----------------------------------------------------------------------------


def tensors_of(assembly: Assembly) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in assembly.vlm.named_parameters()}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("unknown", r"1 tensors without a place \(projector\.linears\.9\.weight\)"),
        ("missing", r"1 parameters without a source \(projector\.linears\.0\.bias\)"),
        ("shape", r"1 shapes that differ \(projector\.linears\.0\.bias\)"),
    ],
)
def test_a_tensor_without_a_place_or_a_parameter_without_a_source_is_named(
    fault: str, told: str, tmp_path: Path, data: Path
) -> None:
    assembly = assemble(config(tmp_path / "run", stage("s", data, BOTH)).model, seed=0)
    tensors = tensors_of(assembly)
    kept = tensors_of(assembly)
    if fault == "unknown":
        tensors["projector.linears.9.weight"] = torch.zeros(2)
    elif fault == "missing":
        del tensors["projector.linears.0.bias"]
    else:
        tensors["projector.linears.0.bias"] = torch.zeros(1)
    with pytest.raises(ConfigError, match=told):
        restore(assembly, {name: tensor + 1 for name, tensor in tensors.items()}, "here")
    assert all(torch.equal(p, kept[name]) for name, p in assembly.vlm.named_parameters()), "all or nothing"


def test_a_checkpoint_holds_what_changed_and_names_the_rest_by_hash(tmp_path: Path, data: Path) -> None:
    wanted = with_folders(tmp_path / "run", stage("s", data, {"projector": {"lr": 1e-3}}, steps=2))
    final = train(wanted)
    assert all(name.startswith("projector.") for name in load_file(final / "model.safetensors"))
    record = json.loads((final / "model.json").read_text(encoding="utf-8"))
    assert record["sources"]["language"]["sha256"].keys() == {"model.safetensors"}
    assert len(record["sources"]["vision"]["fingerprint"]) == 64


@pytest.mark.parametrize("part", ["language", "tower"])
def test_other_pretrained_files_are_refused(part: str, tmp_path: Path, data: Path) -> None:
    wanted = with_folders(tmp_path / "run", stage("s", data, {"projector": {"lr": 1e-3}}, steps=2))
    final = train(wanted)
    load_saved(final)
    file = tmp_path / part / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"other files of model\.(language|vision)"):
        load_saved(final)


def test_what_an_earlier_stage_changed_stays_changed(tmp_path: Path, data: Path) -> None:
    """Stage two trains the projector alone: the language model of stage one must be in its checkpoint all the same."""
    stages = [stage("one", data, BOTH, steps=2), stage("two", data, {"projector": {"lr": 1e-3}}, steps=2)]
    wanted = with_folders(tmp_path / "run", *stages)
    train(wanted)
    first = RunDirectory(tmp_path / "run").newest("one")
    assert first is not None
    final = load_file(tmp_path / "run/final/model.safetensors")
    for name, tensor in first.tensors().items():
        assert torch.equal(final[name], tensor) == name.startswith("language."), name


# Adapters ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out", "ignore:The following .*_pattern keys")  # peft's own
@pytest.mark.parametrize("language", [LANGUAGE, LANGUAGE | {"tie_word_embeddings": True}, GPT2, QWEN3_MOE], ids=str)
def test_merging_an_adapter_changes_no_loss(language: dict[str, Any], tmp_path: Path, data: Path) -> None:
    wanted = config(tmp_path / "run", stage("s", data, ADAPTED), language=language)
    assembly = shaken(assembled(wanted, dtype=torch.float32))
    plain = losses(
        assembled(config(tmp_path / "run", stage("s", data, BOTH), language=language), dtype=torch.float32), wanted
    )
    adapted = losses(assembly, wanted)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    merge_lora(assembly)
    torch.testing.assert_close(losses(assembly, wanted), adapted, rtol=1e-6, atol=2e-6)
    assert not any("lora_" in name or "base_layer" in name for name, _ in assembly.vlm.named_parameters())
    names = {name for name, _ in assembly.vlm.named_parameters()}
    assert assembly.fresh <= names
    assert assembly.changed <= names, "what a checkpoint would leave out"
    add_lora(assembly, wanted.stages[0].train.language.lora, seed=1)
    torch.testing.assert_close(losses(assembly, wanted), adapted, rtol=1e-6, atol=2e-6)


def start_of(wanted: Config, number: int) -> Assembly:
    origin = state.finished_before(wanted, number, RunDirectory(Path(wanted.output)))
    return state.start(wanted, number, origin, Path(str(wanted.cache)))


def test_the_next_stage_continues_the_same_adapter_or_merges_it(tmp_path: Path, data: Path) -> None:
    first = stage("one", data, ADAPTED, steps=3)
    same, other, full, none = (
        stage("two", data, train, steps=3)
        for train in (
            ADAPTED,
            ADAPTED | {"language": {"lr": 1e-2, "lora": LORA | {"rank": 2}}},
            BOTH,
            {"projector": {"lr": 1e-2}},
        )
    )
    train(with_folders(tmp_path / "run", first))
    saved = load_saved(tmp_path / "run")
    assert saved.assembly.adapter is not None
    wanted = with_folders(tmp_path / "run", first, same)
    expected = losses(saved.assembly, wanted)
    ranks = []
    for second in (same, other, full, none):
        assembly = start_of(with_folders(tmp_path / "run", first, second), 1)
        torch.testing.assert_close(losses(assembly, wanted), expected, rtol=1e-6, atol=2e-6)
        ranks.append(assembly.lora.rank if assembly.lora is not None else None)
    assert ranks == [4, 2, None, None]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own, see add_lora
def test_the_last_adapter_lies_beside_the_base_as_peft_knows_it(tmp_path: Path, data: Path) -> None:
    train(with_folders(tmp_path / "run", stage("s", data, ADAPTED, steps=3)))
    ours = load_saved(tmp_path / "run").assembly.vlm.language
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "language"), tmp_path / "run/final/adapter"
    )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.eval()(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-6, atol=1e-6
        )


# Saved and loaded ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("part", [BOTH, ADAPTED], ids=["full", "lora"])
def test_a_saved_model_has_the_held_out_losses_that_the_run_told(
    part: dict[str, Any], precision: str, tmp_path: Path, data: Path
) -> None:
    evaluation = {"holdout": {"fraction": 0.4, "by": "sample"}}
    wanted = with_folders(tmp_path / "run", stage("s", data, part, steps=3), eval=evaluation, precision=precision)
    train(wanted)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    told = next(line for line in lines if "held_out" in line)
    assembly = load_saved(tmp_path / "run").assembly
    held_out = opened(wanted, assembly).held_out
    assert held_out is not None
    with torch.no_grad():
        found = torch.cat([assembly.vlm(row) for row in held_out[0].rows])
    assert len(found) == told["supervised"]
    assert found.mean().item() == pytest.approx(told["held_out"]["mixed"], rel=1e-5)


def test_no_finished_run_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no finished run \(no final/model\.json\)"):
        load_saved(tmp_path)


def test_an_added_placeholder_is_the_mean_row_and_never_moves_the_others(tmp_path: Path) -> None:
    words = models.WordLevel({f"w{number}": number for number in range(260)} | {"<|im_end|>": 260}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<|im_end|>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for tied in (False, True):
        random = {"random": LANGUAGE | {"tie_word_embeddings": tied}, "tokenizer": str(tmp_path / "tokenizer")}
        tree = config(tmp_path / "x", stage("s", tmp_path, BOTH)).model.model_dump(mode="json") | {"language": random}
        assembly = assemble(Model.model_validate(tree), seed=0)
        without = assemble(Model.model_validate(tree | {"vision": None, "projector": None}), seed=0)
        assert (assembly.placeholder, without.placeholder) == (261, None)
        for table in ("get_input_embeddings", "get_output_embeddings"):
            weight = getattr(assembly.vlm.language, table)().weight.detach()
            rows = getattr(without.vlm.language, table)().weight.detach()
            assert torch.equal(weight[:261], rows)
            torch.testing.assert_close(weight[261], rows.mean(0))


@pytest.mark.parametrize("language", [LANGUAGE, GEMMA3], ids=lambda sizes: sizes["model_type"])
def test_the_size_of_word_embeddings_is_that_of_what_enters_the_model(language: dict[str, Any]) -> None:
    """Gemma multiplies its table by the root of the width."""
    made = assemble(config(Path("x"), stage("s", Path("x"), BOTH), language=language).model, seed=0).vlm.language
    rows = made.get_input_embeddings()(torch.arange(made.config.vocab_size))
    assert embedding_rms(made) == pytest.approx(rows.square().mean().sqrt().item(), rel=1e-5)
