"""How a stage starts, what a checkpoint of it holds, and how it goes on from one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from mmit.config import Config, ConfigError, Lora
from mmit.model.build import Assembly, add_lora, assemble, merge_lora, restore
from mmit.training import checkpoint
from mmit.training.checkpoint import Checkpoint
from mmit.training.data import StageData, rendering_of
from mmit.training.run import RunDirectory

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def start(config: Config, number: int, run: RunDirectory, resumed: Checkpoint | None, cache: Path) -> Assembly:
    """The model at the start of stage `number`, or as `resumed` left it: pretrained parts and the run's own tensors.

    Without `resumed` the stage starts from the finished checkpoint of the one before; its adapter is merged, unless
    this stage trains the same one further.
    """
    assembly = assemble(config.model, seed=config.seed, cache=cache)
    origin = resumed
    if origin is None and number > 0:
        before = config.stages[number - 1].name
        origin = run.newest(before)
        if origin is None or not origin.finished:
            raise ConfigError(
                f"{run.folder}: stage {before} has no whole checkpoint; remove the folder and start again"
            )
    if origin is not None:
        _check_sources(origin, assembly)
        lora = origin.state["model"]["lora"]
        if lora is not None:
            add_lora(assembly, Lora(**lora), seed=config.seed)
        restore(assembly, origin.tensors(), str(origin.folder))
    language = config.stages[number].train.language
    wanted = language.lora if language is not None else None
    if assembly.lora is not None and assembly.lora != wanted:
        merge_lora(assembly)
    if wanted is not None and assembly.lora is None:
        add_lora(assembly, wanted, seed=config.seed + number)
    return assembly


def resume(assembly: Assembly, optimizer: torch.optim.Optimizer, found: Checkpoint, data: StageData) -> int:
    """Puts the optimizer back; returns the steps done. ConfigError names a source whose samples have changed."""
    before = found.state["data"]
    changed = [title for title, fingerprint in data.fingerprints.items() if before.get(title) != fingerprint]
    if changed or found.state["total"] != data.total:
        raise ConfigError(
            f"{found.folder}: the data of the stage has changed since (sources {changed or 'same'}; now {data.total} "
            f"steps, then {found.state['total']}); put it back, or name another output"
        )
    flat = get_optimizer_state_dict(assembly.vlm, optimizer, options=FLAT)
    checkpoint.read_shards(found, moments(flat))
    set_optimizer_state_dict(assembly.vlm, optimizer, flat, options=FLAT)
    return found.step


def save(
    config: Config,
    number: int,
    run: RunDirectory,
    assembly: Assembly,
    optimizer: torch.optim.Optimizer,
    data: StageData,
    done: int,
    accelerator: Accelerator,
) -> None:
    """Writes the checkpoint of step `done` and removes the stage's older ones. Every rank must call it."""
    stage = config.stages[number]
    flat = get_optimizer_state_dict(assembly.vlm, optimizer, options=FLAT)
    finished = done == data.total
    checkpoint.save(
        run.checkpoints / f"{stage.name}-step-{done}",
        accelerator,
        tensors=kept_tensors(assembly),
        optimizer=moments(flat),
        state={
            "stage": stage.name,
            "step": done,
            "total": data.total,
            "finished": finished,
            "data": data.fingerprints,
            "model": describe(config, number, assembly),
        },
        add_files=lambda folder, tensors: add_model_files(folder, assembly, tensors),
    )
    if accelerator.is_main_process:
        checkpoint.prune(run.checkpoints, stage.name, step=done, keep=1 if finished else config.save.keep)


def finish(config: Config, run: RunDirectory) -> None:
    """Makes `final/` from the last stage's finished checkpoint: all that inference and export load."""
    last = run.newest(config.stages[-1].name)
    assert last is not None
    assert last.finished
    temporary = run.final.with_name("final.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(
        last.folder,
        temporary,
        ignore=shutil.ignore_patterns(checkpoint.OPTIMIZER, checkpoint.MANIFEST, checkpoint.STATE),
    )
    record = {"format": checkpoint.FORMAT, "step": last.step, **last.state["model"]}
    (temporary / "model.json").write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    shutil.rmtree(run.final, ignore_errors=True)
    temporary.rename(run.final)


def moments(flat: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of an optimizer's flat state; the rest are settings, which the config says again."""
    return {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}


def kept_tensors(assembly: Assembly) -> dict[str, torch.Tensor]:
    kept = assembly.kept()
    return {name: parameter for name, parameter in assembly.vlm.named_parameters() if name in kept}


def describe(config: Config, number: int, assembly: Assembly) -> dict[str, Any]:
    """What a loader must know beside the tensors: parts, sources, adapter, chat format and picture fit."""
    stage = config.stages[number]
    rendering = rendering_of(config, stage, assembly)
    return {
        "model": config.model.model_dump(mode="json"),
        "seed": config.seed,
        "stage": stage.name,
        "sources": assembly.sources,
        "lora": assembly.lora.model_dump() if assembly.lora is not None else None,
        "chat": asdict(rendering.chat.format),
        "placeholder": assembly.placeholder,
        "pictures": rendering.fit.policy if rendering.fit is not None else None,
        "image_tokens": rendering.image_tokens,
        "max_tokens": stage.max_tokens,
    }


def add_model_files(folder: Path, assembly: Assembly, tensors: Mapping[str, torch.Tensor]) -> None:
    """The tokenizer and the language model's configuration, so that what is loaded later is what was trained."""
    assembly.tokenizer.save_pretrained(folder / "tokenizer")
    assembly.vlm.language.config.save_pretrained(folder / "language")
    if assembly.adapter is not None:
        # Its own parameters may lie on several ranks. Embeddings are in model.safetensors.
        named = {name.replace("language.", "base_model.model.", 1): tensor for name, tensor in tensors.items()}
        assembly.adapter.save_pretrained(folder / "adapter", state_dict=named, save_embedding_layers=False)


def _check_sources(origin: Checkpoint, assembly: Assembly) -> None:
    before = origin.state["model"]["sources"]
    for part, record in assembly.sources.items():
        if part in before and before[part] != record:
            raise ConfigError(
                f"model.{part}: the pretrained files are not those that the run started from "
                f"(then {before[part]}, now {record}); put them back"
            )
