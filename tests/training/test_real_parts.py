"""The laws once more on real parts: SmolLM2-135M-Instruct and DINOv2-small, as the demo fetches them.

$MMIT_DEMO_PARTS names the folder in which `mmit demo` has put them (its `parts/`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mmit.config import Config
from mmit.model.probes import probe_head, probe_isolation
from tests.training.tiny import alone, assembled, config, gradients, mixed, opened, shards, stage, together

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def parts() -> Path:
    named = os.environ.get("MMIT_DEMO_PARTS")
    if not named or not (Path(named) / "smollm2-135m-instruct").is_dir():
        pytest.skip("$MMIT_DEMO_PARTS names no folder with the demo's parts; `mmit demo` makes one")
    return Path(named).resolve()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.mktemp("data") / "mixed", mixed(5))


def real(output: Path, parts: Path, data: Path, **train: Any) -> Config:
    tower = {"library": "transformers", "name": str(parts / "dinov2-small"), "layer": 9, "side": 56}
    only = stage("s", data, train or {"projector": {"lr": 1e-3}}, max_tokens=400)
    return config(output, only, language=str(parts / "smollm2-135m-instruct"), vision=tower)


def test_the_probes_pass(tmp_path: Path, parts: Path, data: Path) -> None:
    vlm = assembled(real(tmp_path / "run", parts, data), dtype=torch.float32).vlm
    probe_isolation(vlm, torch.device("cpu"))
    assert probe_head(vlm, torch.device("cpu"))


def test_packed_is_separate_in_losses_and_gradients(tmp_path: Path, parts: Path, data: Path) -> None:
    wanted = real(tmp_path / "run", parts, data)
    assembly = assembled(wanted)
    found = opened(wanted, assembly)
    rows = alone(found)
    one = together(found, range(len(rows)))
    with torch.no_grad():
        apart = torch.cat([assembly.vlm(row) for row in rows])
        torch.testing.assert_close(assembly.vlm(one), apart, rtol=1e-6, atol=1e-8)  # its norms go through fp32
    there, here = gradients(assembly, [one]), gradients(assembly, rows)
    for name, expected in here.items():
        assert float((there[name] - expected).norm()) <= 1e-6 * float(expected.norm()), name


def test_the_prompt_is_a_prefix_of_what_is_trained_on(tmp_path: Path, parts: Path, data: Path) -> None:
    wanted = real(tmp_path / "run", parts, data)
    assembly = assembled(wanted, dtype=torch.float32)
    rendering = opened(wanted, assembly).training.encoders[0].rendering
    for sample in mixed(40):
        tokens = [rendering.image_tokens] * len(sample.images)
        whole = rendering.chat.render(sample, tokens).ids
        for turn, message in enumerate(sample.messages):
            if message.role == "assistant":
                prompt = rendering.chat.prompt(sample.messages[:turn], tokens).ids
                assert whole[: len(prompt)].tolist() == prompt.tolist()


def test_the_head_in_pieces_gives_the_models_own_losses(tmp_path: Path, parts: Path, data: Path) -> None:
    wanted = real(tmp_path / "run", parts, data)
    assembly = assembled(wanted, dtype=torch.float32)
    row = together(opened(wanted, assembly), range(5))
    with torch.no_grad():
        own = assembly.vlm(row)
        assembly.vlm.chunk = 3
        torch.testing.assert_close(assembly.vlm(row), own, rtol=1e-5, atol=1e-5)
