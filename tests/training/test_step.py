"""Laws of a step: whoever computes it, in however many rows, it is the same step; what is declared happens."""

from __future__ import annotations

import gc
import io
import math
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file

from mmit.api import train
from mmit.config import Config, ConfigError
from mmit.data.loader import Step
from mmit.data.sample import Sample, SampleError, message
from mmit.model import build
from mmit.model.build import Assembly, assemble
from mmit.training import parallel
from mmit.training.checks import finite_norm
from mmit.training.data import StageData, too_long
from mmit.training.loop import _forward_backward
from mmit.training.optim import build_optimizer, set_rates
from mmit.training.runlog import record_of
from mmit.training.start import table_of_parts
from tests.training.tiny import (
    CLIP,
    LANGUAGE,
    assembled,
    assert_close,
    config,
    metrics,
    mixed,
    once_each,
    opened,
    pictured,
    run,
    shards,
    silent,
    stage,
    written,
)

ALL = {"vision": {"lr": 1e-3}, "projector": {"lr": 1e-3}, "language": {"lr": 1e-3}}
LORA = {"language": {"lr": 1e-3, "lora": {"rank": 4, "alpha": 8}}}


def steps_of(output: Path, data: Path, train: dict[str, Any], *, ranks: int, row_tokens: int, row_images: Any = None):
    """The config, and for each rank its model and its steps."""
    only = stage("s", data, train, batch_size=10, row_tokens=row_tokens, row_images=row_images, pictures="squash")
    wanted = config(output, only, precision="fp64")
    pairs = []
    for rank in range(ranks):
        assembly = assembled(wanted)
        pairs.append((assembly, opened(wanted, assembly, rank=rank, ranks=ranks)))
    return wanted, pairs


def trained_for_two_steps(
    wanted: Config, pairs: list[tuple[Assembly, StageData]]
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Losses (sources, 2) and gradients of each step, and the weights after both: ranks are summed up by hand.

    All ranks' rows run through the first rank's model; that each rank alone computes its rows is shown elsewhere.
    """
    accelerator = Accelerator(cpu=True)
    assembly, _ = pairs[0]
    optimizer = build_optimizer(assembly, wanted.stages[0])
    losses, gradients = [], []
    for number in range(2):
        mine: list[Step] = [data.training[number] for _, data in pairs]
        whole = replace(mine[0], rows=tuple(row for step in mine for row in step.rows))
        set_rates(optimizer, wanted.stages[0], number, 10)
        losses.append(_forward_backward(wanted, assembly.vlm, whole, whole.supervised, accelerator, 1))
        named = {name: p for name, p in assembly.vlm.named_parameters() if p.requires_grad}
        gradients.append({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()})
        finite_norm(optimizer, losses[-1], whole, wanted.stages[0])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, gradients, {name: p.detach().clone() for name, p in assembly.vlm.named_parameters()}


@pytest.mark.parametrize("part", [ALL, {"projector": {"lr": 1e-3}}, LORA], ids=["all", "projector", "lora"])
def test_one_row_is_four_micro_steps_is_four_ranks(part: dict[str, Any], tmp_path: Path, data: Path) -> None:
    layouts = {
        "one row": {"ranks": 1, "row_tokens": 4000},
        "micro-steps": {"ranks": 1, "row_tokens": 200},
        "few pictures a row": {"ranks": 1, "row_tokens": 4000, "row_images": 3},
        "two ranks": {"ranks": 2, "row_tokens": 400},
        "four ranks": {"ranks": 4, "row_tokens": 200},
    }
    results = {}
    for name, layout in layouts.items():
        wanted, pairs = steps_of(tmp_path / "run", data, part, **layout)
        rows = [len(found.training[0].rows) for _, found in pairs]
        assert len(set(rows)) == 1, "every rank has as many rows"
        assert rows[0] == 1 if name == "one row" else sum(rows) >= 2, rows
        results[name] = trained_for_two_steps(wanted, pairs)
    losses, gradients, weights = results.pop("one row")
    for name, (other_losses, other_gradients, other_weights) in results.items():
        for step in range(2):
            torch.testing.assert_close(other_losses[step], losses[step], rtol=1e-10, atol=0)
            assert_close(other_gradients[step], gradients[step], 1e-9)
        changes = {key: float((weights[key] - other_weights[key]).abs().max()) for key in weights}
        # Adam divides by the size of a gradient: where that is rounding alone (a key's bias), so is the update.
        assert max(value for key, value in changes.items() if not key.endswith("k_proj.bias")) < 1e-8, name


def test_a_step_without_pictures_moves_a_projector_alike_whether_it_was_touched_or_not(
    tmp_path: Path, pictures: Path, texts: Path
) -> None:
    """With ranks, every row runs the vision path; alone, one without pictures does not. AdamW must not tell."""
    weights = []
    for touch in (False, True):
        wanted, ((assembly, found),) = steps_of(tmp_path / "run", pictures, ALL, ranks=1, row_tokens=4000)
        _, ((_, without),) = steps_of(tmp_path / "run", texts, ALL, ranks=1, row_tokens=4000)
        optimizer = build_optimizer(assembly, wanted.stages[0])
        for number, step in enumerate((found.training[0], without.training[0])):
            set_rates(optimizer, wanted.stages[0], number, 10)
            step = replace(step, rows=tuple(replace(row, touch_vision=touch) for row in step.rows))
            _forward_backward(wanted, assembly.vlm, step, step.supervised, Accelerator(cpu=True), 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weights.append({name: p.detach().clone() for name, p in assembly.vlm.named_parameters()})
    for name, expected in weights[0].items():
        assert torch.equal(weights[1][name], expected), name


def test_the_loss_is_the_sum_of_token_losses_over_the_supervised_tokens(tmp_path: Path, data: Path) -> None:
    wanted, pairs = steps_of(tmp_path / "run", data, ALL, ranks=1, row_tokens=200)
    assembly, found = pairs[0]
    step = found.training[0]
    with torch.no_grad():
        tokens = torch.cat([assembly.vlm(row) for row in step.rows])
    sums = _forward_backward(wanted, assembly.vlm, step, step.supervised, Accelerator(cpu=True), 1)
    record = record_of(wanted.stages[0], step, sums, found)
    assert record["supervised"] == len(tokens) > 0
    assert record["loss"] == pytest.approx(tokens.mean().item(), rel=1e-12)
    assert record["unlabelled"] > 0
    assert record["samples"] == 10


def test_what_several_sources_lose_adds_up(tmp_path: Path, data: Path, texts: Path) -> None:
    wanted = config(tmp_path / "run", stage("s", [data, texts], {"language": {"lr": 1e-3}}, steps=3))
    train(wanted)
    for line in metrics(tmp_path / "run"):
        assert set(line["losses"]) <= {"mixed", "written"}
        low, high = min(line["losses"].values()), max(line["losses"].values())
        assert low <= line["loss"] <= high


# What trains, trains; what is frozen keeps its bits ---------------------------------------------


def final_of(run: Path) -> dict[str, torch.Tensor]:
    found = load_file(run / "final/model.safetensors")
    return {name.replace(".base_layer.", "."): tensor for name, tensor in found.items()}


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "align": ({"projector": {"lr": 2e-5}}, ("projector.",)),
    "language": ({"projector": {"lr": 2e-5}, "language": {"lr": 2e-5}}, ("projector.", "language.")),
    "lora": (LORA | {"projector": {"lr": 2e-5}}, ("projector.", "lora_")),
    "lora alone": (LORA, ("lora_",)),
    "vision": ({"vision": {"lr": 2e-5}}, ("vision.",)),
    "all": (ALL, ("vision.", "projector.", "language.")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_declared_parts_change_and_all_others_keep_their_bits(
    case: str, checkpointing: bool, tmp_path: Path, data: Path
) -> None:
    part, changing = CASES[case]
    only = stage("s", data, part, steps=3, gradient_checkpointing=checkpointing)
    wanted = config(tmp_path / "run", only)
    before = {name: p.detach() for name, p in assemble(wanted.model, seed=wanted.seed).vlm.named_parameters()}
    final = final_of(train(wanted).parent)
    assert before.keys() <= final.keys(), "random parts have no other source than the checkpoint"
    adapter = {name for name in final if "lora_" in name}
    assert bool(adapter) == ("lora" in part.get("language", {}))
    for name, tensor in final.items():
        if name in adapter:
            assert name.startswith("language.")
            assert tensor.any(), name
            continue
        trains = name.startswith(changing) and "post_layernorm" not in name
        assert torch.equal(before[name], tensor) != trains, f"{name} {'kept' if trains else 'changed'}"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_small_rates_move_weights_beside_a_frozen_bf16_part(precision: torch.dtype, tmp_path: Path) -> None:
    """The arrangement of a GPU run, on the CPU: trained fp32, frozen bf16, compute under bf16 autocast.

    A step of Adam at 2e-5 on a weight of 1 is far below what bf16 can add: the wrong dtype loses it.
    """
    model_folder = tmp_path / "language"
    source = assemble(
        config(tmp_path / "x", stage("s", tmp_path, {"language": {"lr": 1.0}}), vision=None).model, seed=0
    )
    source.vlm.language.save_pretrained(model_folder)
    source.tokenizer.save_pretrained(model_folder)
    data = shards(tmp_path / "data", mixed(10))
    tower = build.build_vision(config(tmp_path / "x", stage("s", tmp_path, ALL)).model.vision).encoder
    tower.save_pretrained(tmp_path / "tower")
    vision = {"library": "transformers", "name": str(tmp_path / "tower"), "layer": -1}
    for part, frozen_prefix in (
        ({"projector": {"lr": 2e-5}, "language": {"lr": 2e-5}}, "vision."),
        (LORA, "language.model.embed"),
    ):
        wanted = config(tmp_path / "run", stage("s", data, part), language=str(model_folder), vision=vision)
        assembly = assemble(wanted.model, seed=0)
        if part is LORA:
            build.add_lora(assembly, wanted.stages[0].train.language.lora, seed=0)
        build.set_trained(assembly, wanted.stages[0].train, trained_dtype=precision, frozen_dtype=torch.bfloat16)
        for name, parameter in assembly.vlm.named_parameters():
            if parameter.requires_grad:
                assert parameter.dtype == precision, name
            elif name.startswith(frozen_prefix):
                assert parameter.dtype == torch.bfloat16, name
        found = opened(wanted, assembly)
        optimizer = build_optimizer(assembly, wanted.stages[0])
        before = {name: p.detach().clone() for name, p in assembly.vlm.named_parameters() if p.requires_grad}
        for group in optimizer.param_groups:
            group["lr"] = 2e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = [assembly.vlm(row) for row in found.training[0].rows]
        assert all(loss.dtype == torch.float32 for loss in losses)
        torch.cat(losses).mean().backward()
        optimizer.step()
        after = dict(assembly.vlm.named_parameters())
        moved = {name: float((after[name] != kept).float().mean()) for name, kept in before.items()}
        if part is LORA:  # B starts at zero, where any precision moves
            assert all(share > 0.5 for name, share in moved.items() if "lora_B" in name), moved
        else:  # norms start at one, where the next bf16 number is 390 steps away
            norms = [share for name, share in moved.items() if "norm" in name]
            assert norms
            assert min(norms) > 0.9 if precision == torch.float32 else max(norms) == 0.0


def test_lora_adapts_the_language_model_only(tmp_path: Path) -> None:
    wanted = config(tmp_path / "run", stage("s", tmp_path, ALL | LORA))
    assembly = assembled(wanted)
    adapted = {name for name, _ in assembly.vlm.named_parameters() if "lora_" in name}
    assert len(adapted) == 2 * 7 * 2  # A and B of 7 linears in 2 layers
    assert all(name.startswith("language.model.layers.") for name in adapted)
    assert not any("lm_head" in name for name in adapted)


def test_a_declared_parameter_without_gradient_stops_the_run_and_is_named(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = assemble

    def with_a_spare(*arguments: Any, **named: Any) -> Assembly:
        assembly = real(*arguments, **named)
        assembly.vlm.projector.spare = torch.nn.Parameter(torch.ones(3))
        assembly.fresh.add("projector.spare")
        return assembly

    monkeypatch.setattr("mmit.training.state.assemble", with_a_spare)
    wanted = config(tmp_path / "run", stage("s", data, {"projector": {"lr": 1e-3}}))
    with pytest.raises(ConfigError, match=r"no gradient in two steps \(projector\.spare\)"):
        train(wanted)
    assert len(metrics(tmp_path / "run")) <= 4


def test_steps_that_can_give_a_projector_no_gradient_do_not_count_against_it(tmp_path: Path) -> None:
    """Pictures in samples that teach nothing, beside texts that do."""
    folder = shards(tmp_path / "data", [maker(number) for number in range(8) for maker in (silent, written)])
    wanted = config(tmp_path / "run", stage("s", folder, {"projector": {"lr": 1e-3}}, batch_size=4))
    train(wanted)
    assert len(once_each(metrics(tmp_path / "run"))) == 4


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_samples(tmp_path: Path, data: Path) -> None:
    wanted, pairs = steps_of(tmp_path / "run", data, ALL, ranks=1, row_tokens=4000)
    assembly, found = pairs[0]
    step = found.training[0]
    optimizer = build_optimizer(assembly, wanted.stages[0])
    with torch.no_grad():
        assembly.vlm.language.lm_head.weight[5, 5] = math.nan
    sums = _forward_backward(wanted, assembly.vlm, step, step.supervised, Accelerator(cpu=True), 1)
    with pytest.raises(FloatingPointError, match=step.rows[0].samples[0]):
        finite_norm(optimizer, sums, step, wanted.stages[0])


def test_what_max_tokens_costs_is_told_before_the_first_step_also_of_the_held_out(tmp_path: Path) -> None:
    def talk(number: int) -> Sample:
        turns = [message(role, "x" * 40) for _ in range(number % 3 + 1) for role in ("user", "assistant")]
        return Sample(f"t{number:03d}", "talk", tuple(turns))

    folder = shards(tmp_path / "talk", [talk(number) for number in range(30)])
    short = shards(tmp_path / "short", [written(number) for number in range(9)])
    held_out = {"holdout": {"fraction": 0.4, "by": "sample"}, "data": [{"shards": str(folder), "name": "again"}]}

    def told(max_tokens: int) -> list[str]:
        only = stage("s", [folder, short], {"language": {"lr": 1e-3}}, max_tokens=max_tokens)
        wanted = config(tmp_path / "run", only, vision=None, eval=held_out)
        return too_long(opened(wanted, assembled(wanted)))

    lines = told(130)  # one turn: 40 + 40 bytes, and the format around them
    assert [line.partition(":")[0] for line in lines] == ["talk", "talk", "again"]
    counts = [[int(word) for word in re.findall(r"\d+", line)] for line in lines]
    assert [line.endswith("held-out samples") for line in lines] == [False, True, True]
    (cut, dropped, size), (cut_out, dropped_out, size_out), again = counts
    assert (cut + cut_out, dropped + dropped_out, size + size_out) == (20, 0, 30)
    assert again == [20, 0, 30]
    assert told(4000) == []
    with pytest.raises(ConfigError, match=r"max_tokens: 60 leaves nothing of source talk"):
        told(60)


def test_a_held_out_sample_that_cannot_be_rendered_is_named_before_the_first_step(tmp_path: Path, texts: Path) -> None:
    blind = shards(tmp_path / "blind", [pictured(3)])
    only = stage("s", texts, {"language": {"lr": 1e-3}})
    wanted = config(tmp_path / "run", only, vision=None, eval={"data": [{"shards": str(blind)}]})
    with pytest.raises(SampleError, match=r"blind/shard-000000\.tar:.*model\.vision is null"):
        too_long(opened(wanted, assembled(wanted)))
    only |= {"on_bad_sample": "skip"}
    wanted = config(tmp_path / "run", only, vision=None, eval={"data": [{"shards": str(blind)}]})
    assert too_long(opened(wanted, assembled(wanted))) == ["blind: 1 cannot be rendered of all 1 held-out samples"]


# Stages and runs ----------------------------------------------------------------------------


def test_a_stage_does_not_keep_the_model_of_the_one_before(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[torch.nn.Module]] = []
    real = assemble

    def watched(*arguments: Any, **named: Any) -> Assembly:
        gc.collect()
        assert all(model() is None for model in models), "two models at once"
        assembly = real(*arguments, **named)
        models.append(weakref.ref(assembly.vlm))
        return assembly

    monkeypatch.setattr("mmit.training.state.assemble", watched)
    stages = [stage(name, texts, {"language": {"lr": 1e-3}}, steps=1) for name in ("one", "two", "three")]
    train(config(tmp_path / "run", *stages, vision=None))
    assert len(models) == 3


def test_one_process_can_train_in_one_precision_and_then_in_another(tmp_path: Path, texts: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16", "fp64"):
        only = stage("s", texts, {"language": {"lr": 1e-3}}, steps=1)
        train(config(tmp_path / precision, only, vision=None, precision=precision))
        losses[precision] = metrics(tmp_path / precision)[0]["loss"]
    assert losses["fp32"] == pytest.approx(losses["fp64"], rel=1e-6)
    assert losses["fp32"] != losses["bf16"] == pytest.approx(losses["fp64"], rel=1e-2)


def test_training_learns(tmp_path: Path, data: Path) -> None:
    wanted = config(tmp_path / "run", stage("s", data, ALL, epochs=12), language=LANGUAGE, vision=CLIP)
    train(wanted)
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]


def test_the_table_lists_what_cannot_train(tmp_path: Path, data: Path) -> None:
    wanted = config(tmp_path / "run", stage("s", data, {"vision": {"lr": 1e-3}, "language": {"lr": 1e-3}}, steps=1))
    assembly = assemble(wanted.model, seed=0)
    assert assembly.vlm.vision is not None
    console = Console(width=400, file=io.StringIO(), record=True)
    console.print(table_of_parts(wanted, wanted.stages[0], assembly, opened(wanted, assembly)))
    told = console.export_text()
    unused = assembly.vlm.vision.unused_parameters()
    assert unused
    assert all(name in told for name in unused)


def test_the_table_tells_that_an_epoch_is_smaller_than_a_step(tmp_path: Path, texts: Path) -> None:
    """`2 steps of 128 samples` was said of a set of nine."""
    only = stage("s", shards(tmp_path / "few", [written(number) for number in range(9)]), {"language": {"lr": 1e-3}})
    wanted = config(tmp_path / "run", only | {"batch_size": 128, "epochs": 2}, vision=None)
    assembly = assemble(wanted.model, seed=0)
    title = table_of_parts(wanted, wanted.stages[0], assembly, opened(wanted, assembly)).title
    assert title == "stage s: 2 steps of 9 samples, all that an epoch has (batch_size is 128)"


def test_a_share_that_holds_out_nothing_is_named(tmp_path: Path) -> None:
    few = shards(tmp_path / "few", [written(number) for number in range(3)])
    only, held_out = stage("s", few, {"language": {"lr": 1e-3}}), {"holdout": {"fraction": 0.01, "by": "sample"}}
    wanted = config(tmp_path / "run", only, vision=None, eval=held_out)
    with pytest.raises(
        ConfigError, match=r"a share of 0\.01 by sample holds out none of the 3 samples of stage s; rai"
    ):
        opened(wanted, assembled(wanted))


def test_a_step_of_one_row_asks_the_other_ranks_twice(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether one is to stop, with the count of tokens and again before what is due; each asking waits for the device.
    (And what has a gradient, in the first step alone.)"""
    asked = parallel.agreed

    def counted(*arguments: Any) -> list[int]:
        with (tmp_path / "asked").open("a") as file:
            file.write("x")
        return asked(*arguments)

    monkeypatch.setattr(parallel, "agreed", counted)
    for steps in (2, 5):
        run(config(tmp_path / f"run{steps}", stage("s", texts, {"language": {"lr": 1e-3}}, steps=steps), vision=None))
        (tmp_path / "asked").rename(tmp_path / str(steps))
    assert (tmp_path / "5").stat().st_size - (tmp_path / "2").stat().st_size == 2 * 3
