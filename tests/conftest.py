"""What several rooms test on: a finished run of tiny random parts, trained once a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TINY_LANGUAGE = {
    "random": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
}
TINY_VISION = {
    "library": "transformers",
    "random": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
}


def train_tiny(folder: Path, stages: list[dict[str, Any]], *, vision: bool = True) -> Path:
    """A run of tiny parts, trained in this process with its cache below `folder`; its directory."""
    from mmit.api import train
    from mmit.config import parse_config

    tree = {
        "output": str(folder / "run"),
        "model": {"language": TINY_LANGUAGE, "vision": TINY_VISION if vision else None},
        "stages": stages,
        "threads": 1,
        "workers": 0,
        "device": "cpu",
        "cache": str(folder / "cache"),
    }
    return train(parse_config(tree, "tiny")).parent


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: one stage on synthetic shapes, enough for answers that end and differ."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tiny")
        patch.setenv("MMIT_CACHE", str(folder / "cache"))
        stage = {
            "name": "sft",
            "data": [{"synthetic": "shapes", "options": {"count": 64}}],
            "train": {"projector": {"lr": 1e-2}, "language": {"lr": 1e-2}},
            "batch_size": 8,
            "steps": 60,
            "max_tokens": 512,
        }
        return train_tiny(folder, [stage])
