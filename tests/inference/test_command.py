from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmit import cli
from mmit.inference.generate import load
from tests.conftest import train_tiny


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMIT_CACHE", str(tmp_path / "cache"))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `mmit generate` in this process."""
    monkeypatch.setattr(sys, "argv", ["mmit", "generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code if isinstance(ended.value.code, int) else 1


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    for number, file in enumerate(files):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return files


def test_a_prompt_is_answered_as_from_python(
    tiny_run: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = [word for file in photos for word in ("--image", file)]
    options = ["--max-new-tokens", 9, "--temperature", 1, "--top-p", 0.9, "--seed", 4]
    assert run(monkeypatch, tiny_run, *shown, "--prompt", "Which shape?", *options) == 0
    expected = load(tiny_run).answer("Which shape?", photos, max_new_tokens=9, temperature=1, top_p=0.9, seed=4)
    assert capsys.readouterr().out == expected + "\n"


def test_a_file_is_answered_and_the_same_command_goes_on(
    tiny_run: Path,
    tmp_path: Path,
    photos: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": "Which?", "image": file.name}) for file in photos))
    command = [tiny_run, "--jsonl", source, "--out", out, "--max-new-tokens", 5]
    assert run(monkeypatch, *command) == 0
    written = out.read_text()
    assert len(written.splitlines()) == 2
    assert run(monkeypatch, *command) == 0
    assert out.read_text() == written
    assert "2 of them from before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ([], 2, "write either --prompt"),
        (["--prompt", "a", "--jsonl", "b"], 2, "write either --prompt"),
        (["--jsonl", "in.jsonl"], 2, "--jsonl goes with --out"),
        (["--prompt", "a", "--out", "b"], 2, "--jsonl goes with --out"),
        (["--jsonl", "in.jsonl", "--out", "b", "--image", "0.png"], 2, "names its pictures itself"),
        (["--prompt", "a", "--image", "nowhere.png"], 2, "--image nowhere.png: no such file"),
        (["--prompt", "a", "--image", "https://there/a.png"], 2, "download the picture and name its file"),
        (["--prompt", "a", "--image", "in.jsonl"], 3, "no readable picture"),
        (["--prompt", "a", "--temperature", "-1"], 2, "temperature: -1"),
        (["--jsonl", "nowhere.jsonl", "--out", "b"], 2, "nowhere.jsonl: cannot be read"),
        (["--jsonl", "in.jsonl", "--out", "b"], 3, "in.jsonl:2: the picture nowhere.png is not there"),
    ],
)
def test_a_fault_is_one_message_with_its_place(
    tiny_run: Path,
    tmp_path: Path,
    photos: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    named: str,
) -> None:
    del photos
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "Hi", "image": "nowhere.png"}')
    assert run(monkeypatch, tiny_run, *arguments) == code
    (message,) = capsys.readouterr().err.splitlines()
    assert named in message


def test_a_marker_in_a_prompt_with_pictures_is_said_to_be_a_word(
    tiny_run: Path,
    tmp_path: Path,
    photos: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As users of LLaVA write prompts by habit: the model has never seen that word."""
    told = "<image> in a prompt is a word"
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "<image>\nWhich?", "image": photos[0].name}))
    short = ["--max-new-tokens", 2]
    assert run(monkeypatch, tiny_run, "--image", photos[0], "--prompt", "<image>\nWhich?", *short) == 0
    assert told in capsys.readouterr().err
    assert run(monkeypatch, tiny_run, "--jsonl", source, "--out", tmp_path / "out.jsonl", *short) == 0
    assert told in capsys.readouterr().err
    assert run(monkeypatch, tiny_run, "--prompt", "What does <image> mean?", *short) == 0
    assert told not in capsys.readouterr().err


def test_a_run_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "nowhere", "--prompt", "Hi") == 2
    assert "holds no finished run" in (told := capsys.readouterr().err)
    assert "mmit train" not in told


def test_an_export_is_told_from_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert run(monkeypatch, tmp_path, "--prompt", "Hi") == 2
    assert "name the run it was made from" in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_told_how_to_finish_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("output: x")
    assert run(monkeypatch, tmp_path, "--prompt", "Hi") == 2
    assert f"finish it with `mmit train {tmp_path}/config.yaml`" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["missing weights", "cut weights", "missing tokenizer", "cut record"])
def test_a_run_that_was_not_copied_whole_is_named(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    final = shutil.copytree(tiny_run, tmp_path / "copy") / "final"
    match harm:
        case "missing weights":
            (final / "model.safetensors").unlink()
        case "cut weights":
            os.truncate(final / "model.safetensors", 3000)
        case "missing tokenizer":
            shutil.rmtree(final / "tokenizer")
        case "cut record":
            os.truncate(final / "model.json", 100)
    assert run(monkeypatch, tmp_path / "copy", "--prompt", "Hi") == 2
    told = capsys.readouterr().err
    assert str(final) in told
    assert "copy" in told.partition(";")[2]


def test_a_run_that_ended_on_captions_says_so(
    tmp_path: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {
        "name": "align",
        "data": [{"synthetic": "captions", "options": {"count": 8}}],
        "chat": "plain",
        "train": {"projector": {"lr": 1e-3}},
        "batch_size": 8,
        "steps": 2,
    }
    captions = train_tiny(tmp_path, [stage])
    assert run(monkeypatch, captions, "--image", photos[0], "--prompt", "", "--max-new-tokens", 4) == 0
    assert "stage align ended this run with the chat format plain" in capsys.readouterr().err
