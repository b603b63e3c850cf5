"""A run goes on where its base model or its samples lie elsewhere; with other content it is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from mmit.config import Config, parse_config
from mmit.model.saved import load_saved
from tests.model.test_build import with_folders
from tests.training.test_resume import BOTH, OFTEN, PROJECTOR, wait_for_steps
from tests.training.tiny import (
    config,
    ended,
    metrics,
    mixed,
    once_each,
    run,
    said,
    shards,
    stage,
    start,
    written,
)


def named(wanted: Config, **places: str) -> Config:
    """The config with other values at dotted keys (`__` for a dot), as overrides of a command line are."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in places.items()]
    return parse_config(wanted.model_dump(mode="json"), "test", overrides)


def interrupted(wanted: Config, steps: int) -> None:
    process = start(wanted)
    wait_for_steps(wanted, process, steps)
    os.kill(process, signal.SIGKILL)
    ended(process)


def assert_same_numbers(one: Path, other: Path) -> None:
    assert once_each(metrics(other)) == once_each(metrics(one))
    assert (other / "final/model.safetensors").read_bytes() == (one / "final/model.safetensors").read_bytes()


def two_stages(output: Path, align: Path, sft: Path) -> Config:
    stages = [stage("align", align, PROJECTOR, steps=12), stage("sft", sft, BOTH, steps=12)]
    return with_folders(output, *stages, save=OFTEN, eval={"holdout": {"fraction": 0.2, "by": "sample"}, "every": 5})


def lines_of_align(folder: Path) -> int:
    """Lines of metrics.jsonl before the second stage."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["stage"] == "align" for line in lines)


def test_a_run_goes_on_to_the_same_numbers_with_its_base_elsewhere(tmp_path: Path) -> None:
    data = shards(tmp_path / "data/mixed", mixed(23))
    straight, again = (two_stages(tmp_path / name, data, data) for name in ("straight", "again"))
    run(straight)
    interrupted(again, 2 + lines_of_align(Path(straight.output)))
    for part in ("language", "tower"):
        shutil.move(tmp_path / part, tmp_path / "mnt" / part)
    moved = named(again, model__language=f"{tmp_path}/mnt/language", model__vision__name=f"{tmp_path}/mnt/tower")
    assert ended(start(moved)) == 0, said(moved)
    assert "going on after step" in said(moved)
    assert_same_numbers(Path(straight.output), Path(again.output))
    kept = yaml.safe_load((Path(again.output) / "config.yaml").read_text(encoding="utf-8"))
    assert kept["model"]["language"] == f"{tmp_path}/mnt/language"


def test_a_finished_run_is_told_where_its_base_lies_now_by_the_same_command(tmp_path: Path) -> None:
    data = shards(tmp_path / "data/mixed", mixed(23))
    finished = two_stages(tmp_path / "run", data, data)
    run(finished)
    weights = (tmp_path / "run/final/model.safetensors").read_bytes()
    (tmp_path / "mnt").mkdir()
    shutil.move(tmp_path / "language", tmp_path / "mnt/language")
    moved = named(finished, model__language=f"{tmp_path}/mnt/language")
    file = tmp_path / "mnt/language/model.safetensors"
    tensors = load_file(file)
    name = min(name for name in tensors if "layers.0" in name)
    save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})
    kept = (tmp_path / "run/config.yaml").read_bytes(), (tmp_path / "run/final/model.json").read_bytes()
    assert ended(start(moved)) == 2
    assert "was trained from other files of model.language (then" in said(moved)
    assert kept == ((tmp_path / "run/config.yaml").read_bytes(), (tmp_path / "run/final/model.json").read_bytes())
    save_file(tensors, file, metadata={"format": "pt"})
    assert ended(start(moved)) == 0, said(moved)
    told = yaml.safe_load((tmp_path / "run/config.yaml").read_text(encoding="utf-8"))
    assert told["model"]["language"] == f"{tmp_path}/mnt/language"
    assert (tmp_path / "run/final/model.safetensors").read_bytes() == weights
    load_saved(tmp_path / "run", cache=tmp_path / "cache")


@pytest.mark.parametrize("stages_done", [0, 1])
def test_a_run_goes_on_to_the_same_numbers_with_its_shards_elsewhere(stages_done: int, tmp_path: Path) -> None:
    align, sft = shards(tmp_path / "data/align", mixed(12)), shards(tmp_path / "data/sft", mixed(23))
    straight, again = (two_stages(tmp_path / name, align, sft) for name in ("straight", "again"))
    run(straight)
    interrupted(again, 2 + stages_done * lines_of_align(Path(straight.output)))
    shutil.move(tmp_path / "data", tmp_path / "mnt")
    places = {f"stages__{name}__data__0__shards": f"{tmp_path}/mnt/{name}" for name in ("align", "sft")}
    moved = named(again, **places)
    assert ended(start(moved)) == 0, said(moved)
    assert_same_numbers(Path(straight.output), Path(again.output))


def test_a_renamed_folder_of_shards_keeps_the_name_that_metrics_know(tmp_path: Path) -> None:
    data = shards(tmp_path / "data", [written(number) for number in range(12)])
    straight, again = (
        config(tmp_path / name, stage("s", data, {"language": {"lr": 1e-3}}, epochs=6), vision=None, save=OFTEN)
        for name in ("straight", "again")
    )
    run(straight)
    interrupted(again, 2)
    data.rename(tmp_path / "other")
    moved = named(again, stages__s__data__0__shards=f"{tmp_path}/other")
    assert ended(start(moved)) == 2
    assert "stages.s.data.0.name: if those are the same samples elsewhere, write name: data" in said(moved)
    moved = named(moved, stages__s__data__0__name="data")
    assert ended(start(moved)) == 0, said(moved)
    assert_same_numbers(Path(straight.output), Path(again.output))


def test_a_converted_source_goes_on_with_its_file_elsewhere(tmp_path: Path) -> None:
    rows = [{"instruction": f"count {number}", "input": "", "output": "one two three"} for number in range(12)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.json").write_text(json.dumps(rows))
    trained = {"name": "s", "train": {"language": {"lr": 1e-3}}, "batch_size": 5, "epochs": 6}
    source = {"alpaca": f"{tmp_path}/data/rows.json"}
    straight, again = (
        config(tmp_path / name, trained | {"data": [source]}, vision=None, save=OFTEN) for name in ("straight", "again")
    )
    run(straight)
    interrupted(again, 2)
    shutil.move(tmp_path / "data", tmp_path / "mnt")
    moved = named(again, stages__s__data__0__path=f"{tmp_path}/mnt/rows.json")
    assert ended(start(moved)) == 0, said(moved)
    assert_same_numbers(Path(straight.output), Path(again.output))


def altered_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that was killed in its second stage."""
    folder = tmp_path_factory.mktemp("begun")
    align, sft = shards(folder / "data/align", mixed(10)), shards(folder / "data/sft", mixed(23))
    stages = [stage("align", align, PROJECTOR), stage("sft", sft, PROJECTOR, steps=2000)]
    wanted = with_folders(folder / "run", *stages, save=OFTEN)
    interrupted(wanted, 5)
    return wanted


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("a weight", "was trained from other files of model.language (then"),
        ("the tower", "was trained from other files of model.vision (then"),
        ("the tokenizer", "the tokenizer (tokenizer.json, tokenizer_config.json) is another one now"),
        ("the rope", "the configuration of the language model (config.json) is another one now"),
        ("the template", "the chat format is another one now"),
        ("nothing there", "mnt/language: no such folder"),
        ("the shards", "the data of the stage has changed since (sources sft)"),
        ("the shards of a finished stage", "the data of the stage has changed since (sources align)"),
    ],
)
def test_other_content_elsewhere_is_refused_in_a_line(what: str, told: str, begun: Config, tmp_path: Path) -> None:
    home = Path(begun.output).parent
    shutil.copytree(home / "run", tmp_path / "run")
    before = (tmp_path / "run/config.yaml").read_bytes(), metrics(tmp_path / "run")
    for part in ("language", "tower", "data"):
        shutil.copytree(home / part, tmp_path / "mnt" / part)
    mnt = tmp_path / "mnt"
    match what:
        case "a weight" | "the tower":
            file = mnt / ("language" if what == "a weight" else "tower") / "model.safetensors"
            tensors = load_file(file)
            name = next(name for name in sorted(tensors) if "layers.0" in name)
            save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})
        case "the tokenizer":
            described = json.loads((mnt / "language/tokenizer.json").read_text(encoding="utf-8"))
            vocabulary = described["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
            altered_json(mnt / "language/tokenizer.json", model=described["model"])
        case "the rope":
            altered_json(mnt / "language/config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
        case "the template":
            file = mnt / "language/chat_template.jinja"
            file.write_text(file.read_text(encoding="utf-8").replace(">user", ">User"), encoding="utf-8")
        case "nothing there":
            shutil.rmtree(mnt / "language")
        case _:
            name = "sft" if what == "the shards" else "align"
            shutil.rmtree(mnt / "data" / name)
            shards(mnt / "data" / name, mixed(24))
    places = {"model__language": f"{mnt}/language", "model__vision__name": f"{mnt}/tower"}
    places |= {f"stages__{name}__data__0__shards": f"{mnt}/data/{name}" for name in ("align", "sft")}
    moved = named(begun, output=f"{tmp_path}/run", **places)
    assert ended(start(moved)) == 2
    (line,) = said(moved).splitlines()
    assert told in line
    assert ((tmp_path / "run/config.yaml").read_bytes(), metrics(tmp_path / "run")) == before
