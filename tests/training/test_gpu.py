"""What only a GPU would show, held on CPUs."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit.training import loop, parallel
from mmit.training.stage import RunningStage, dtypes
from tests.training.tiny import altered, config, mixed, run, shards, stage


def gpu(monkeypatch: pytest.MonkeyPatch, *, has_bf16: bool) -> None:
    """As on a machine with a GPU, which has bf16 or only emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )


def precisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str) -> tuple[str, torch.dtype, torch.dtype]:
    """Of the computation, and of trained and frozen parameters."""
    monkeypatch.setattr(parallel, "Accelerator", lambda **given: SimpleNamespace(device=torch.device("cuda"), **given))
    run = config(tmp_path / "run", stage("s", tmp_path, {"language": {"lr": 1e-3}}), vision=None)
    run = altered(run, tmp_path / "run", precision=wanted, device="auto")
    accelerator: Any = parallel.start(run)
    return accelerator.mixed_precision, *dtypes(run, accelerator)


@pytest.mark.parametrize(
    ("has_bf16", "wanted", "expected"),
    [
        (True, "auto", ("bf16", torch.float32, torch.bfloat16)),
        (False, "auto", ("no", torch.float32, torch.float32)),
        (False, "bf16", ("bf16", torch.float32, torch.bfloat16)),
        (True, "fp32", ("no", torch.float32, torch.float32)),
    ],
)
def test_a_gpu_that_only_emulates_bf16_gets_it_if_it_is_asked_for(
    has_bf16: bool,
    wanted: str,
    expected: tuple[str, torch.dtype, torch.dtype],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(monkeypatch, has_bf16=has_bf16)
    assert precisions(tmp_path, monkeypatch, wanted) == expected


def test_a_stage_that_has_ended_leaves_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next one has to fit beside it: weights, and twice as much again of moments."""
    before: list[weakref.ref[Any]] = []
    prepare = loop.prepare

    def watched(*arguments: Any) -> RunningStage:
        assert [found for reference in before if (found := reference()) is not None] == []
        gc.disable()  # it comes when it will
        at = prepare(*arguments)
        before.extend(weakref.ref(part) for part in (at.assembly.vlm, at.optimizer))
        return at

    monkeypatch.setattr(loop, "prepare", watched)
    data, train = shards(tmp_path / "data", mixed(10)), {"projector": {"lr": 1e-3}, "language": {"lr": 1e-3}}
    run(config(tmp_path / "run", stage("a", data, train, steps=1), stage("b", data, train, steps=1)))
