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
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from mmit.config import ConfigError
from mmit.model.files import read_tensors
from mmit.training import parallel

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer"
"""A folder of torch.distributed.checkpoint's, in safetensors: written by all ranks, read by any number of them."""
ASIDE = ".before"
"""Ending of a checkpoint that gives way to one of the same step."""
NAME = re.compile(r"(?P<stage>.+)-step-(?P<step>\d+)")


class CheckpointError(ConfigError):
    """A checkpoint that is not whole: its folder, the file, and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, its hashes checked."""

    folder: Path
    state: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / MODEL)

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def finished(self) -> bool:
        return bool(self.state["finished"])


def save(
    folder: Path,
    accelerator: Accelerator,
    *,
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    add_files: Callable[[Path, Mapping[str, Tensor]], None] = lambda folder, tensors: None,
) -> Path:
    """Writes `folder` at once or not at all, and returns it. `add_files` adds what is not a tensor; it is
    given the tensors whole, on the CPU.

    Every rank must call it; rank 0 writes the model's tensors (whole, also where they are sharded), and each rank its
    shards of the optimizer. OSError on every rank if one could not write; the older checkpoints are untouched.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    record = {"format": FORMAT} | dict(state)

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        try:
            save_file(whole, temporary / MODEL)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        (temporary / STATE).write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
        add_files(temporary, whole)
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        manifest = {str(file.relative_to(temporary)): _flushed_sha256(file) for file in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
        _flushed_sha256(temporary / MANIFEST)
        _flush_folder(temporary)
        aside = folder.with_name(folder.name + ASIDE)
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():  # the same step again, its evaluation made meanwhile
            folder.rename(aside)
        temporary.rename(folder)
        _flush_folder(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)

    whole = _gathered(tensors, keep=accelerator.is_main_process)
    try:
        parallel.on_main(accelerator, begin)
        parallel.on_all(accelerator, lambda: _write_shards(optimizer, temporary / OPTIMIZER, accelerator))
        parallel.on_main(accelerator, finish)
    except OSError:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU where `keep` is true. One at a time: a rank never holds more than one shard's whole."""
    found = {}
    for name, tensor in tensors.items():
        full = parallel.whole(tensor.detach())
        if keep:
            found[name] = full.cpu().contiguous()
    return found


def _write_shards(tensors: Mapping[str, Tensor], folder: Path, accelerator: Accelerator) -> None:
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    if sharded or accelerator.is_main_process:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            with _quiet_alone():
                state_dict_saver.save(
                    dict(tensors),
                    storage_writer=writer,
                    no_dist=not sharded,
                    process_group=parallel.patient_group() if sharded else None,
                )
        except CheckpointException as error:  # the faults of all ranks, and not an Exception
            faults = [fault for fault, _ in error.failures.values()]
            if not all(isinstance(fault, OSError | SafetensorError) for fault in faults):
                raise
            raise OSError("; ".join(sorted({str(fault) for fault in faults}))) from error


def read_shards(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """Reads the optimizer's tensors into `tensors`, whose own layout over ranks may be another."""
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    reader = HuggingFaceStorageReader(str(checkpoint.folder / OPTIMIZER))
    with _quiet_alone():
        state_dict_loader.load(
            dict(tensors),
            storage_reader=reader,
            no_dist=not sharded,
            process_group=parallel.patient_group() if sharded else None,
        )


@contextmanager
def _quiet_alone() -> Iterator[None]:
    """Without the warning that there is one process, which is what `no_dist` says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def load(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; CheckpointError names the file that is missing or changed, ConfigError a format that
    is not ours."""
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
        # Not a CheckpointError: going back to one before would begin anew, and remove what another mmit can read.
        raise ConfigError(
            f"{folder}: checkpoint format {state['format']}, this mmit reads {FORMAT}; go on with the mmit that wrote "
            f"it, or name another output"
        )
    return Checkpoint(folder, state)


def newest(checkpoints: Path, stage: str) -> Checkpoint | None:
    """The whole checkpoint of `stage` with the highest step; those that are not whole are named and passed over."""
    for aside in checkpoints.glob(f"*{ASIDE}"):
        if not aside.with_suffix("").exists():  # a kill fell between two renames
            aside.rename(aside.with_suffix(""))
    for _, folder in reversed(_of_stage(checkpoints, stage)):
        try:
            return load(folder)
        except CheckpointError as error:
            log.warning("%s; going back to the one before", error)
    return None


def has_begun(checkpoints: Path, stage: str) -> bool:
    return bool(_of_stage(checkpoints, stage))


def prune(checkpoints: Path, stage: str, *, step: int, keep: int, best: int | None = None) -> None:
    """Removes all but the `keep` newest checkpoints of a stage up to `step`, and folders that were never finished.
    That of step `best` stays in any case.

    `step` was saved last: what is there of later steps was not whole when the stage went on, and must not count.
    """
    folders = _of_stage(checkpoints, stage)
    kept = [number for number, _ in folders if number <= step][-keep:]
    for number, folder in folders:
        if number not in kept and number != best:
            shutil.rmtree(folder)
    for ending in (".tmp", ASIDE):
        for folder in checkpoints.glob(f"*{ending}"):
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
