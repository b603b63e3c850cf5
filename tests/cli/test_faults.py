"""The mistakes people make most: each is one message with its place and its remedy, and an exit code, no traceback."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mmit.cli import main
from mmit.data.byte_tokenizer import byte_tokenizer
from mmit.data.sample import Sample, message
from mmit.data.shards import write_shards
from tests.conftest import TINY_LANGUAGE, TINY_VISION


def recipe(folder: Path, source: dict[str, Any], **model: Any) -> Path:
    """A recipe of tiny parts on `source`, which is only ever refused or trained for one step."""
    tree = {
        "output": str(folder / "run"),
        "model": {"language": TINY_LANGUAGE, "vision": TINY_VISION} | model,
        "stages": [{"name": "sft", "data": [source], "train": {"language": {"lr": 1e-3}}, "batch_size": 2, "steps": 1}],
        "workers": 0,
        "threads": 1,
        "device": "cpu",
        "cache": str(folder / "cache"),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def train(monkeypatch: pytest.MonkeyPatch, file: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["mmit", "train", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def llava(folder: Path, text: str, image: str | None = "0.png") -> dict[str, Any]:
    (folder / "photos").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "photos" / "0.png")
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "Red."}]
    records = [{"id": f"row-{number}", "conversations": turns} | ({"image": image} if image else {}) for number in "ab"]
    (folder / "notes.json").write_text(json.dumps(records), encoding="utf-8")
    return {"llava": str(folder / "notes.json"), "images": str(folder / "photos")}


def texts(folder: Path, count: int = 6) -> Path:
    samples = [
        Sample(f"s{number}", "texts", (message("user", f"{number}?"), message("assistant", "Yes.")))
        for number in range(count)
    ]
    write_shards(samples, folder)
    return folder


def without(folder: Path, **changed: Any) -> str:
    """The byte tokenizer in a folder, with a template or a pad token taken away."""
    tokenizer = byte_tokenizer()
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_missing_picture_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, llava(tmp_path, "<image>\nWhich colour?", image="gone.png"))
    assert train(monkeypatch, file) == 2
    told = capsys.readouterr().err
    assert "gone.png" in told
    assert "--on-missing" in told or "on_missing" in told
    assert "Traceback" not in told


def test_a_marker_without_its_picture_is_named_by_file_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, llava(tmp_path, "<image>\n<image>\nWhich colour?"))
    assert train(monkeypatch, file) == 3
    told = capsys.readouterr().err
    assert "notes.json" in told
    assert "row-a" in told
    assert "2" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("cut", [1, 700, 5000])
def test_a_cut_shard_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    folder = texts(tmp_path / "shards")
    (tar,) = folder.glob("*.tar")
    os.truncate(tar, tar.stat().st_size - cut)
    assert train(monkeypatch, recipe(tmp_path, {"shards": str(folder)})) == 3
    told = capsys.readouterr().err
    assert tar.name in told
    assert "Traceback" not in told


def test_a_folder_that_is_no_shard_set_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, recipe(tmp_path, {"shards": str(tmp_path / "nowhere")})) in (2, 3)
    told = capsys.readouterr().err
    assert "nowhere" in told
    assert "Traceback" not in told


def test_a_gpu_that_is_not_there_is_told_and_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, {"shards": str(texts(tmp_path / "shards"))})
    file.write_text(file.read_text().replace("device: cpu", "device: cuda"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert train(monkeypatch, file) == 2
    assert "device: cuda, but torch sees no GPU" in capsys.readouterr().err


def test_the_version_is_told_for_reports_of_faults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mmit", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert capsys.readouterr().out.split()[::2] == ["mmit", "torch", "transformers"]


def test_an_output_where_no_folder_can_be_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    file = recipe(tmp_path, {"shards": str(texts(tmp_path / "shards"))})
    file.write_text(file.read_text().replace(f"{tmp_path}/run", f"{tmp_path}/file/run"))
    assert train(monkeypatch, file) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path}/file" in told
    assert "is a file; name a folder" in told
    assert "Traceback" not in told


def test_a_run_whose_own_config_was_edited_is_refused_like_any_other_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, recipe(tmp_path, {"shards": str(texts(tmp_path / "shards"))})) == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.001", "lr: 0.5"))
    capsys.readouterr()
    assert train(monkeypatch, config) == 2
    assert "stages.sft.train.language.lr: was 0.001, now 0.5" in capsys.readouterr().err


def test_names_in_brackets_are_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, {"shards": str(texts(tmp_path / "shards")), "name": "part[/1]"})
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    tree["eval"] = {"holdout": {"fraction": 0.5, "by": "sample"}, "every": 1}
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert train(monkeypatch, file) == 0
    assert "held-out loss part[/1] " in capsys.readouterr().out


def test_a_tokenizer_without_a_template_is_told_which_formats_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    language = TINY_LANGUAGE | {"tokenizer": without(tmp_path / "tokenizer", chat_template=None)}
    file = recipe(tmp_path, {"shards": str(texts(tmp_path / "shards"))}, language=language)
    assert train(monkeypatch, file) == 2
    told = capsys.readouterr().err
    assert all(name in told for name in ("chatml", "vicuna_v1", "plain"))
    assert "Traceback" not in told


def test_a_tokenizer_without_a_pad_token_trains_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language = TINY_LANGUAGE | {"tokenizer": without(tmp_path / "tokenizer", pad_token=None)}
    file = recipe(tmp_path, {"shards": str(texts(tmp_path / "shards"))}, language=language)
    assert train(monkeypatch, file) == 0
    assert (tmp_path / "run" / "final" / "model.json").exists()


def test_a_language_model_that_is_nowhere_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = recipe(tmp_path, {"shards": str(texts(tmp_path / "shards"))}, language=str(tmp_path / "no-model"))
    assert train(monkeypatch, file) == 2
    told = capsys.readouterr().err
    assert "model.language" in told
    assert "no-model" in told
    assert "Traceback" not in told


def test_a_max_tokens_that_leaves_nothing_is_told_instead_of_a_run_that_learns_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, {"shards": str(texts(tmp_path / "shards"))})
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    tree["stages"][0]["max_tokens"] = 5
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert train(monkeypatch, file) == 2
    assert "max_tokens: 5 leaves nothing of source shards" in capsys.readouterr().err
