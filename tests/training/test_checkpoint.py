"""Laws of checkpoints: whole or refused by name, the newest by step, and nothing lost on the way."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from mmit.config import ConfigError
from mmit.training import checkpoint
from mmit.training.checkpoint import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
MOMENTS = {"state.a.weight.step": torch.tensor(4.0), "state.a.weight.exp_avg": torch.arange(6.0).view(2, 3)}
MOMENTS_FILE = "optimizer/shard-00001-model-00001-of-00001.safetensors"


def save(folder: Path, step: int, *, stage: str = "sft", finished: bool = False) -> checkpoint.Checkpoint:
    def more(place: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        assert tensors.keys() == TENSORS.keys()
        (place / "tokenizer").mkdir()
        (place / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")

    state = {"step": step, "finished": finished, "stage": stage}
    saved = checkpoint.save(
        folder / f"{stage}-step-{step}",
        Accelerator(cpu=True),
        tensors=TENSORS,
        optimizer=MOMENTS,
        state=state,
        add_files=more,
    )
    return checkpoint.load(saved)


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 4, finished=True)
    found = checkpoint.load(tmp_path / "sft-step-4")
    assert (found.step, found.finished) == (4, True)
    loaded = found.tensors()
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    moments = {name: torch.zeros_like(tensor) for name, tensor in MOMENTS.items()}
    checkpoint.read_shards(found, moments)
    assert all(torch.equal(moments[name], MOMENTS[name]) for name in MOMENTS)


def test_a_flipped_byte_in_any_file_is_refused_by_name_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 3)
    whole = save(tmp_path, 12).folder
    spare = tmp_path.parent / "spare"
    shutil.copytree(whole, spare)
    files = sorted(str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file())
    assert files == [
        "manifest.json",
        "model.safetensors",
        MOMENTS_FILE,
        "state.json",
        "tokenizer/tokenizer.json",
    ]
    for name in files:
        original = (whole / name).read_bytes()
        for place in (0, len(original) // 2, len(original) - 1):
            (whole / name).write_bytes(
                original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :],
            )
            with pytest.raises(CheckpointError) as raised:
                checkpoint.load(whole)
            if name != checkpoint.MANIFEST:
                assert name in str(raised.value)
            assert "sft-step-12" in str(raised.value)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                found = checkpoint.newest(tmp_path, "sft")
            assert found is not None
            assert found.step == 3
            assert "sft-step-12" in caplog.text
        (whole / name).write_bytes(original)
    assert checkpoint.load(whole).step == 12


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "state.json", "tokenizer/tokenizer.json"])
def test_a_missing_or_cut_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 3).folder
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    with pytest.raises(CheckpointError, match="sft-step-3"):
        checkpoint.load(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(folder)


def test_the_newest_is_the_one_of_the_highest_step_whatever_the_clock_says(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        os.utime(save(tmp_path, step).folder, (1e9 - step, 1e9 - step))
    save(tmp_path, 999, stage="sft-step-1")
    save(tmp_path, 999, stage="align")
    found = checkpoint.newest(tmp_path, "sft")
    assert found is not None
    assert found.step == 100


def test_a_save_that_was_interrupted_anywhere_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes the disk is made to fail in turn, once as an error and once as sudden death."""

    class Died(BaseException):
        pass

    save(tmp_path, 1)
    for error in (OSError, Died):
        for name in ("save_file", "_flushed_sha256", "_flush_folder"):
            with monkeypatch.context() as patched:

                def fail(*_: object, error: type[BaseException] = error) -> None:
                    raise error("no space left")

                patched.setattr(checkpoint, name, fail)
                with pytest.raises(error):
                    save(tmp_path, 2)
            found = checkpoint.newest(tmp_path, "sft")
            assert found is not None
            assert found.step == 1
    assert save(tmp_path, 2).step == 2
    assert checkpoint.newest(tmp_path, "sft") is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sft-step-1", "sft-step-2"]


def test_pruning_keeps_the_newest_and_other_stages(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        save(tmp_path, step)
    save(tmp_path, 7, stage="align")
    (tmp_path / "sft-step-120.tmp").mkdir()
    checkpoint.prune(tmp_path, "sft", step=100, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["align-step-7", "sft-step-100", "sft-step-15"]


def test_pruning_does_not_keep_a_broken_later_one_in_place_of_a_whole_one(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "sft-step-20" / checkpoint.MODEL).write_bytes(b"broken")
    found = checkpoint.newest(tmp_path, "sft")
    assert found is not None
    assert found.step == 10
    save(tmp_path, 15)
    checkpoint.prune(tmp_path, "sft", step=15, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["sft-step-15"]


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    endings = {file.suffix for file in save(tmp_path, 1).folder.rglob("*") if file.is_file()}
    assert endings == {".json", ".safetensors"}


def test_a_checkpoint_of_another_format_is_refused_and_not_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (3, 12):
        save(tmp_path, step)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(ConfigError, match="sft-step-12: checkpoint format 1, this mmit reads 2"):
        checkpoint.newest(tmp_path, "sft")
