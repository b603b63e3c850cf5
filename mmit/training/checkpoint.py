"""Checkpoints that are whole or refused: tensors in safetensors, the rest in JSON, a manifest of hashes written last.

`NAME.tmp/` is filled and flushed, then renamed to `NAME/`; whatever kills the process in between leaves the older
checkpoints untouched. Nothing here is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mmit.config import ConfigError
from mmit.model.build import read_tensors

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
NAME = re.compile(r"(?P<stage>.+)-step-(?P<step>\d+)")


class CheckpointError(ConfigError):
    """A checkpoint that is not whole: its folder, the file, and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, its hashes checked."""

    folder: Path
    state: Mapping[str, Any]

    def tensors(self, file: str = MODEL) -> dict[str, Tensor]:
        return read_tensors(self.folder / file)

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def finished(self) -> bool:
        return bool(self.state["finished"])


def save(
    folder: Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    add_files: Callable[[Path], None] | None = None,
) -> Checkpoint:
    """Writes `folder` at once or not at all. `tensors` maps file names to what they hold; `add_files` adds more."""
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        for name, content in tensors.items():
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in content.items()}, temporary / name)
        record = {"format": FORMAT} | dict(state)
        (temporary / STATE).write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
        if add_files is not None:
            add_files(temporary)
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        manifest = {str(file.relative_to(temporary)): _flushed_sha256(file) for file in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
        _flushed_sha256(temporary / MANIFEST)
        _flush_folder(temporary)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():  # the same step saved again after a resume: the same bits
        shutil.rmtree(folder)
    temporary.rename(folder)
    _flush_folder(folder.parent)
    return Checkpoint(folder, record)


def load(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, or CheckpointError that names the file that is missing or changed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: no readable {MANIFEST} ({type(error).__name__}); it was never whole"
        ) from None
    for name, sha256 in manifest.items():
        try:
            with (folder / name).open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror}); remove the folder") from None
        if found != sha256:
            raise CheckpointError(f"{folder / name}: its bytes have changed since it was written; remove the folder")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {state['format']}, this mmit reads {FORMAT}")
    return Checkpoint(folder, state)


def newest(checkpoints: Path, stage: str) -> Checkpoint | None:
    """The whole checkpoint of `stage` with the highest step; those that are not whole are named and passed over."""
    for _, folder in reversed(_of_stage(checkpoints, stage)):
        try:
            return load(folder)
        except CheckpointError as error:
            log.warning("%s; going back to the one before", error)
    return None


def has_begun(checkpoints: Path, stage: str) -> bool:
    return bool(_of_stage(checkpoints, stage))


def prune(checkpoints: Path, stage: str, *, step: int, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints of a stage up to `step`, and folders that were never finished.

    `step` was saved last: what is there of later steps was not whole when the stage went on, and must not count.
    """
    folders = _of_stage(checkpoints, stage)
    kept = [number for number, _ in folders if number <= step][-keep:]
    for number, folder in folders:
        if number not in kept:
            shutil.rmtree(folder)
    for folder in checkpoints.glob("*.tmp"):
        shutil.rmtree(folder)


def _of_stage(checkpoints: Path, stage: str) -> list[tuple[int, Path]]:
    """Steps and folders, by step and never by clock."""
    found = [(NAME.fullmatch(folder.name), folder) for folder in checkpoints.glob("*") if folder.is_dir()]
    return sorted((int(match["step"]), folder) for match, folder in found if match and match["stage"] == stage)


def _flushed_sha256(file: Path) -> str:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
