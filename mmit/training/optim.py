"""Parameter groups and learning rates. A rate is a pure function of the step, so a scheduler has no state to lose."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch

from mmit.config import Stage, Trained
from mmit.model.build import Assembly, beside_lora


def build_optimizer(assembly: Assembly, stage: Stage) -> torch.optim.AdamW:
    """AdamW over what the stage trains: a group a part and kind, each with its `peak` rate. Only matrices decay."""
    groups: list[dict[str, Any]] = []
    rates: dict[str, Trained | None] = {
        "vision": stage.train.vision,
        "projector": stage.train.projector,
        "language": stage.train.language,
    }
    # Only a few rows of these train; a decay would move the others.
    undecayed = {id(parameter) for parameter in beside_lora(assembly, stage.train)}
    for name, part in assembly.parts().items():
        settings = rates[name]
        if settings is None:
            continue
        for decays in (True, False):
            trained = [p for p in part.parameters() if p.requires_grad]
            parameters = [p for p in trained if (p.ndim >= 2 and id(p) not in undecayed) == decays]
            if parameters:
                decay = stage.weight_decay if decays else 0.0
                groups.append(
                    {"params": parameters, "name": name, "peak": settings.lr, "lr": 0.0, "weight_decay": decay}
                )
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=stage.betas, fused=_all_on_cuda(groups))
    _begin(optimizer)
    return optimizer


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter its moments at step 0.

    torch makes them at a parameter's first gradient, and cannot load the state of an optimizer that was saved before
    every parameter had one (a projector that has met text alone). The rates are still 0: no parameter moves.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for moments in optimizer.state.values():
        moments["step"].zero_()


def set_rates(optimizer: torch.optim.Optimizer, stage: Stage, step: int, total: int) -> float:
    """Sets the rates of step `step` (from 0) of `total`; returns the share of the peak."""
    share = rate(step, total, stage.schedule, warmup=stage.warmup, final=stage.final_lr)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return share


def rate(step: int, total: int, schedule: str, *, warmup: float, final: float) -> float:
    """Share of the peak rate at `step` of `total`: linear warm-up over ceil(warmup * total) steps, then the schedule.

    The first step already has a rate above zero (transformers' schedulers waste it), the last one ends above `final`.
    """
    warm = math.ceil(Fraction(str(warmup)) * total)  # 0.07 * 100 is more than 7 in floating point
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(total - warm, 1)
    match schedule:
        case "cosine":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return final + (1 - final) * (1 - progress)
        case "constant":
            return 1.0
        case _:
            raise AssertionError(schedule)


def _all_on_cuda(groups: list[dict[str, Any]]) -> bool | None:
    return True if all(p.is_cuda for group in groups for p in group["params"]) else None
