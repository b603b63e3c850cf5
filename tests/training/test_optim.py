"""Laws of rates and groups, against formulas written out by hand and transformers' own schedules."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from mmit.config import Stage, load_config
from mmit.model.build import assemble, set_trained
from mmit.training.optim import build_optimizer, rate, set_rates
from tests.training.tiny import config, stage

ROOT = Path(__file__).resolve().parents[2]


def made(train: dict[str, Any], **changes: Any) -> tuple[Any, Stage]:
    wanted = config(Path("unused"), stage("s", Path("unused"), train, **changes))
    assembly = assemble(wanted.model, seed=0)
    set_trained(assembly, wanted.stages[0].train, trained_dtype=torch.float32, frozen_dtype=torch.float32)
    return assembly, wanted.stages[0]


def test_cosine_values_worked_out_by_hand() -> None:
    """10 steps, 2 of warm-up: 1/2, 2/2, then (1 + cos(pi k / 8)) / 2 for k = 0 to 7."""
    expected = [0.5, 1.0, 1.0, 0.9619397662556434, 0.8535533905932737, 0.6913417161825449, 0.5, 0.3086582838174551]
    expected += [0.14644660940672627, 0.03806023374435663]
    found = [rate(step, 10, "cosine", warmup=0.2, final=0.0) for step in range(10)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_linear_values_worked_out_by_hand() -> None:
    assert [rate(step, 5, "linear", warmup=0.0, final=0.5) for step in range(5)] == pytest.approx(
        [1, 0.9, 0.8, 0.7, 0.6]
    )


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup"])
def test_schedules_are_those_of_transformers_after_the_warm_up(kind: Any) -> None:
    """During it ours is one step ahead: transformers spends its first step at a rate of 0."""
    total, warm = 40, 4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warm, num_training_steps=total)
    for step in range(total):
        theirs = optimizer.param_groups[0]["lr"]
        ours = rate(step, total, kind.removesuffix("_with_warmup"), warmup=0.1, final=0.0)
        assert ours == pytest.approx(theirs if step >= warm else theirs + 1 / warm, rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_the_steps_of_warm_up_are_counted_without_rounding() -> None:
    """0.07 of 100 steps are 7; in floating point a little more, so that the peak came a step late."""
    assert [rate(step, 100, "cosine", warmup=0.07, final=0.0) for step in (5, 6)] == [6 / 7, 1]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
def test_every_step_has_a_rate_above_zero_and_at_most_the_peak(schedule: str, total: int, warmup: float) -> None:
    shares = [rate(step, total, schedule, warmup=warmup, final=0.0) for step in range(total)]
    assert all(0 < share <= 1 for share in shares)
    assert max(shares) == 1
    warm = math.ceil(Fraction(str(warmup)) * total)
    assert shares[:warm] == sorted(shares[:warm])
    assert shares[warm:] == sorted(shares[warm:], reverse=True)


def test_a_rate_depends_on_nothing_but_the_step() -> None:
    assembly, wanted = made({"projector": {"lr": 1e-3}, "language": {"lr": 1e-5}})
    optimizer = build_optimizer(assembly, wanted)
    seen = {}
    for step in (7, 0, 3, 7, 9, 3):
        set_rates(optimizer, wanted, step, 10)
        rates = tuple(group["lr"] for group in optimizer.param_groups)
        assert seen.setdefault(step, rates) == rates


def test_each_part_has_its_own_rate_and_only_matrices_decay() -> None:
    train = {"vision": {"lr": 2e-6}, "projector": {"lr": 1e-3}, "language": {"lr": 2e-5}}
    assembly, wanted = made(train, weight_decay=0.1)
    optimizer = build_optimizer(assembly, wanted)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = {name: p for name, p in assembly.vlm.named_parameters() if p.requires_grad}
    assert sorted(in_groups) == sorted(id(p) for p in trained.values())
    for name, parameter in trained.items():
        group = group_of[id(parameter)]
        assert group["peak"] == train[name.split(".")[0]]["lr"], name
        undecayed = name.endswith("bias") or "norm" in name or name.endswith("class_embedding")
        assert group["weight_decay"] == (0.0 if undecayed else 0.1), name


def test_a_fresh_optimizer_moves_nothing_and_steps_as_torchs_own() -> None:
    """Its moments are there from the start; parameters whose first gradient comes late step as if just begun."""
    assembly, wanted = made({"projector": {"lr": 1e-3}}, weight_decay=0.1)
    before = [p.clone() for p in assembly.vlm.parameters()]
    ours = build_optimizer(assembly, wanted)
    assert all(torch.equal(p, kept) for p, kept in zip(assembly.vlm.parameters(), before, strict=True))
    assert all(p.grad is None for p in assembly.vlm.parameters())
    parameters = [p for group in ours.param_groups for p in group["params"]]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    groups = [{"params": [t], "weight_decay": 0.1 if t.ndim > 1 else 0.0} for t in twins]
    theirs = torch.optim.AdamW(groups, lr=1e-3, betas=wanted.betas)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        for group in ours.param_groups:
            group["lr"] = 1e-3
        for number, (parameter, twin) in enumerate(zip(parameters, twins, strict=True)):
            late = step < 2 and number == 0
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad, twin.grad = (None, None) if late else (gradient, gradient.clone())
        ours.step()
        theirs.step()
    assert all(torch.equal(p, t) for p, t in zip(parameters, twins, strict=True))


@pytest.mark.parametrize(
    ("file", "name", "expected"),
    [
        ("llava15_7b.yaml", 0, {"projector": 1e-3, "batch_size": 256}),
        ("llava15_7b.yaml", 1, {"projector": 2e-5, "language": 2e-5, "batch_size": 128}),
        ("llava15_7b_lora.yaml", 1, {"projector": 2e-5, "language": 2e-4, "batch_size": 128}),
    ],
)
def test_llava_recipes_have_the_published_numbers(file: str, name: int, expected: dict[str, float]) -> None:
    """Liu et al. 2023, arXiv:2310.03744, table 9 of the appendix; LoRA: rank 128, alpha 256."""
    wanted = load_config(ROOT / "configs" / file).stages[name]
    rates = {part: value["lr"] for part, value in wanted.train.model_dump(exclude_none=True).items()}
    assert rates == {part: value for part, value in expected.items() if part != "batch_size"}
    assert wanted.batch_size == expected["batch_size"]
    assert (wanted.schedule, wanted.warmup, wanted.weight_decay) == ("cosine", 0.03, 0.0)
    # scripts/zero2.json and zero3.json have no gradient_clipping, without which DeepSpeed's default, none, holds
    # (axolotl-ai-cloud/axolotl#1381 measured it).
    assert wanted.clip is None
    assert wanted.epochs in (None, 1)
    assert wanted.steps is None
    assert wanted.data[0].options == ({"image_first": True} if wanted.name == "sft" else {})
    if wanted.train.language is not None and wanted.train.language.lora is not None:
        assert (wanted.train.language.lora.rank, wanted.train.language.lora.alpha) == (128, 256)
