"""A step that was not finite, repeated by one process from the state before it, with eyes open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmit.config import Config, ConfigError
from mmit.data.cache import cache_folder
from mmit.data.packing import Row
from mmit.model.attention import use_flash_attention, without_cudnn
from mmit.model.build import set_modes, set_trained
from mmit.training import checkpoint, parallel, state
from mmit.training.data import open_stage
from mmit.training.faults import FAULT
from mmit.training.loop import dropout_seed
from mmit.training.stage import dtypes


def replay(config: Config, folder: Path) -> Iterator[str]:
    """Lines that tell what is not finite, in the order of computation: weights, modules, losses, gradients."""
    file = folder / FAULT
    if not file.is_file():
        raise ConfigError(f"{folder}: no {FAULT}; name a fault-step-N/ that a run has left in its directory")
    fault = json.loads(file.read_text(encoding="utf-8"))
    found = checkpoint.load(folder)
    yield fault["reason"].partition("\n")[0]
    config = config.model_copy(update={"parallel": "ddp", "offload": False})
    number, stage, accelerator = fault["stage"], config.stages[fault["stage"]], parallel.start(config)
    cache = cache_folder(config.cache)
    assembly = state.start(config, number, found, cache)
    trained, frozen = dtypes(config, accelerator)
    set_trained(assembly, stage.train, trained_dtype=trained, frozen_dtype=frozen)
    set_modes(assembly, stage.train, gradient_checkpointing=False)
    model, bf16 = assembly.vlm.to(accelerator.device), accelerator.mixed_precision == "bf16"
    use_flash_attention(assembly.vlm.language, config.model.attention, accelerator.device, bf16=bf16)
    bad = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    for name in bad:
        yield f"not finite before the step: weight {name}"
    clean = not bad
    for rank in range(fault["ranks"]):
        on_cuda = accelerator.device.type == "cuda"
        data = open_stage(config, stage, assembly, cache=cache, on_cuda=on_cuda, rank=rank, ranks=fault["ranks"])
        for micro_step, row in enumerate(data.training[fault["step"]].rows):
            row = row.to(accelerator.device)
            torch.manual_seed(dropout_seed(config.seed, fault["step"], rank, micro_step))
            with accelerator.autocast(), without_cudnn(), _watched(model) as first:
                losses = model(row)
            for line in _faults_of(row, losses, first):
                clean = False
                yield f"rank {rank}, row {micro_step + 1}: {line}"
            if losses.requires_grad:
                losses.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            clean = False
            yield f"not finite after the step: gradient of {name}"
    if clean:
        yield "everything is finite here: the fault comes from the device, the precision or the ranks it ran on"


def _faults_of(row: Row, losses: Tensor, first: list[str]) -> Iterator[str]:
    if first:
        yield f"not finite first: output of {first[0]}"
    bad = row.predicts[~losses.isfinite()]
    of_sample = torch.bucketize(bad, row.boundaries[1:-1].to(bad.dtype), right=True)
    for place in of_sample.unique().tolist():
        yield f"not finite: {int((of_sample == place).sum())} losses of sample {row.samples[place]}"


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules, in the order of computation, whose outputs were not finite inside the block."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else output if isinstance(output, tuple) else []
        if any(isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors):
            found.append(name)

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
