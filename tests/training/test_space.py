"""Laws of the disk a run needs: as its checkpoints then are, and told before the first stage trains."""

from __future__ import annotations

import math
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from mmit.config import Config, parse_config
from mmit.model.build import assemble
from mmit.training.space import SPARE, counts
from tests.training.tiny import CLIP, GPT2, LANGUAGE, config, ended, run, said, stage, start

Disk = namedtuple("Disk", "total used free")
FEW = {"batch_size": 2, "steps": 2}
LORA = {"rank": 3, "alpha": 6}
QUERIES = {"rank": 2, "alpha": 4, "targets": ["q_proj", "mlp.down_proj"]}
RATE = {"lr": 1e-3}


def adapted(lora: dict[str, Any]) -> dict[str, Any]:
    return {"language": RATE | {"lora": lora}}


SCHEDULES: dict[str, list[dict[str, Any]]] = {
    "full": [{"projector": RATE}, {"vision": RATE}, {"language": RATE}],
    "merged": [{"projector": RATE}, adapted(LORA), adapted(QUERIES), {"projector": RATE}],
    "everywhere": [adapted(LORA), {"projector": RATE}],
    "continued": [adapted(QUERIES), adapted(QUERIES) | {"projector": RATE}],
}


def on_disk(checkpoint: Path) -> int:
    """The numbers in the files of a checkpoint, without those that count the optimizer's steps."""
    found = 0
    for file in checkpoint.rglob("*.safetensors"):
        if "adapter" not in file.parts:
            with safe_open(file, "pt") as opened:
                shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
            found += sum(math.prod(shape) for shape in shapes if len(shape))
    return found


@pytest.mark.parametrize(
    ("language", "schedule"),
    [(LANGUAGE, name) for name in SCHEDULES] + [(GPT2, "full"), (GPT2, "everywhere")],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_the_size_of_every_checkpoint_is_known_before_the_first(
    tmp_path: Path, data: Path, language: dict[str, Any], schedule: str
) -> None:
    """From parts with weights of their own, of which a checkpoint holds what the run has changed."""
    base = config(tmp_path / "base", stage("only", data, {"projector": RATE}, **FEW), language=language)
    tree = {"output": str(tmp_path / "run"), "model": {"from": str(run(base)), "add_tokens": ["<new>"]}}
    trains = [stage(f"s{number}", data, train, **FEW) for number, train in enumerate(SCHEDULES[schedule])]
    settings = {"workers": 0, "threads": 1, "device": "cpu", "cache": str(tmp_path / "cache")}
    wanted = parse_config(tree | settings | {"stages": trains}, "test")
    told = list(counts(wanted, 0, assemble(wanted.model, seed=0)))
    folders = [run(wanted) / "checkpoints" / f"s{number}-step-2" for number in range(len(trains))]
    assert told == [on_disk(folder) for folder in folders]


def two(folder: Path, data: Path) -> Config:
    stages = [stage("align", data, {"projector": RATE}, **FEW), stage("sft", data, {"language": RATE}, **FEW)]
    return config(folder / "run", *stages, vision=CLIP, language=LANGUAGE | {"vocab_size": 5000})


def test_a_disk_too_small_for_a_later_stage_is_refused_before_the_first(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = two(tmp_path, data)
    align, sft = (4 * count for count in counts(wanted, 0, assemble(wanted.model, seed=0)))
    needed = align + 2 * sft + SPARE
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: Disk(needed, 0, needed - 1))
        assert ended(start(wanted)) == 2
    told = r"two checkpoints of stage sft need \d+\.\d MB \(\d+\.\d each\), beside \d+\.\d MB of the stages before it"
    assert re.search(told, said(wanted))
    assert not (tmp_path / "run/metrics.jsonl").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(needed, 0, needed))
    run(wanted)


def test_the_checkpoint_of_another_stage_does_not_count_as_one_of_this(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = two(tmp_path, data)
    run(wanted)
    for folder in (tmp_path / "run/checkpoints").glob("sft-*"):
        shutil.rmtree(folder)
    _, sft = (4 * count for count in counts(wanted, 0, assemble(wanted.model, seed=0)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(2 * sft, 0, 2 * sft + SPARE - 1))
    assert ended(start(wanted)) == 2
    assert "two checkpoints of stage sft need" in said(wanted)
