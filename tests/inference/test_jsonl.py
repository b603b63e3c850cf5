from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmit.config import ConfigError
from mmit.data.sample import SampleError
from mmit.inference.generate import Model, Sampling
from mmit.inference.jsonl import answer_file

DRAWN = Sampling(12, temperature=1.0, seed=5)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Seven lines, one of them blank, over two pictures in a folder beside the file."""
    (tmp_path / "photos").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    shown = [{"type": "image", "image": "photos/0.png"}, {"type": "text", "text": "\nWhich?"}]
    records: list[dict[str, Any]] = [
        {"id": "first", "prompt": "What is it?", "image": "photos/1.png"},
        {"messages": [{"role": "user", "content": shown}], "expected": "näher\u2028betrachtet"},
        {"prompt": "Hi"},
        {"prompt": "Hi"},
        {"prompt": "Same?", "images": ["photos/0.png", "photos/1.png"]},
        {"messages": [{"role": "user", "content": "Hello"}]},
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join([*lines[:3], "", *lines[3:]]), encoding="utf-8")
    return file


class Killed(Exception):
    pass


def kill_at(count: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done >= count:
            raise Killed

    return progress


def test_lines_keep_their_order_and_their_keys(model: Model, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.jsonl"
    assert answer_file(model, source, out, sampling=Sampling(12), batch_size=4) == (0, 6)
    asked = [json.loads(line) for line in source.read_text().split("\n") if line]
    answered = [json.loads(line) for line in out.read_text().split("\n") if line]
    assert [{k: v for k, v in record.items() if k != "answer"} for record in answered] == asked
    assert answered[2]["answer"] == model.answer("Hi", max_new_tokens=12)
    photos = [source.parent / "photos" / f"{number}.png" for number in range(2)]
    assert answered[4]["answer"] == model.answer("Same?", photos, max_new_tokens=12)


@pytest.mark.parametrize("torn", [0, 9])
def test_an_interrupted_file_goes_on_to_the_same_bytes(
    model: Model, source: Path, tmp_path: Path, torn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer_file(model, source, whole, sampling=DRAWN, batch_size=6)
    with pytest.raises(Killed):
        answer_file(model, source, out, sampling=DRAWN, batch_size=2, progress=kill_at(4))
    written = out.read_bytes()
    assert whole.read_bytes().startswith(written)
    out.write_bytes(whole.read_bytes()[: len(written) + torn])

    generated = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda asked, *rest, **named: generated.extend(asked) or generate(asked, *rest, **named)
    )
    assert answer_file(model, source, out, sampling=DRAWN, batch_size=3) == (4, 6)
    assert out.read_bytes() == whole.read_bytes()
    assert len(generated) == 2
    assert answer_file(model, source, out, sampling=DRAWN) == (6, 6)
    assert out.read_bytes() == whole.read_bytes()


def test_what_json_may_hold_and_text_may_not_comes_back_as_it_came(model: Model, tmp_path: Path) -> None:
    source, out = tmp_path / "half.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "Hi", "note": "half of a pair: \\ud83d"}\r\n')
    assert answer_file(model, source, out, sampling=Sampling(3)) == (0, 1)
    assert json.loads(out.read_bytes())["note"] == "half of a pair: \ud83d"
    assert answer_file(model, source, out, sampling=Sampling(3)) == (1, 1)


def test_lines_added_to_the_input_are_answered_later(model: Model, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    answer_file(model, source, out, sampling=DRAWN)
    source.write_text(source.read_text() + '\n{"prompt": "One more"}\n')
    assert answer_file(model, source, out, sampling=DRAWN) == (6, 7)


def test_answers_of_other_settings_or_questions_are_not_mixed(model: Model, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    answer_file(model, source, out, sampling=DRAWN)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="another sampling"):
        answer_file(model, source, out, sampling=Sampling(12))
    with pytest.raises(ConfigError, match="another system"):
        answer_file(model, source, out, sampling=DRAWN, system="Be brief.")
    source.write_text(source.read_text().replace("What is it?", "What was it?"))
    with pytest.raises(ConfigError, match=r"another question than .*in\.jsonl:1"):
        answer_file(model, source, out, sampling=DRAWN)
    assert out.read_bytes() == before


def test_a_second_process_does_not_write_the_same_answers(model: Model, source: Path, tmp_path: Path) -> None:
    """Both wrote all of them, one after the other's, and ended well."""
    out, told = tmp_path / "out.jsonl", []

    def again(done: int, total: int) -> None:
        if done == 2:
            with pytest.raises(ConfigError, match="another process is writing it") as caught:
                answer_file(model, source, out, sampling=DRAWN, batch_size=2)
            told.append(str(caught.value))

    assert answer_file(model, source, out, sampling=DRAWN, batch_size=2, progress=again) == (0, 6)
    assert len(told) == 1
    assert len(out.read_bytes().splitlines()) == 6


def test_a_null_is_nothing(model: Model, source: Path, tmp_path: Path) -> None:
    """Tables that are written as lines have every column in each."""
    nulls = {"prompt": None, "messages": None, "image": None, "images": None, "answer": None}
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line]
    answer_file(model, source, tmp_path / "plain.jsonl", sampling=DRAWN)
    source.write_text("\n".join(json.dumps(nulls | line) for line in lines), encoding="utf-8")
    answer_file(model, source, tmp_path / "out.jsonl", sampling=DRAWN)
    plain, table = (
        [json.loads(line)["answer"] for line in (tmp_path / name).read_text(encoding="utf-8").split("\n") if line]
        for name in ("plain.jsonl", "out.jsonl")
    )
    assert table == plain


def test_a_file_that_is_not_ours_is_left_alone(model: Model, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "precious.jsonl"
    out.write_text("mine\n")
    with pytest.raises(ConfigError, match="exists"):
        answer_file(model, source, out, sampling=DRAWN)
    with pytest.raises(ConfigError, match="is the input too"):
        answer_file(model, source, source, sampling=DRAWN)
    assert out.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not JSON"),
        (r'{"prompt": "\ud83d"}', "half of a character"),
        ("[1]", "either"),
        ('{"text": "Hi"}', "either"),
        ('{"prompt": "Hi", "messages": []}', "either"),
        ('{"prompt": 3}', '"prompt" is a text'),
        ('{"messages": "Hi"}', '"messages" a list'),
        ('{"prompt": "Hi", "answer": "x"}', 'has an "answer" already'),
        ('{"prompt": "Hi", "image": 3}', "images are"),
        ('{"prompt": "Hi", "image": "a.png", "images": []}', "keep one of them"),
        ('{"prompt": "Hi", "image": "nowhere.png"}', r"nowhere\.png is not there"),
        (json.dumps({"prompt": "long " * 1000}), "the language model reads 2048"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_answered(
    model: Model, source: Path, tmp_path: Path, line: str, named: str
) -> None:
    source.write_text(source.read_text() + "\n" + line)
    with pytest.raises(SampleError, match=rf"in\.jsonl:8: .*{named}"):
        answer_file(model, source, tmp_path / "out.jsonl", sampling=DRAWN)
    assert not (tmp_path / "out.jsonl").exists()
