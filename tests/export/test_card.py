"""The README of an export tells what went in, how, what was measured, and no place on the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from mmit.export.write import export
from tests.export.models import MODELS, run_of, saved_model

CONFIG = {
    "output": "/home/somebody/secret/run",
    "cache": "/scratch/somebody",
    "model": {"chat": "auto"},
    "stages": [
        {
            "name": "sft",
            "data": [
                {
                    "format": "llava",
                    "path": "/home/somebody/notes.json",
                    "images": "/home/somebody/photos",
                    "options": {"license": "CC-BY-4.0"},
                    "repeat": 2.0,
                },
                {"shards": "SHARDS", "name": "ours", "repeat": 1.0, "limit": 50},
                {"format": "hub", "path": "HuggingFaceM4/the_cauldron", "repeat": 1.0},
            ],
            "train": {"projector": {"lr": 1e-3}, "language": {"lr": 2e-4, "lora": {"rank": 16}}},
            **{"batch_size": 128, "epochs": 1.0, "schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0},
        }
    ],
}


def test_the_card_tells_data_licences_recipe_metrics_and_parity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = saved_model(MODELS["CLIP + llama"])
    base = {"name": "us/chat-7b", "revision": "1"}
    cast(dict[str, Any], saved.record)["sources"] = {
        "language": {"name": "runs/a", "sha256": {}, "sources": {"language": base}},
        "vision": {"name": "hf-hub:timm/ViT-B", "fingerprint": "2"},
        "projector": {"name": "/home/somebody/projector.safetensors", "sha256": {}},
    }
    run = run_of(saved, tmp_path / "run")
    monkeypatch.setattr("mmit.model.saved._check_sources", lambda *_: None)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "conversion.json").write_text(json.dumps({"plan": {"settings": {"license": "Apache-2.0"}}}))
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG).replace("SHARDS", str(shards)))
    steps = [{"stage": "sft", "step": step, "loss": 3.0 - step / 10} for step in range(1, 21)]
    steps = [*steps[:15], *steps[12:]]  # a killed run writes the steps that it repeats again
    steps[3] |= {"loss": None}  # not finite
    lines = [*steps, {"stage": "sft", "step": 20, "held_out": {"ours": 1.25}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    export(run / "final", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "image-text-to-text"
    assert header["base_model"] == ["us/chat-7b", "timm/ViT-B"]
    assert header["datasets"] == ["HuggingFaceM4/the_cauldron"]
    for line in (
        "| sft | llava: notes.json | CC-BY-4.0 | x 2 |",
        "| sft | ours | Apache-2.0 | x 1, at most 50 |",
        "| sft | language 0.0002 (LoRA rank 16), projector 0.001 | 128 | 1 epochs | cosine, warm-up 0.03, decay 0 |",
        "| sft | 19 | 2.8500, 1.0500 | ours 1.2500 |",
        "greedy tokens equal",
    ):
        assert line in card, card
    assert "somebody" not in card
    assert "somebody" not in (tmp_path / "out/mmit.json").read_text()
    export(run, tmp_path / "again", format="mmit")
    export(tmp_path / "again", tmp_path / "twice")
    assert "| sft | ours | Apache-2.0 |" in (tmp_path / "twice/README.md").read_text()
