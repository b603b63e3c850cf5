"""Losses written down: to the bit where they were recorded, to 1e-4 elsewhere; changed only with a reason.

Recorded anew by `MMIT_RECORD_GOLDEN=1 pytest tests/training/test_golden.py`; the commit says why.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.ranks import run_ranks
from tests.training.tiny import GPT2, config, metrics, stage

GOLDEN = Path(__file__).parents[1] / "golden"
PROJECTOR = {"projector": {"lr": 1e-3}}
BOTH = PROJECTOR | {"language": {"lr": 1e-3}}
LORA = PROJECTOR | {"language": {"lr": 1e-3, "lora": {"rank": 4, "alpha": 8}}}
HERE = f"torch {torch.__version__.partition('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"


def kinds(data: Path, texts: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any], int]]:
    """Of each: the stage, the settings of the run, and its ranks."""
    return {
        "align": (stage("align", data, PROJECTOR, pictures="crop"), {}, 1),
        "sft": (stage("sft", data, BOTH | {"vision": {"lr": 1e-4}}), {}, 1),
        "text": (stage("text", texts, {"language": {"lr": 1e-3}}, epochs=2), {"vision": None}, 1),
        "lora": (stage("lora", data, LORA), {}, 1),
        "packed": (stage("packed", data, BOTH, row_tokens=200, gradient_checkpointing=True), {"language": GPT2}, 1),
        "fsdp": (stage("fsdp", data, BOTH, row_tokens=200), {"parallel": "fsdp"}, 2),
    }


@pytest.mark.parametrize("name", ["align", "sft", "text", "lora", "packed", "fsdp"])
def test_losses_are_as_they_were_written_down(name: str, tmp_path: Path, data: Path, texts: Path) -> None:
    only, settings, ranks = kinds(data, texts)[name]
    lines = metrics(run_ranks(config(tmp_path / "run", only, **settings), ranks))
    losses = [float(line["loss"]) for line in lines]
    file = GOLDEN / f"{name}.txt"
    if "MMIT_RECORD_GOLDEN" in os.environ:
        file.write_text("\n".join([HERE, *(f"{loss.hex()} {loss:.6f}" for loss in losses), ""]), encoding="utf-8")
    where, *recorded = file.read_text(encoding="utf-8").splitlines()
    expected = [float.fromhex(line.split()[0]) for line in recorded]
    assert losses == (expected if where == HERE else pytest.approx(expected, rel=1e-4))
