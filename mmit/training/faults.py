"""Steps that fail: what is told of them, what is kept, and how one is repeated."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from mmit.config import Config, Stage, dump_config
from mmit.data.loader import Step
from mmit.training import parallel
from mmit.training.data import row_tokens
from mmit.training.stage import RunningStage

FAULT = "fault.json"
CONFIG = "config.yaml"
LOOKED_AT = 200
"""Steps among which `--check-memory` seeks the longest."""


def texts(config: Config, number: int, step: Step, accelerator: Accelerator, reason: str) -> dict[str, str]:
    """The files that, beside a checkpoint of the state before it, repeat a step. Every rank must call it."""
    samples = parallel.gathered(accelerator, [list(row.samples) for row in step.rows])
    record = {
        "stage": number,
        "step": step.number,
        "seed": config.seed,
        "ranks": accelerator.num_processes,
        "samples": samples,
        "reason": reason,
    }
    return {FAULT: json.dumps(record, indent=1), CONFIG: dump_config(config)}


def out_of_memory(config: Config, stage: Stage, step: Step) -> str:
    """What to tell of a step that memory cannot hold: its samples, and three settings that need less."""
    longest = max(step.rows, key=lambda row: row.ids.shape[1])
    tokens = row_tokens(stage, on_cuda=torch.cuda.is_available())
    halved = max(tokens // 2, stage.max_tokens)
    name = f"stages.{stage.name}"
    cheaper = []
    if halved < tokens:
        cheaper.append(f"{name}.row_tokens={halved} (now {tokens}; the same steps in more forward passes)")
    elif stage.max_tokens > 64:
        cheaper.append(f"{name}.max_tokens={stage.max_tokens // 2} (now {stage.max_tokens}; longer samples are cut)")
    if not stage.gradient_checkpointing:
        cheaper.append(f"{name}.gradient_checkpointing=true (the same numbers, about a third slower)")
    if len(longest.pixels) > 1:
        cheaper.append(f"{name}.row_images={len(longest.pixels) // 2} (now {len(longest.pixels)} in that row)")
    cheaper += _lighter(config, stage)
    cheaper.append(f"{name}.batch_size does not matter here: a row is what must fit")
    samples = ", ".join(longest.samples)
    return (
        f"stage {stage.name}, step {step.number + 1}: out of memory in a row of {longest.ids.shape[1]} tokens and "
        f"{len(longest.pixels)} pictures (longest row of the step: {samples}). Cheaper settings:\n  "
        + "\n  ".join(cheaper[:3])
        + "\nThe same command goes on from the last checkpoint"
    )


def too_large(config: Config, stage: Stage) -> str:
    """What to tell where memory does not hold a stage at all, or not what it does between its rows."""
    return (
        f"stage {stage.name}: out of memory beside the rows: weights and what the optimizer keeps of them do not fit "
        f"the device. Cheaper settings:\n  "
        + "\n  ".join([*_lighter(config, stage), "a smaller model.language"])
        + "\nThe same command goes on from the last checkpoint"
    )


def _lighter(config: Config, stage: Stage) -> list[str]:
    """Settings with which weights, gradients and optimizer need less."""
    lighter = []
    if config.parallel == "ddp":
        lighter.append("parallel=fsdp (on several GPUs: weights, gradients and optimizer are shared out)")
    elif not config.offload:
        lighter.append("offload=true (optimizer and weights in the memory of the CPU)")
    if stage.train.language is not None and stage.train.language.lora is None:
        adapter = "lora={rank: 64, alpha: 128} (an adapter instead of all weights)"
        lighter.append(f"stages.{stage.name}.train.language.{adapter}")
    return lighter


def check_memory(at: RunningStage, compute: Callable[[Step], Tensor | None]) -> None:
    """Computes the longest of the first steps, without an update, and tells what memory it took."""
    looked_at = min(at.data.total, LOOKED_AT)
    own = []
    for number in range(looked_at):
        if at.stopping():
            return
        own.append(_longest(at.data.training[number]))
    costs = parallel.agreed(at.accelerator, *own)
    number = max(range(looked_at), key=lambda n: costs[n])
    step = at.data.training[number]
    if compute(step) is None:
        return
    if at.accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:  # in bytes on macOS, in KiB elsewhere
        unit = 1 if sys.platform == "darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    at.log.say(
        f"longest of the first {looked_at} steps: step {number + 1}, a row of {_longest(step)} tokens; "
        f"peak memory {peak:.2f} GiB"
    )


def _longest(step: Step) -> int:
    return max(row.ids.shape[1] for row in step.rows)
