"""Whether the disk has room for the checkpoints of a run: told before it trains, and not at the border of a stage."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mmit.config import Config, ConfigError, Lora, Stage
from mmit.model.build import Assembly, plain_name, vocabulary_parameters
from mmit.training import checkpoint
from mmit.training.run import RunDirectory

SPARE = 2**20
"""Bytes that a run needs beside its tensors, at least: metrics, tokenizer."""


def check_space(config: Config, number: int, run: RunDirectory, assembly: Assembly, dtype: torch.dtype) -> None:
    """ConfigError unless the disk has room for two checkpoints (one, if one is there already) of stage `number` and of
    each later one, beside one of each stage before it. `dtype` is that of trained parameters."""
    free, before = shutil.disk_usage(run.folder).free, 0
    for stage, count in zip(config.stages[number:], counts(config, number, assembly), strict=True):
        size = count * dtype.itemsize
        own = size * (1 if checkpoint.has_begun(run.checkpoints, stage.name) else 2)
        if free < before + own + SPARE:
            earlier = f", beside {before / 1e6:,.1f} MB of the stages before it" if before else ""
            raise ConfigError(
                f"output: the disk of {run.folder} has {free / 1e6:,.1f} MB free, and two checkpoints of stage "
                f"{stage.name} need {(own + SPARE) / 1e6:,.1f} MB ({size / 1e6:,.1f} each){earlier}; free some, or "
                f"name an output on another disk"
            )
        before += own - size


def counts(config: Config, number: int, assembly: Assembly) -> Iterator[int]:
    """The numbers in a checkpoint of stage `number`, and of each later one: what the run has changed by then, and two
    moments of what trains."""
    vlm, language = assembly.vlm, assembly.vlm.language
    sizes = {plain_name(name): p.numel() for name, p in vlm.named_parameters() if ".lora_" not in name}
    kept = {plain_name(name) for name in assembly.fresh | assembly.changed if ".lora_" not in name}
    vocabulary = {plain_name(f"language.{name}") for name in vocabulary_parameters(language)}
    waiting: Lora | None = None
    for stage in config.stages[number:]:
        lora = stage.train.language.lora if stage.train.language is not None else None
        if waiting is not None and waiting != lora:  # it is merged
            kept |= {f"{name}.weight" for name, _ in _adapted(language, waiting)}
        waiting = lora
        trained = set(_trained(stage, assembly, sizes))
        if lora is not None and assembly.added_tokens:
            trained |= vocabulary
        kept |= trained
        adapter = sum(lora.rank * sum(layer.weight.shape) for _, layer in _adapted(language, lora)) if lora else 0
        yield sum(sizes[name] for name in kept) + 2 * sum(sizes[name] for name in trained) + 3 * adapter


def _trained(stage: Stage, assembly: Assembly, names: Iterable[str]) -> Iterator[str]:
    """The parameters that a stage trains, adapters and the rows of added tokens aside."""
    train, vision = stage.train, assembly.vlm.vision
    parts = [part for part in ("vision", "projector") if dict(train)[part] is not None]
    if train.language is not None and train.language.lora is None:
        parts.append("language")
    unused = {f"vision.{name}" for name in vision.unused_parameters()} if vision is not None and train.vision else set()
    return (name for name in names if name.partition(".")[0] in parts and name not in unused)


def _adapted(language: PreTrainedModel, lora: Lora) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """The layers that an adapter stands beside, those of fused experts left out."""
    head = language.get_output_embeddings()
    for found, layer in language.named_modules():
        name = plain_name(f"language.{found}.").removesuffix(".")
        if not isinstance(layer, nn.Linear | Conv1D) or ".lora_" in name:
            continue
        if layer is not head if lora.targets == "all-linear" else any(name.endswith(f".{t}") for t in lora.targets):
            yield name, layer
