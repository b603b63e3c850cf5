"""The README of an export tells what went in, how, what was measured, and no place on the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from mmit import config as schema
from mmit.export.write import export
from mmit.model.build import assemble
from mmit.model.saved import Saved
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
    monkeypatch.setattr("mmit.model.saved.check_sources", lambda *_: None)
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


def gone_on_from(source: Path, run: Path) -> Path:
    """A run that has just begun with the model of `source`."""
    assembly = assemble(schema.Model.model_validate({"from": str(source)}), seed=0)
    vision, bound = assembly.vlm.vision, assembly.chat("auto")
    record = {"model": {"from": str(source)}, "sources": assembly.sources, "chat": vars(bound.format), "seed": 0}
    record |= {"format": 1, "placeholder": assembly.placeholder, "pictures": "pad", "max_tokens": 64}
    tokens = vision.tokens if vision is not None else 0
    return run_of(Saved(assembly, bound, assembly.fit("pad"), tokens, record | {"image_tokens": tokens}), run)


def config_of(run: Path, name: str, license: str) -> None:
    source = {"format": "llava", "path": f"/home/somebody/{name}.json", "options": {"license": license}, "repeat": 1.0}
    stage = {"name": "sft", "data": [source], "train": {"projector": {"lr": 1e-3}}, "batch_size": 8, "epochs": 1.0}
    stage |= {"schedule": "cosine", "warmup": 0.0, "weight_decay": 0.0}
    (run / "config.yaml").write_text(yaml.safe_dump({"output": "o", "stages": [stage]}))


@pytest.mark.parametrize("name", ["CLIP + llama", "text only"])
@pytest.mark.parametrize("through", ["out", "run"])
def test_what_a_model_goes_on_from_is_told_down_to_its_first_data(name: str, through: str, tmp_path: Path) -> None:
    """An export of an export of an export, or of a run of a run: parts, data and licences of each are in the card."""
    saved = saved_model(MODELS[name])
    base = {"language": {"name": "us/chat-7b", "revision": "1"}}
    cast(dict[str, Any], saved.record)["sources"] = base
    run = run_of(saved, tmp_path / "run0")
    for number, license in enumerate(("MIT", "CC-BY-4.0", "Apache-2.0")):
        config_of(run, f"notes{number}", license)
        export(run, tmp_path / f"out{number}")
        if number < 2:
            run = gone_on_from(tmp_path / f"{through}{number}", tmp_path / f"run{number + 1}")
    card = (tmp_path / "out2/README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| sft") and "notes" in line]
    assert rows == [
        f"| sft of {through}0 | llava: notes0.json | MIT | x 1 |",
        f"| sft of {through}1 | llava: notes1.json | CC-BY-4.0 | x 1 |",
        "| sft | llava: notes2.json | Apache-2.0 | x 1 |",
    ]
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ["us/chat-7b"]
    assert f"It goes on from `{through}1` (from `{through}0` (language from `us/chat-7b`))." in card
    assert "somebody" not in card
    assert str(tmp_path) not in card
