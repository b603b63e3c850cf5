"""A finished run as a model again: `final/` (or a checkpoint) with its base, adapter, tokenizer and chat format."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mmit import config as schema
from mmit.config import ConfigError
from mmit.data.chat import Chat
from mmit.data.fit import PictureFit
from mmit.model.build import Assembly, add_lora, assemble, check_sources, pinned, restore
from mmit.model.files import read_tensors
from mmit.model.pretrained import load_tokenizer
from mmit.model.sources import chat_format

FORMAT = 1


@dataclass(frozen=True)
class Saved:
    assembly: Assembly
    chat: Chat
    """The format of the last stage, from the run itself and never guessed."""
    fit: PictureFit | None
    image_tokens: int
    record: Mapping[str, Any]
    """model.json: parts, sources, stage."""


def load_saved(run: Path, *, cache: Path | None = None) -> Saved:
    """The model of a run directory or of a `final/` folder, in fp32 on the CPU; ConfigError says what is missing."""
    folder = run if (run / "model.json").exists() else run / "final"
    try:
        record = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        remedy = "name the `output` of a finished run"
        if (run / "config.yaml").exists():
            remedy = f"finish it with `mmit train {shlex.quote(str(run / 'config.yaml'))}`"
        elif (run / "config.json").exists():
            remedy = "a model of transformers, such as an export, answers there; name the run it was made from"
        raise ConfigError(f"{run}: holds no finished run (no final/model.json); {remedy}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{folder / 'model.json'}: damaged ({error}); copy it again from where it was made") from None
    if record["format"] != FORMAT:
        raise ConfigError(f"{folder}: model format {record['format']}, this mmit reads {FORMAT}; upgrade mmit")
    model = pinned(schema.Model.model_validate(record["model"]), record["sources"])
    try:
        assembly = assemble(model, seed=record["seed"], cache=cache)
    except ConfigError as error:
        raise ConfigError(
            f"{folder}: holds what was trained, and the rest of the model cannot be had: {error}; if that lies "
            f"elsewhere on this machine, write its place into `model` of {folder / 'model.json'}, content is compared"
        ) from error
    check_sources(record["sources"], assembly, str(folder))
    if record["lora"] is not None:
        add_lora(assembly, schema.Lora(**record["lora"]), seed=record["seed"])
    restore(assembly, read_tensors(folder / "model.safetensors"), str(folder))
    if not (folder / "tokenizer").is_dir():
        raise ConfigError(f"{folder}: no tokenizer/ in it; copy the folder again, whole, from where it was made")
    assembly.tokenizer = load_tokenizer(str(folder / "tokenizer"))
    assembly.vlm.float().eval()
    vision = assembly.vlm.vision
    return Saved(
        assembly=assembly,
        chat=Chat(chat_format(record["chat"]), assembly.tokenizer, placeholder=record["placeholder"]),
        fit=vision.fit_for(record["pictures"]) if vision is not None else None,
        image_tokens=record["image_tokens"],
        record=record,
    )


def run_folder(run: Path) -> Path:
    """Where config.yaml and metrics.jsonl lie, for a run directory as for its `final/`, `best/` and checkpoints."""
    folder = run.resolve()
    if folder.name in ("final", "best"):
        return folder.parent
    return folder.parents[1] if folder.parent.name == "checkpoints" else run


def settings_of(run: Path) -> dict[str, Any] | None:
    """The config of a run; None where its folder was copied without."""
    try:
        return yaml.safe_load((run_folder(run) / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        return None


def untrained(model: schema.Model, like: Saved, *, seed: int, cache: Path | None = None) -> Saved:
    """The parts of `model` before any training, to be asked the same way as `like`."""
    assembly = assemble(model, seed=seed, cache=cache)
    assembly.vlm.eval()
    return replace(like, assembly=assembly)
