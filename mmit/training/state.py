"""How a stage starts, what a checkpoint of it holds, and how it goes on from one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import AutoConfig

from mmit.config import Config, ConfigError, Lora
from mmit.data.cache import cache_folder
from mmit.model.build import Assembly, add_lora, assemble, check_sources, merge_lora, pinned, restore
from mmit.model.pretrained import steps_of
from mmit.model.sources import chat_format
from mmit.training import checkpoint, parallel
from mmit.training.checkpoint import Checkpoint
from mmit.training.data import StageData, fingerprints_of, rendering_of
from mmit.training.run import RunDirectory

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class Progress:
    """What a stage remembers beside its tensors; part of every checkpoint."""

    done: int = 0
    """Steps."""
    seen: int = 0
    """Samples, skipped ones included."""
    skipped: int = 0
    """Samples that could not be read."""
    skipped_in_a_row: int = 0
    nonfinite_in_a_row: int = 0
    evaluation_due: bool = False
    """The evaluation after the last step was abandoned."""
    best_step: int | None = None
    best_loss: float = float("inf")
    """Held-out loss per supervised token of all sources together."""


def where_to_go_on(config: Config, run: RunDirectory) -> tuple[int, Checkpoint | None]:
    """The first stage that is not finished, and its newest checkpoint if it has begun.

    Whatever became of its files, a stage that a later one went on from is finished.
    """
    for number in reversed(range(len(config.stages))):
        found = run.newest(config.stages[number].name)
        if found is not None:
            return (number + 1, None) if found.finished else (number, found)
    return 0, None


def check_moved_data(config: Config, run: RunDirectory) -> None:
    """ConfigError if begun stages name other samples elsewhere, those of a finished stage too."""
    for stage in config.stages:
        if any(key.startswith(f"stages.{stage.name}.") for key in run.moved):
            found = run.newest(stage.name)
            if found is not None:
                _check_data(found, fingerprints_of(config, stage, cache_folder(config.cache)))


def _check_data(found: Checkpoint, fingerprints: Mapping[str, str]) -> None:
    before = found.state["data"]
    changed = [title for title, fingerprint in fingerprints.items() if before.get(title) != fingerprint]
    if changed:
        raise ConfigError(
            f"{found.folder}: the data of the stage has changed since (sources {', '.join(changed)}); put it back, or "
            f"name another output"
        )


def finished_before(config: Config, number: int, run: RunDirectory) -> Checkpoint | None:
    """What stage `number` starts from: the finished checkpoint of the one before, None for the first."""
    if number == 0:
        return None
    before = config.stages[number - 1].name
    found = run.newest(before)
    if found is None or not found.finished:
        raise ConfigError(f"{run.folder}: stage {before} has no whole checkpoint; remove the folder and start again")
    return found


def start(config: Config, number: int, origin: Checkpoint | None, cache: Path) -> Assembly:
    """The model of stage `number` as `origin` left it: pretrained parts and the run's own tensors.

    `origin` is a checkpoint of the stage itself or `finished_before`, whose adapter is merged, unless this stage trains
    the same one further.
    """
    model = pinned(config.model, origin.state["model"]["sources"]) if origin is not None else config.model
    assembly = assemble(model, seed=config.seed, cache=cache)
    if origin is not None:
        check_sources(origin.state["model"]["sources"], assembly, str(origin.folder))
        _check_described(origin, assembly)
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


def _check_described(origin: Checkpoint, assembly: Assembly) -> None:
    """ConfigError for other ids or another computation beside the same weights, whose files sources do not hold."""
    # Not by way of transformers, which rebuilds some tokenizers from their settings.
    before = Tokenizer.from_file(str(origin.folder / "tokenizer/tokenizer.json"))
    if steps_of(before) != steps_of(assembly.tokenizer.backend_tokenizer):
        told = "tokenizer (tokenizer.json, tokenizer_config.json)"
    elif _computed(AutoConfig.from_pretrained(origin.folder / "language")) != _computed(assembly.vlm.language.config):
        told = "configuration of the language model (config.json)"
    else:
        return
    raise ConfigError(f"{origin.folder}: the {told} is another one now; put its files back, or name another output")


def _computed(config: Any) -> dict[str, Any]:
    """A configuration without what says nothing of results."""
    silent = ("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache")
    told = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in told.items() if key not in silent}


def resume(assembly: Assembly, optimizer: torch.optim.Optimizer, found: Checkpoint, data: StageData) -> Progress:
    """Puts the optimizer back; returns how far the stage was. ConfigError names a source whose samples have changed."""
    _check_data(found, data.fingerprints)
    if found.state["total"] != data.total:
        raise ConfigError(
            f"{found.folder}: the stage had {found.state['total']} steps, and now {data.total}; put its settings and "
            f"data back, or name another output"
        )
    chat = data.training.encoders[0].rendering.chat
    if chat.format != chat_format(found.state["model"]["chat"]):
        raise ConfigError(
            f"{found.folder}: the chat format is another one now, learned from another template of the tokenizer; put "
            f"the tokenizer's files back, or name another output"
        )
    flat = get_optimizer_state_dict(assembly.vlm, optimizer, options=FLAT)
    checkpoint.read_shards(found, moments(flat))
    set_optimizer_state_dict(assembly.vlm, optimizer, flat, options=FLAT)
    return Progress(**found.state["progress"])


def save(
    config: Config,
    number: int,
    run: RunDirectory,
    assembly: Assembly,
    optimizer: torch.optim.Optimizer,
    data: StageData,
    progress: Progress,
    accelerator: Accelerator,
) -> None:
    """Writes the checkpoint of where the stage is and removes its older ones. Every rank must call it."""
    stage = config.stages[number]
    finished = progress.done == data.total and not progress.evaluation_due
    write(run.checkpoint(stage.name, progress.done), config, number, assembly, optimizer, data, progress, accelerator)
    keep = 1 if finished else config.save.keep
    settings: dict[str, Any] = {"step": progress.done, "keep": keep, "best": progress.best_step}
    parallel.on_main(accelerator, lambda: checkpoint.prune(run.checkpoints, stage.name, **settings))


def write(
    folder: Path,
    config: Config,
    number: int,
    assembly: Assembly,
    optimizer: torch.optim.Optimizer,
    data: StageData,
    progress: Progress,
    accelerator: Accelerator,
    *,
    texts: Mapping[str, str] = {},
) -> None:
    """Writes all that the stage needs to go on into `folder`, and `texts` by file name. Every rank must call it."""
    flat = get_optimizer_state_dict(assembly.vlm, optimizer, options=FLAT)

    def add_files(place: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        add_model_files(place, assembly, tensors)
        for name, text in texts.items():
            (place / name).write_text(text, encoding="utf-8")

    checkpoint.save(
        folder,
        accelerator,
        tensors=kept_tensors(assembly),
        optimizer=moments(flat),
        state={
            "stage": config.stages[number].name,
            "step": progress.done,
            "total": data.total,
            "finished": progress.done == data.total and not progress.evaluation_due,
            "progress": asdict(progress),
            "data": data.fingerprints,
            "model": describe(config, number, assembly),
        },
        add_files=add_files,
    )


def finish(config: Config, run: RunDirectory) -> None:
    """Makes `final/` from the last stage's finished checkpoint: all that inference and export load. The stage's best
    one by held-out loss becomes `best/`, if the run keeps it. Both name the places of `config`, where a finished run
    that has `moved` is compared first."""
    last = run.newest(config.stages[-1].name)
    assert last is not None
    assert last.finished
    if any(key.startswith("model.") for key in run.moved):
        start(config, len(config.stages) - 1, last, cache_folder(config.cache))
    if run.moved:
        run.settle()
    best = Progress(**last.state["progress"]).best_step
    try:
        _hand_over(last, run.final, config)
        if best is not None:
            _hand_over(
                checkpoint.load(run.checkpoint(config.stages[-1].name, best)), run.final.with_name("best"), config
            )
    except OSError as error:
        raise ConfigError(
            f"{run.final}: could not be written ({error}); the training is done and saved: free some space, and the "
            f"same command writes it"
        ) from error


def _hand_over(found: Checkpoint, folder: Path, config: Config) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(
        found.folder,
        temporary,
        ignore=shutil.ignore_patterns(checkpoint.OPTIMIZER, checkpoint.MANIFEST, checkpoint.STATE),
    )
    record = {"format": checkpoint.FORMAT, "step": found.step, **found.state["model"]}
    record["model"] = config.model.model_dump(mode="json")
    (temporary / "model.json").write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


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
        assembly.adapter.save_pretrained(str(folder / "adapter"), state_dict=named, save_embedding_layers=False)
