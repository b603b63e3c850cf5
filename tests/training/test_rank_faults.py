"""Laws of faults that one rank or one worker alone meets: named once, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmit.config import Config
from mmit.data.images import decode
from mmit.data.sample import SampleError
from mmit.training import checkpoint, due, loop, parallel
from tests.training.ranks import assert_same_losses, ended_ranks, run_ranks, start_ranks
from tests.training.test_faults import BOTH, LANGUAGE, alone
from tests.training.test_resume import OFTEN, wait_for_steps
from tests.training.tiny import config, ended, metrics, said, shards, stage, start


@pytest.fixture
def alike(tmp_path: Path) -> Path:
    """Samples with a picture each, that no other shows."""
    return shards(tmp_path / "data", [alone(number) for number in range(24)])


def on_picture(monkeypatch: pytest.MonkeyPatch, key: str, action: Any) -> None:
    """Does `action` where the picture of sample `key` is decoded."""

    def watched(data: bytes, where: str, **options: Any) -> Any:
        if where.endswith(f":{key}"):
            action(where)
        return decode(data, where, **options)

    monkeypatch.setattr("mmit.data.loader.decode", watched)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_one_rank_cannot_read_ends_all_of_them(
    workers: int, tmp_path: Path, alike: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(where: str) -> None:
        raise SampleError(f"{where}: not a picture")

    on_picture(monkeypatch, "p0010", fails)
    wanted = config(tmp_path / "run", stage("s", alike, BOTH), workers=workers)
    assert sorted(ended_ranks(start_ranks(wanted, 2), seconds=60)) == [1, 3], said(wanted)
    assert said(wanted).count("p0010: not a picture") == 1
    assert "another rank has stopped" in said(wanted)
    assert "Traceback" not in said(wanted)


def test_a_run_that_is_in_use_is_refused_on_all_ranks(tmp_path: Path, texts: Path) -> None:
    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE, steps=4000), vision=None)
    process = start(wanted)
    wait_for_steps(wanted, process, 1)
    assert ended_ranks(start_ranks(wanted, 2), seconds=60) == [2, 1], said(wanted)
    assert f"is in use by process {process} on" in said(wanted)
    assert "Traceback" not in said(wanted)
    os.kill(process, signal.SIGINT)
    assert ended(process) == 75


def test_a_worker_that_dies_is_told_of_with_the_sample_in_its_hands(
    tmp_path: Path, alike: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_picture(monkeypatch, "p0010", lambda where: os.kill(os.getpid(), signal.SIGKILL))
    wanted = config(tmp_path / "run", stage("s", alike, BOTH), workers=1)
    process, before = start(wanted), time.monotonic()
    assert ended(process) == 3, said(wanted)
    assert time.monotonic() - before < 30
    assert "p0010" in said(wanted)
    assert "loader: DataLoader worker" in said(wanted)
    assert "Traceback" not in said(wanted)


def test_a_worker_that_hangs_is_ended_and_told_of_with_the_sample_in_its_hands(
    tmp_path: Path, alike: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_picture(monkeypatch, "p0010", lambda where: time.sleep(300))
    monkeypatch.setattr(loop, "load", partial(loop.load, timeout=3))
    wanted = config(tmp_path / "run", stage("s", alike, BOTH), workers=2)
    process, before = start(wanted), time.monotonic()
    assert ended(process) == 3, said(wanted)
    assert time.monotonic() - before < 60
    assert "p0010" in said(wanted)
    assert "timed out after 3 seconds" in said(wanted)
    assert "Traceback" not in said(wanted)


def test_ranks_wait_longer_for_a_slow_disk_than_for_a_step(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any) -> Any:
        time.sleep(5)
        return save_file(*arguments)

    save_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(parallel, "TIMEOUT", timedelta(seconds=2))
    run_ranks(config(tmp_path / "run", stage("s", texts, LANGUAGE, steps=2), vision=None), 2)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_signal_in_the_middle_of_an_evaluation_loses_nothing(
    how: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wanted(name: str) -> Config:
        held_out = {"holdout": {"fraction": 0.4, "by": "sample"}, "every": 2}
        only = stage("s", data, BOTH, steps=4, row_tokens=200)
        return config(tmp_path / name, only, eval=held_out, parallel=how)

    again, add = wanted("again"), due.add_by_source

    def stopped(*arguments: Any) -> None:
        add(*arguments)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(due, "add_by_source", stopped)
        assert ended_ranks(start_ranks(again, 2)) == [75, 75], said(again)
    assert (tmp_path / "again/checkpoints/s-step-2").is_dir()
    run_ranks(again, 2)
    assert len(metrics(tmp_path / "again")) == 4, "no step was computed twice"
    assert_same_losses(run_ranks(wanted("straight"), 2), tmp_path / "again", relative=0)


def test_a_signal_while_a_checkpoint_is_written_does_not_write_it_twice(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE, steps=5), vision=None, save=OFTEN)
    save_file = checkpoint.save_file

    def stopped(tensors: Any, file: Path) -> None:
        (tmp_path / "written").open("a").write(f"{file.parent.name}\n")
        if "step-2" in file.parent.name:
            os.kill(os.getpid(), signal.SIGTERM)
        save_file(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", stopped)
    assert ended(start(wanted)) == 75, said(wanted)
    assert "stopped after step 2 of stage s" in said(wanted)
    assert (tmp_path / "written").read_text().split() == ["s-step-1.tmp", "s-step-2.tmp"]


def test_settings_of_accelerate_in_the_environment_change_no_number(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wanted(name: str) -> Config:
        return config(tmp_path / name, stage("s", data, BOTH, steps=3, clip=None), precision="fp64")

    plain = run_ranks(wanted("plain"), 1)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert_same_losses(plain, run_ranks(wanted("set"), 1), relative=0)
