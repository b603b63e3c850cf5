from __future__ import annotations

import json

import numpy as np
import pytest

from mmit.data.sample import SampleError
from mmit.inference.generate import Model, load
from tests.conftest import train_tiny


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A run without vision that has learned to say a word again."""
    folder = tmp_path_factory.mktemp("text")
    rows = [{"instruction": f"Say {word}", "input": "", "output": word} for word in ("one", "two", "six", "ten")] * 4
    (folder / "rows.json").write_text(json.dumps(rows))
    stage = {
        "name": "sft",
        "data": [{"alpaca": str(folder / "rows.json")}],
        "train": {"language": {"lr": 1e-2}},
        "batch_size": 4,
        "steps": 150,
        "warmup": 0,
    }
    return load(train_tiny(folder, [stage], vision=False), device="cpu", cache=folder / "cache")


def test_a_run_of_text_alone_answers_what_it_learned(text_model: Model) -> None:
    asked = ["Say one", "Say six", "Say ten"]
    assert text_model.answers(asked, max_new_tokens=8) == ["one", "six", "ten"]


def test_a_run_of_text_alone_refuses_pictures(text_model: Model) -> None:
    with pytest.raises(SampleError, match="reads only text"):
        text_model.answer("What is it?", [np.zeros((8, 8, 3), np.uint8)])
