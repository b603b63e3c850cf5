from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmit.inference.generate import Model, load


def loud(run: Path, cache: Path) -> Model:
    """The tiny run in fp64 with noise on its weights: its answers are long, and depend on all of the prompt."""
    model = load(run, device="cpu", precision="fp64", cache=cache)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.vlm.parameters():
        if parameter.ndim > 1:
            parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return model


@pytest.fixture(scope="session")
def model(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return loud(tiny_run, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def own_model(tiny_run: Path, tmp_path: Path) -> Model:
    """As `model`, for a test that changes it."""
    return loud(tiny_run, tmp_path / "cache")
