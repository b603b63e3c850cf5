"""What only a GPU would show, held on CPUs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit.training import parallel
from mmit.training.stage import dtypes
from tests.training.tiny import altered, config, stage


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
